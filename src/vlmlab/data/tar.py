"""The earlier place of `vlmlab.data.readers.tar`, kept for code that imports from here."""

from vlmlab.data.readers.tar import TarShards

__all__ = ["TarShards"]
