"""``bliva``: the Q-Former's queries, then every patch (BLIVA, arXiv 2308.09936 section 3.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.connector.query_transformer import QueryTransformer
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Visual


class BlivaConnector(QueryTransformer):
    """What the queries found for this instruction, followed by one linear layer's view of every feature.

    The queries may have lost what the patches still show (small print); the patches do not know the question.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        instruction: whether the queries read what the user says (they do in the paper).
        own_layers: of two tapped layers of the encoder the patches are the first one's features and the queries read
            the second one's (the paper: the last but one, and the last); false: both read all that is tapped.
        **qformer: the other keywords of ``QueryTransformer``.

    Raises:
        UserError: with `own_layers`, where the encoder does not tap two layers of one width.
    """

    def __init__(
        self, in_width: int, out_width: int, instruction: bool = True, own_layers: bool = False, **qformer: Any
    ) -> None:
        if own_layers and in_width % 2:
            raise UserError(OWN_LAYERS)
        width = in_width // 2 if own_layers else in_width
        super().__init__(width, out_width, instruction=instruction, **qformer)
        self.own_layers = own_layers
        self.width_of_a_layer = width
        self.patches = nn.Linear(width, out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per query and one per feature."""
        return super().tokens_per_image(hw) + hw[0] * hw[1]

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M + N, D): the queries' tokens, then the patches'."""
        asked, shown = visual, torch.cat(visual.grids, -1)  # (I, N, Dv)
        if self.own_layers:
            if len(visual.grids) != 2 or any(grid.shape[-1] != self.width_of_a_layer for grid in visual.grids):
                raise UserError(OWN_LAYERS)
            shown, asked = visual.grids[0], replace(visual, grids=visual.grids[1:])
        queries = super().forward(asked, instruction)  # (I, M, D)
        return torch.cat([queries, self.patches(shown)], 1)


OWN_LAYERS = (
    "connector.own_layers=true reads two layers of one tower, the patches' and the queries'; set "
    "encoder.layers=[-2,-1], or connector.own_layers=false."
)
