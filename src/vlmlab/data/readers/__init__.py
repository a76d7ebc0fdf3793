"""Readers of real files: conversations, questions, captions, in JSON, parquet and tar."""
