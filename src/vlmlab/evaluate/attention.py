"""What an answer looks at: the attention of its tokens to the visual tokens, of the forward pass that scores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmlab.contracts.tensors import Batch
from vlmlab.contracts.watch import Watch
from vlmlab.model.vlm import VLM

SELF = "self-attention"
CROSS = "cross-attention"
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Attention:
    """What the tokens of one answer look at.

    Attributes:
        tokens: of the answer, as text, with the one that ends it.
        probabilities: of each after those before it.
        pictures: (H, W, 3) uint8 of every image, as the encoder is given it.
        grid: rows and columns of an image's visual tokens; None where they have no place in it.
        maps: name -> (L, T, I, M), mean over the heads: for each layer, or look at the images, and each token of the
            answer, from the position that predicts it, its weights on the M visual tokens of every image.
        why_none: one sentence where there is no map; empty where there is one.
    """

    tokens: Sequence[str]
    probabilities: Sequence[float]
    pictures: Sequence[NDArray[np.uint8]] = ()
    grid: tuple[int, int] | None = None
    maps: dict[str, Weights] = field(default_factory=dict)
    why_none: str = ""


@torch.no_grad()
def attention(model: VLM, batch: Batch) -> Attention:
    """The attention of a batch of one row, whose supervised tokens are the answer, in one forward pass of the model.

    Args:
        model: in evaluation mode.
        batch: one row, not packed.
    """
    watch = Watch(queries=(batch.labels[0, 1:] != -100).nonzero()[:, 0])
    outputs = model(batch, watch=watch)
    chosen = outputs.logits.float().log_softmax(-1).gather(1, outputs.targets[:, None])[:, 0].exp()
    tokens = [str(model.lm.tokenizer.decode([token])) for token in outputs.targets.tolist()]
    pictures = [picture.permute(1, 2, 0).cpu().numpy() for picture in batch.pixels]
    maps = _maps(watch, batch)
    return Attention(
        tokens=tokens,
        probabilities=chosen.tolist(),
        pictures=pictures,
        grid=_grid(model, maps),
        maps=maps,
        why_none="" if maps else _why(model, batch, watch),
    )


def _maps(watch: Watch, batch: Batch) -> dict[str, Weights]:
    """By name, those that there are."""
    count, visual = len(batch.images), batch.layout.visual[0]
    found = {}
    if count and bool(visual.any()) and watch.own:
        found[SELF] = _per_image([own[..., visual] for own in watch.own], count)
    if count and watch.images:
        found[CROSS] = _per_image(watch.images, count)
    return found


def _per_image(weights: Sequence[Tensor], count: int) -> Weights:
    """L times (H, T, I * M) -> (L, T, I, M), mean over the heads."""
    mean = torch.stack([each.mean(0) for each in weights])  # (L, T, I * M)
    return mean.unflatten(-1, (count, -1)).cpu().numpy()


def _grid(model: VLM, maps: dict[str, Weights]) -> tuple[int, int] | None:
    if model.encoder is None or model.connector is None:
        return None
    grid = model.connector.grid(model.encoder.hw)
    fits = grid is not None and all(weights.shape[-1] == grid[0] * grid[1] for weights in maps.values())
    return grid if fits else None


def _why(model: VLM, batch: Batch, watch: Watch) -> str:
    """Why there is no map."""
    fusion = type(model.fusion).__name__
    if model.encoder is None:
        return f"This model reads no images ({fusion}): there is nothing that attention could be over."
    if not len(batch.images):
        return "No image was given: there is nothing that attention could be over."
    if bool(batch.layout.visual.any()):
        return f"The language model ({type(model.lm.model).__name__}) does not let its attention weights be kept."
    return f"Here vision acts on the words without attention to visual tokens ({fusion}): there is no map to show."
