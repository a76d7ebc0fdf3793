"""Classes that have moved: a run made before the move is read as if its configuration had the present names.

Only what a saved configuration can name is listed here. In a configuration that is written now an old name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED = {
    "vlmlab.recipe.base": "vlmlab.engine.stage",
    "vlmlab.recipe.alignment": "vlmlab.engine.alignment",
    "vlmlab.recipe.instruction": "vlmlab.engine.instruction",
    "vlmlab.recipe.contrastive": "vlmlab.engine.contrastive",
    "vlmlab.engine.text_tower": "vlmlab.encoder.scratch_text",
    "vlmlab.train.towers": "vlmlab.towers.rebuild",
    "vlmlab.data.llava": "vlmlab.data.readers.llava",
    "vlmlab.data.vqa": "vlmlab.data.readers.vqa",
    "vlmlab.data.coco_captions": "vlmlab.data.readers.coco_captions",
    "vlmlab.data.karpathy": "vlmlab.data.readers.karpathy",
    "vlmlab.data.parquet": "vlmlab.data.readers.parquet",
    "vlmlab.data.tar": "vlmlab.data.readers.tar",
}
"""Old module -> present module; what is in it has kept its name."""


def present_name(name: str) -> str:
    """The present dotted name of what had this one; the same where it has not moved."""
    module, dot, rest = name.rpartition(".")
    return MOVED[module] + dot + rest if module in MOVED else name


def with_present_names(value: Any) -> Any:
    """A configuration, or a part of one, with the present name in place of every old one."""
    if isinstance(value, Mapping):
        return {key: with_present_names(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_present_names(item) for item in value]
    return present_name(value) if isinstance(value, str) else value
