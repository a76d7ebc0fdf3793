"""``bliva``: the Q-Former's queries, then every patch (BLIVA, arXiv 2308.09936 section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.connector.query_transformer import QueryTransformer
from vlmlab.contracts.tensors import Visual


class BlivaConnector(QueryTransformer):
    """What the queries found for this instruction, followed by one linear layer's view of every feature.

    The queries may have lost what the patches still show (small print); the patches do not know the question.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        instruction: whether the queries read what the user says (they do in the paper).
        **qformer: the other keywords of ``QueryTransformer``.
    """

    def __init__(self, in_width: int, out_width: int, instruction: bool = True, **qformer: Any) -> None:
        super().__init__(in_width, out_width, instruction=instruction, **qformer)
        self.patches = nn.Linear(in_width, out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per query and one per feature."""
        return super().tokens_per_image(hw) + hw[0] * hw[1]

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M + N, D): the queries' tokens, then the patches'."""
        queries = super().forward(visual, instruction)  # (I, M, D)
        patches = self.patches(torch.cat(visual.grids, -1))  # (I, N, D)
        return torch.cat([queries, patches], 1)
