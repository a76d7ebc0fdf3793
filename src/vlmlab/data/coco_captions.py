"""The earlier place of `vlmlab.data.readers.coco_captions`, kept for code that imports from here."""

from vlmlab.data.readers.coco_captions import CocoCaptions

__all__ = ["CocoCaptions"]
