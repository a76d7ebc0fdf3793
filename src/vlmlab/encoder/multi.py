"""``multi``: several encoders, or layers of several towers, side by side (Florence-VL, SPHINX)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Len, MinLen
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width

Combine = Literal["channel", "token", "average"]
Size = tuple[int, int]


class MultiEncoder(Encoder):
    """Features of several encoders of the same image as one feature grid.

    ``channel`` puts the features of a place side by side: Florence-VL's depth-breadth fusion (arXiv 2412.04424) and
    SPHINX's mix of encoders (arXiv 2311.07575). ``token`` puts the grids one after the other and ``average`` takes
    their mean, which Florence-VL compares with it. A tower listed once with several `layers` gives a grid per layer;
    all grids of all encoders are combined alike.

    All encoders see the same picture: what the geometry of the largest one (pixels) makes of the image; the others get
    it scaled to their size, bicubic and antialiased, each with its own normalisation.

    Args:
        encoders: the encoders in order.
        combine: "channel", "token" or "average".
        grid: rows and columns that every grid is resampled to (bilinear); null wants them equal, or for "token" takes
            them as they are.
        pooled: hand on the pooled outputs of the encoders that have one, side by side.

    Raises:
        UserError: no encoder, an unknown `combine`, or grids, widths or pooled outputs that do not fit.
    """

    one_tower = False

    def __init__(
        self,
        encoders: Annotated[Sequence[Encoder], MinLen(1)],
        combine: Combine = "channel",
        grid: Annotated[Sequence[Width], Len(2, 2)] | None = None,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        if not encoders:
            raise UserError("encoder.encoders is empty; list at least one encoder with its _target_.")
        if combine not in get_args(Combine):
            raise UserError(f"encoder.combine={combine} is unknown; choose from {', '.join(get_args(Combine))}.")
        self.tower = nn.ModuleList(encoders)  # whole encoders, so that an adapter wraps every tower inside
        self.combine = combine
        if grid is not None and len(grid) != 2:
            raise UserError(f"encoder.grid={list(grid)} is not a grid; give rows and columns, as in [16,16], or null.")
        self.grid: Size | None = None if grid is None else (grid[0], grid[1])
        self.pooled = pooled
        self.preprocess = max((e.preprocess for e in encoders), key=lambda p: p.height * p.width)
        self.source: str | None = _joint_source(encoders)
        grids, hands_on = self._probe()
        _check(grids, combine, self.grid)
        widths = [width for width, _ in grids]
        self._widths = widths if combine == "channel" else widths[:1]
        self.width = sum(self._widths)
        self._hw = _shape([self.grid or hw for _, hw in grids], combine)
        self.pooled_width = sum(hands_on)
        if pooled and not hands_on:
            raise UserError("encoder.pooled=true needs an encoder that pools; set encoder.encoders.<i>.pooled=true.")

    @property
    def hw(self) -> Size:
        """Rows and columns of the feature grid of one image; grids one after the other are stacked in rows."""
        return self._hw

    @property
    def widths(self) -> list[int]:
        """Of every encoder and layer, or of the one that token and average give."""
        return self._widths

    def forward(self, pixels: Tensor) -> Visual:
        """(I, 3, H, W) uint8 -> Visual with a grid per encoder and layer, or one (I, N, Dv) for token and average."""
        seen = [encoder(_scaled(pixels, encoder)) for encoder in self.encoders]
        grids = [self._resampled(grid, e.hw) for e, v in zip(self.encoders, seen, strict=True) for grid in v.grids]
        if self.combine == "token":
            grids = [torch.cat(grids, 1)]  # K x (I, N, Dv) -> (I, K N, Dv)
        elif self.combine == "average":
            grids = [torch.stack(grids).mean(0)]  # K x (I, N, Dv) -> (I, N, Dv)
        outputs = [visual.pooled for visual in seen if visual.pooled is not None]  # each (I, Dp)
        hw = torch.tensor([self._hw], device=pixels.device).expand(pixels.shape[0], 2)
        return Visual(grids=grids, pooled=torch.cat(outputs, -1) if self.pooled else None, hw=hw)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """What the features of each encoder depend on."""
        return [(f"tower.{i}.{name}", p) for i, e in enumerate(self.encoders) for name, p in e.trainable()]

    @property
    def encoders(self) -> list[Encoder]:
        """The encoders in order."""
        return [*self.tower]  # type: ignore[misc]  # mypy knows them as modules only

    @torch.no_grad()
    def _probe(self) -> tuple[list[tuple[int, Size]], list[int]]:
        """(width, grid) of every grid and the widths of pooled outputs, by looking at one blank image."""
        blank = torch.zeros(1, 3, self.preprocess.height, self.preprocess.width, dtype=torch.uint8)
        modes = {module: module.training for module in self.tower.modules()}
        self.tower.eval()  # no dropout: building must not draw random numbers
        seen = [encoder(_scaled(blank, encoder)) for encoder in self.encoders]
        for module, training in modes.items():
            module.training = training
        grids = [(g.shape[-1], e.hw) for e, v in zip(self.encoders, seen, strict=True) for g in v.grids]
        return grids, [visual.pooled.shape[-1] for visual in seen if visual.pooled is not None]

    def _resampled(self, grid: Tensor, hw: Size) -> Tensor:
        """(I, N, Dv) -> (I, N', Dv) on the common grid."""
        if self.grid is None or hw == self.grid:
            return grid
        square = grid.unflatten(1, hw).movedim(-1, 1)  # (I, Dv, rows, columns)
        resized = F.interpolate(square.float(), self.grid, mode="bilinear", align_corners=False)
        return resized.to(grid.dtype).flatten(2).mT  # (I, N', Dv)


def _scaled(pixels: Tensor, encoder: Encoder) -> Tensor:
    """(I, 3, H, W) uint8 at the size of an encoder."""
    size = (encoder.preprocess.height, encoder.preprocess.width)
    if pixels.shape[2:] == size:
        return pixels
    scaled = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def _check(grids: list[tuple[int, Size]], combine: Combine, grid: Size | None) -> None:
    widths, shapes = ([width for width, _ in grids], [grid or hw for _, hw in grids])
    if combine != "channel" and len(set(widths)) > 1:
        shown = ", ".join(map(str, widths))
        raise UserError(f"encoder.combine={combine} needs features of one width, not {shown}; use combine=channel.")
    if combine != "token" and len(set(shapes)) > 1:
        shown = ", ".join(f"{rows}x{columns}" for rows, columns in shapes)
        raise UserError(f"encoder.combine={combine} needs equal grids, not {shown}; set encoder.grid to one of them.")


def _shape(shapes: list[Size], combine: Combine) -> Size:
    """The grid of the combined features; grids of different columns do not stack and become one long row."""
    if combine != "token":
        return shapes[0]
    if len({columns for _, columns in shapes}) == 1:
        return sum(rows for rows, _ in shapes), shapes[0][1]
    return 1, sum(rows * columns for rows, columns in shapes)


def _joint_source(encoders: Sequence[Encoder]) -> str | None:
    """One hash over the hashes of all encoders; None if the weights of one of them are new."""
    weighted = [encoder.source for encoder in encoders if any(True for _ in encoder.parameters())]
    if not weighted or None in weighted:
        return None
    return hashlib.sha256(" ".join(str(source) for source in weighted).encode()).hexdigest()
