"""The earlier place of `vlmlab.data.readers.karpathy`, kept for code that imports from here."""

from vlmlab.data.readers.karpathy import KarpathyCaptions

__all__ = ["KarpathyCaptions"]
