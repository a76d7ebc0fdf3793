"""``token_merge``: a transformer that merges similar features in every layer (SimVLG, arXiv 2310.03291 section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from vlmlab.connector.base import check_counts, check_heads
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Depth, Drop, Natural, Width


class TokenMergeConnector(Connector):
    """BERT layers; after the attention of each, the ``merge`` most similar pairs of tokens become one token a pair.

    Pairs are found by bipartite matching on the keys (ToMe, arXiv 2210.09461 section 3): every second token proposes
    to the most similar of the others, and the best proposals are merged. Kept proposers come first, then the others,
    each in their order. Without merging these are transformers' BERT layers. Unlike the released code there is no class
    token to protect (encoders here drop it) and no table of positions: the features carry their position.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        merge: pairs merged in each layer (19 in the paper: 257 - 12 x 19 = 29 tokens); 0 for none.
        layers: number of layers (12 in the paper, as BERT-base).
        heads: attention heads (12).
        hidden: width of the layers (768); null means the LM's.
        weighted: as in ToMe, a token counts in means and in the attention as often as the features it stands for;
            false is the plain mean of SimVLG's released code.
        dropout: of attention and hidden states (0.1 in BERT).

    Raises:
        UserError: from ``tokens_per_image`` and ``forward``, where a layer has not two tokens for every pair.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        merge: Natural = 19,
        layers: Depth = 12,
        heads: Width = 12,
        hidden: Width | None = None,
        weighted: bool = True,
        dropout: Drop = 0.1,
    ) -> None:
        super().__init__()
        width = out_width if hidden is None else hidden
        check_counts(layers=layers, hidden=width)
        check_heads(heads, width, "the LM's width" if hidden is None else "connector.hidden")
        if merge < 0:
            raise UserError(f"connector.merge={merge} is not possible; give 0 or more pairs to merge in each layer.")
        self.merge, self.weighted = merge, weighted
        settings: dict[str, Any] = {
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "attn_implementation": "sdpa",
        }
        config = BertConfig(**settings)
        self.feature_norm = nn.LayerNorm(in_width)
        self.proj = nn.Linear(in_width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(BertLayer(config) for _ in range(layers))
        self.out = nn.Linear(width, out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """The grid less ``merge`` tokens in each layer."""
        tokens = hw[0] * hw[1]
        for layer in range(len(self.blocks)):
            if self.merge > tokens // 2:
                raise UserError(
                    f"connector.merge={self.merge} needs {2 * self.merge} tokens and layer {layer + 1} has {tokens}; "
                    "lower connector.merge or connector.layers."
                )
            tokens -= self.merge
        return tokens

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = torch.cat(visual.grids, -1)  # (I, N, Dv)
        self.tokens_per_image((1, features.shape[1]))
        x = self.norm(self.proj(self.feature_norm(features)))  # (I, N, W)
        size = torch.ones_like(x[..., 0])  # (I, N): features that a token stands for
        for block in self.blocks:
            assert isinstance(block, BertLayer)
            attention = block.attention.self
            bias = size.log()[:, None, None] if self.weighted and self.merge else None  # (I, 1, 1, N)
            keys = attention.key(x).unflatten(-1, (attention.num_attention_heads, -1)).mean(2)  # (I, N, W / heads)
            x = block.attention(x, bias)[0]
            if self.merge:
                counts = size if self.weighted else torch.ones_like(size)
                x, size = merged(x, counts, matching(keys.detach(), self.merge), self.merge)  # both less by `merge`
            x = block.feed_forward_chunk(x)
        return self.out(x)  # (I, M, D)


def matching(keys: Tensor, pairs: int) -> Tensor:
    """Which output token every token goes to: (I, N, K) keys -> (I, N) indices below N - pairs."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    proposers, others = keys[:, ::2], keys[:, 1::2]
    best, partner = (proposers @ others.transpose(1, 2)).max(-1)  # (I, ceil(N / 2))
    order = best.argsort(-1, descending=True)
    staying = order[:, pairs:].sort(-1).values
    kept = staying.shape[1]
    target = partner.new_empty(keys.shape[:2])  # (I, N)
    target[:, 1::2] = kept + torch.arange(others.shape[1], device=keys.device)
    joined = partner + kept  # (I, ceil(N / 2)): where a proposer that leaves goes
    target[:, ::2] = joined.scatter(1, staying, torch.arange(kept, device=keys.device).expand_as(staying))
    return target


def merged(x: Tensor, size: Tensor, target: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Means of the tokens with one target, weighted by size, and the new sizes.

    (I, N, W), (I, N), (I, N) -> (I, N - pairs, W), (I, N - pairs).
    """
    tokens = x.shape[1] - pairs
    sizes = size.new_zeros(x.shape[0], tokens).scatter_add(1, target, size)
    parts = x * size[..., None]  # (I, N, W)
    sums = parts.new_zeros(x.shape[0], tokens, x.shape[2]).scatter_add(1, target[..., None].expand_as(parts), parts)
    return sums / sizes[..., None], sizes
