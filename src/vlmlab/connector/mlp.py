"""``mlp``: linear layers with an activation between them (LLaVA-1.5's projector; two layers in arXiv 2503.19508)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Depth, Text, Width


class MlpConnector(Connector):
    """Linear, then (activation, Linear) for every further layer; one visual token per feature.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        depth: number of linear layers; 2 is LLaVA's ``mlp2x_gelu``.
        hidden: width between them; null means the LM's.
        activation: by transformers' name, as "gelu" (LLaVA-1.5) or "silu" (LaVIN).
        end: a learned vector after every image's tokens (LLaVA-OneVision's ``image_newline``, arXiv 2408.03326).

    Raises:
        UserError: there is no such activation.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        depth: Depth = 2,
        hidden: Width | None = None,
        activation: Text = "gelu",
        end: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise UserError(f"connector.activation={activation} is unknown; use one of {listed(sorted(ACT2FN))}.")
        self.activation = activation
        widths = [in_width, *[hidden or out_width] * (depth - 1), out_width]
        layers: list[nn.Module] = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*[m for layer in layers for m in (layer, ACT2FN[activation])][:-1])
        self.end = nn.Parameter(torch.randn(out_width) / out_width**0.5) if end else None

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per feature of the grid, and the end."""
        return hw[0] * hw[1] + (self.end is not None)

    def grid(self, hw: tuple[int, int]) -> tuple[int, int] | None:
        """That of the features; none with an end, which has no place in the picture."""
        return hw if self.end is None else None

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        tokens = self.layers(torch.cat(visual.grids, -1))  # (I, N, Dv) -> (I, N, D)
        return tokens if self.end is None else torch.cat([tokens, self.end.expand(len(tokens), 1, -1)], 1)
