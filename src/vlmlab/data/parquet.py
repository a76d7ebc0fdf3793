"""The earlier place of `vlmlab.data.readers.parquet`, kept for code that imports from here."""

from vlmlab.data.readers.parquet import LlavaParquet, VqaParquet

__all__ = ["LlavaParquet", "VqaParquet"]
