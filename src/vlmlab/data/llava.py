"""The earlier place of `vlmlab.data.readers.llava`, kept for code that imports from here."""

from vlmlab.data.readers.llava import LlavaFormat, LlavaJson

__all__ = ["LlavaFormat", "LlavaJson"]
