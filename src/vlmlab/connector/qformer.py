"""``qformer``: learned queries that read the features by cross-attention (BLIP-2, arXiv 2301.12597 section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual


class QFormerConnector(Connector):
    """transformers' BLIP-2 Q-Former with its learned queries, and a linear layer to the LM's width.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        queries: number of learned queries, which is the number of visual tokens (32 in the paper).
        hidden: width of the Q-Former (768 in the paper); null means the LM's.
        layers: number of layers (12 in the paper).
        heads: attention heads (12 in the paper).
        cross_every: cross-attention in every n-th layer, from the first (2 in the paper).
        dropout: of attention and hidden states (0.1 in the paper's BERT).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        queries: int = 32,
        hidden: int | None = None,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        width = hidden or out_width
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=in_width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.norm = nn.LayerNorm(in_width)
        self.queries = nn.Parameter(torch.zeros(1, queries, width).normal_(0.0, 0.02))
        self.qformer = Blip2QFormerModel(config)
        self.out = nn.Linear(width, out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per query, whatever the grid."""
        return self.queries.shape[1]

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = self.norm(torch.cat(visual.grids, -1))  # (I, N, Dv)
        queries = self.queries.expand(features.shape[0], -1, -1)  # (I, M, W)
        states = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.out(states)  # (I, M, D)
