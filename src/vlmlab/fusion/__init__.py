"""Fusions: how vision acts on the language model. Each declares ``reads``, ``in_sequence`` and ``starts_as``."""
