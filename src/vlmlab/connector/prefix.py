"""``prefix``: one linear map from the image's mean feature to a few prefix embeddings (Frozen, arXiv 2106.13884)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class PrefixConnector(Connector):
    """The mean over the feature grid, mapped to ``tokens * D`` channels and reshaped (section 3.1).

    The mean is what the paper's encoder, an NF-ResNet, gives after its global pooling.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        tokens: embeddings per image; the paper found 2 best.
    """

    def __init__(self, in_width: int, out_width: int, tokens: Width = 2) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(in_width, tokens * out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """The prefix's length, whatever the grid."""
        return self.tokens

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        pooled = torch.cat(visual.grids, -1).mean(1)  # (I, Dv)
        return self.proj(pooled).unflatten(-1, (self.tokens, -1))  # (I, M, D)
