"""How much of a model an adapter trains, and what that saves against training the towers themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

FP32 = 4
"""Bytes; what trains, its gradient and its moments are fp32."""


def share(model: Any, train: Collection[str]) -> dict[str, float]:
    """Weights that train, all weights, and the one as a share of the other.

    Args:
        model: a ``VLM``.
        train: the parts that train, as in ``recipe.stages.<name>.train``.
    """
    trainable = sum(p.numel() for part, named in model.parts().items() if part in train for _, p in named)
    params = sum(p.numel() for p in model.parameters())
    return {"trainable": trainable, "params": params, "share": trainable / params}


def training_bytes(model: Any, train: Collection[str]) -> int:
    """Bytes that do not depend on the batch: weights, and gradient and AdamW's two moments of what trains.

    For full tuning give the towers' own weights too: ``("lm", "lm.base")``.
    """
    trained = {id(p): p for part, named in model.parts().items() if part in train for _, p in named}
    held = sum(p.nbytes for p in model.parameters() if id(p) not in trained)
    return int(held + sum(4 * FP32 * p.numel() for p in trained.values()))
