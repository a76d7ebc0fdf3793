"""``token_concat``: consecutive features side by side, one linear layer (MiniGPT-v2, arXiv 2310.09478 section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmlab.connector.base import check_counts
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class TokenConcatConnector(Connector):
    """``group`` neighbours in reading order become one token of as many times the channels, then one linear layer.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        group: features per token (4 in the paper: 1024 patches of a 448 px image become 256 tokens).

    Raises:
        UserError: from ``tokens_per_image`` and ``forward``, where ``group`` does not divide the number of features.
    """

    def __init__(self, in_width: int, out_width: int, group: Width = 4) -> None:
        super().__init__()
        check_counts(group=group)
        self.group = group
        self.proj = nn.Linear(in_width * group, out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per group."""
        return self._tokens(hw[0] * hw[1])

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = torch.cat(visual.grids, -1)  # (I, N, Dv)
        tokens = self._tokens(features.shape[1])
        joined = features.reshape(len(features), tokens, features.shape[1] // tokens * features.shape[2])
        return self.proj(joined)  # (I, M, g * Dv) -> (I, M, D)

    def _tokens(self, features: int) -> int:
        if features % self.group:
            raise UserError(
                f"connector.group={self.group} does not divide the {features} features of an image; "
                f"choose a divisor of {features}."
            )
        return features // self.group
