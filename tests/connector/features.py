"""Random features on a grid that the connector tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual


def visual(layers: int = 1, images: int = 3, width: int = 32, hw: tuple[int, int] = (4, 4)) -> Visual:
    """What an encoder with `layers` tapped layers gives."""
    generator = torch.Generator().manual_seed(0)
    grids = [torch.randn(images, hw[0] * hw[1], width, generator=generator) for _ in range(layers)]
    return Visual(grids=grids, pooled=None, hw=torch.tensor([hw] * images))


class Reader(Connector):
    """One token per image that holds the first word of its instruction."""

    reads_instruction = True

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.out_width = out_width

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        return 1

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        assert instruction is not None
        return instruction[:, :1, None].expand(-1, -1, self.out_width).float()
