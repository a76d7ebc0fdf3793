"""``two_token``: one token for what was asked and one for what is seen (LLaMA-VID, arXiv 2311.17043 section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import as_grid, check_counts, check_divides
from vlmlab.connector.query_transformer import QueryTransformer
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class TwoTokenConnector(QueryTransformer):
    """A context token, by attention of the instruction to the features, and pooled content tokens.

    With Q (M, Dv) the Q-Former's queries after reading instruction and features, X (N, Dv) the features:
    context = Wv mean_m (softmax(Q (X Wk)^T / sqrt(Dv)) X), content = mlp(average pool of X).

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        content: side of the grid of content tokens; 1 is the mean of all features, null keeps every feature.
        hidden: width of the Q-Former; null means the LM's.
        instruction: whether the queries read what the user says (they do in the paper).
        **qformer: the other keywords of ``QueryTransformer``.

    Raises:
        UserError: the grid of features does not divide into the grid of content tokens.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        content: Width | None = 1,
        hidden: Width | None = None,
        instruction: bool = True,
        **qformer: Any,
    ) -> None:
        if content is not None:
            check_counts(content=content)
        # the Q-Former's last layer leads back to the features' width, where the attention takes place
        super().__init__(in_width, in_width, hidden=hidden or out_width, instruction=instruction, **qformer)
        self.content = content
        self.key = nn.Linear(in_width, in_width)
        self.value = nn.Linear(in_width, out_width)
        self.project = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token of context and those of content."""
        if self.content is None:
            return 1 + hw[0] * hw[1]
        check_divides("content", self.content, hw)
        return 1 + self.content**2

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, 1 + C, D): the context token, then the content tokens."""
        features = torch.cat(visual.grids, -1)  # (I, N, Dv)
        asked = super().forward(visual, instruction)  # (I, M, Dv)
        scores = asked @ self.key(features).transpose(1, 2) / features.shape[-1] ** 0.5  # (I, M, N)
        context = (scores.softmax(-1) @ features).mean(1, keepdim=True)  # (I, 1, Dv)
        return torch.cat([self.value(context), self.project(self._pooled(features, visual))], 1)

    def _pooled(self, features: Tensor, visual: Visual) -> Tensor:
        """(I, N, Dv) -> (I, C, Dv)."""
        if self.content is None:
            return features
        grid = as_grid(visual).permute(0, 3, 1, 2)  # (I, Dv, R, C)
        blocks = F.avg_pool2d(grid, (grid.shape[2] // self.content, grid.shape[3] // self.content))  # (I, Dv, c, c)
        return blocks.flatten(2).transpose(1, 2)
