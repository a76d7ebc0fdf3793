"""What connectors share: the features as a grid, its windows, and refusals that name the key."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vlmlab.contracts import errors
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Visual

check_counts = partial(errors.check_counts, "connector")
"""Keys that must be whole numbers of at least 1."""


def as_grid(visual: Visual) -> Tensor:
    """(I, R, C, Dv): the features in rows and columns, all tapped layers side by side.

    Raises:
        UserError: the images have grids of several shapes, or the features form no grid.
    """
    features = torch.cat(visual.grids, -1)  # (I, N, Dv)
    rows, columns = (int(n) for n in visual.hw[0])
    if rows * columns != features.shape[1] or bool((visual.hw != visual.hw[0]).any()):
        raise UserError(
            f"this connector reads one grid of features per image and the encoder gives {features.shape[1]} features "
            f"for {rows}x{columns}; choose connector=mlp, perceiver or qformer, or an encoder with one grid."
        )
    return features.unflatten(1, (rows, columns))  # (I, R, C, Dv)


def windows(grid: Tensor, height: int, width: int) -> Tensor:
    """(I, R, C, Dv) -> (I, R / height, C / width, height * width, Dv), row by row inside a window too."""
    split = grid.unflatten(1, (-1, height)).unflatten(3, (-1, width))  # (I, R / h, h, C / w, w, Dv)
    return split.transpose(2, 3).flatten(3, 4)  # (I, R / h, C / w, h * w, Dv)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (I, D, R, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def check_heads(heads: int, width: int, what: str) -> None:
    """Attention heads must divide the width they split.

    Raises:
        UserError: they do not.
    """
    check_counts(heads=heads)
    if width % heads:
        raise UserError(f"connector.heads={heads} does not divide {what} of {width}; choose a divisor of {width}.")


def check_divides(key: str, value: int, hw: tuple[int, int]) -> None:
    """A window of ``value`` rows and columns must tile the feature grid.

    Raises:
        UserError: it does not.
    """
    if hw[0] % value or hw[1] % value:
        raise UserError(
            f"connector.{key}={value} does not divide the {hw[0]}x{hw[1]} feature grid; choose a divisor of both sides."
        )
