"""``ovis``: every feature is a mixture of visual words (Ovis, arXiv 2405.20797 section 3.1)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import as_grid, check_counts, windows
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Positive, Vocabulary, Width

Tokenize = Literal["softmax", "gumbel_argmax", "st_argmax"]


class OvisConnector(Connector):
    """p = softmax(LN(W x)) over the visual words, token = p E with a learned table E, as a text token is a row of one.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        words: number K of visual words that features are made of (131,072 in the paper).
        stride: features of a block of stride x stride become one token, side by side (zeros fill up the last blocks).
        tokenize: "softmax", "gumbel_argmax" (one word, drawn in training and the likeliest otherwise) or "st_argmax"
            (the likeliest word); the last two have the softmax's gradient.
        temperature: of gumbel_argmax.
        indicators: a learned begin and end word around each image's tokens.
        ends: number of end words (Ovis2 has two after an image that is not cut into tiles).
        std: of the table's first values.

    Raises:
        UserError: `tokenize` is none of the three.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        words: Vocabulary = 16384,
        stride: Width = 1,
        tokenize: Tokenize = "softmax",
        temperature: Positive = 1.0,
        indicators: bool = True,
        ends: Width = 1,
        std: Positive = 0.02,
    ) -> None:
        super().__init__()
        if tokenize not in get_args(Tokenize):
            raise UserError(f"connector.tokenize={tokenize} is unknown; choose from {', '.join(get_args(Tokenize))}.")
        check_counts(words=words, stride=stride, ends=ends)
        self.stride = stride
        self.tokenize = tokenize
        self.temperature = temperature
        self.indicators = 1 + ends if indicators else 0
        self.head = nn.Linear(in_width * stride**2, words, bias=False)
        self.norm = nn.LayerNorm(words)
        self.table = nn.Embedding(words + self.indicators, out_width)  # the indicators are its last rows
        nn.init.normal_(self.table.weight, std=std)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per block of features, and the indicators."""
        return -(-hw[0] // self.stride) * -(-hw[1] // self.stride) + self.indicators

    def grid(self, hw: tuple[int, int]) -> tuple[int, int] | None:
        """That of the blocks; none with indicators, which have no place in the picture."""
        return None if self.indicators else (-(-hw[0] // self.stride), -(-hw[1] // self.stride))

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        words = self.probabilities(visual)  # (I, M', K)
        tokens = words.to(self.table.weight.dtype) @ self.table.weight[: words.shape[-1]]  # (I, M', D)
        if not self.indicators:
            return tokens
        around = self.table.weight[-self.indicators :].expand(len(tokens), -1, -1)  # (I, 1 + ends, D)
        begin, end = around[:, :1], around[:, 1:]
        return torch.cat([begin, tokens, end], 1)

    def probabilities(self, visual: Visual) -> Tensor:
        """(I, M', K) fp32: how much of each visual word is in each token; every row sums to 1."""
        logits = self.norm(self.head(self._blocks(visual))).float()
        if self.tokenize == "softmax":
            return logits.softmax(-1)
        if self.tokenize == "gumbel_argmax" and self.training:
            return F.gumbel_softmax(logits, tau=self.temperature, hard=True)
        soft = logits.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard - soft.detach() + soft  # straight through: the gradient is the softmax's

    def _blocks(self, visual: Visual) -> Tensor:
        """(I, N, Dv) -> (I, M', stride * stride * Dv)."""
        if self.stride == 1:
            return torch.cat(visual.grids, -1)
        s, grid = self.stride, as_grid(visual)  # (I, R, C, Dv)
        grid = F.pad(grid, (0, 0, 0, -grid.shape[2] % s, 0, -grid.shape[1] % s))
        return windows(grid, s, s).flatten(3).flatten(1, 2)
