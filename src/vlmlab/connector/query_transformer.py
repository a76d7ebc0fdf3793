"""Learned queries that read the features by cross-attention (BLIP-2, arXiv 2301.12597 section 3.1), shared.

With ``instruction`` the user's words are beside the queries in its self-attention, so that the queries may ask the
features for what the user wants to know (InstructBLIP, arXiv 2305.06500 section 2.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlmlab.connector.base import check_heads
from vlmlab.contracts.parts import Connector, Sight
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Depth, Drop, Positive, Vocabulary, Width

BERT_VOCABULARY = 30522


class QueryTransformer(Connector):
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
        instruction: read what the user says to the image, beside the queries.
        text: have a text side even where the instruction is not read, for objectives that compare images with texts.
        vocab_size: of the tokenizer that the instruction is written in; null is filled with the LM's (BERT's in the
            paper, and where there is no LM).
        max_words: places of an instruction; words after them are not read (512 in the paper's BERT).
        norm_eps: of the norm of the features (1e-6 in the released models).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        queries: Width = 32,
        hidden: Width | None = None,
        layers: Depth = 12,
        heads: Width = 12,
        cross_every: Width = 2,
        dropout: Drop = 0.1,
        instruction: bool = False,
        text: bool = False,
        vocab_size: Vocabulary | None = None,
        max_words: Width = 512,
        norm_eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        width = hidden or out_width
        check_heads(heads, width, "the LM's width" if hidden is None else "connector.hidden")
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=in_width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            use_qformer_text_input=instruction or text,
        )
        self.norm = nn.LayerNorm(in_width, eps=norm_eps)
        self.queries = nn.Parameter(torch.zeros(1, queries, width).normal_(0.0, 0.02))
        self.qformer = Blip2QFormerModel(config)
        self.out = nn.Linear(width, out_width)
        self.reads_instruction = instruction
        self.reads_text = instruction or text
        if self.reads_text:
            self.words = nn.Embedding(vocab_size or BERT_VOCABULARY, width)
            self.places = nn.Embedding(max_words, width)
            for table in (self.words, self.places):
                nn.init.normal_(table.weight, std=0.02)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per query, whatever the grid."""
        return self.queries.shape[1]

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction (I, T) is read where `instruction` is on, None is an empty one."""
        features = self.norm(torch.cat(visual.grids, -1))  # (I, N, Dv)
        queries = self.queries.expand(features.shape[0], -1, -1)  # (I, M, W)
        if not self.reads_text:
            states = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
            return self.out(states)  # (I, M, D)
        if instruction is None or not self.reads_instruction:
            instruction = torch.full((features.shape[0], 1), -1, device=features.device)
        ids = instruction[:, : self.places.num_embeddings]
        words = self.words(ids.clamp(min=0)) + self.places.weight[: ids.shape[1]]  # (I, T, W)
        seen = torch.cat([ids.new_ones(queries.shape[:2]), (ids >= 0).long()], 1)  # (I, M + T)
        return self.out(self._both(features, words, seen)[:, : queries.shape[1]])  # (I, M, D)

    def joint(self, visual: Visual, ids: Tensor, first: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """Queries and a text in one pass: their states (I, M, W) and (I, 1 + T, W).

        Args:
            visual: the features.
            ids: (I, T) words, -1 after the last; those after the last place are not read.
            first: (W,) embedding of the text's first token, which is before the words.
            sight: who sees whom, see ``sight_mask``.
        """
        features = self.norm(torch.cat(visual.grids, -1))
        ids = ids[:, : self.places.num_embeddings - 1]
        words = torch.cat([first.expand(len(ids), 1, -1), self.words(ids.clamp(min=0))], 1)  # (I, 1 + T, W)
        words = words + self.places.weight[: words.shape[1]]
        count = self.queries.shape[1]
        valid = torch.cat([ids.new_ones(len(ids), 1), ids], 1) >= 0  # (I, 1 + T)
        states = self._both(features, words, sight_mask(sight, count, valid)[:, None])
        return states[:, :count], states[:, count:]

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., W) -> (..., V): the word table as output layer."""
        return states @ self.words.weight.T

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """Number of queries, width of a state, number of words."""
        return self.queries.shape[1], self.queries.shape[2], self.words.num_embeddings

    def _both(self, features: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """States (I, M + T, W) of queries and words; the mask is of keys (I, M + T) or pairs (I, 1, M + T, M + T)."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self.qformer(
            query_embeds=torch.cat([queries, words], 1),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=features,
        ).last_hidden_state


def sight_mask(sight: Sight, queries: int, valid: Tensor) -> Tensor:
    """(I, M + T, M + T) bool over [queries, text]: the three masks of BLIP-2 (arXiv 2301.12597 figure 2).

    apart: queries see queries, text sees text; together: everything sees everything; causal: queries see queries, text
    sees queries and no later text. Nothing sees padding.

    Args:
        sight: which of the three.
        queries: M.
        valid: (I, T) which places of the text hold a word.
    """
    keys = torch.cat([valid.new_ones(len(valid), queries), valid], 1)[:, None]  # (I, 1, M + T)
    place = torch.arange(keys.shape[2], device=valid.device)
    of_text = place >= queries
    if sight == "apart":
        rule = of_text[:, None] == of_text
    elif sight == "causal":
        rule = ~of_text | (of_text[:, None] & (place <= place[:, None]))
    else:
        rule = torch.ones_like(of_text)[:, None] | of_text
    return rule & keys
