"""The earlier place of `vlmlab.data.readers.vqa`, kept for code that imports from here."""

from vlmlab.data.readers.vqa import VqaFormat, VqaJson

__all__ = ["VqaFormat", "VqaJson"]
