"""``scratch`` of ``text_tower``: a SigLIP text tower with random weights, to be trained beside a vision tower."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SiglipTextConfig, SiglipTextModel

from vlmlab.contracts.parts import PairText
from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.tensors import Textual
from vlmlab.contracts.values import Count, Depth, Vocabulary, Width
from vlmlab.encoder.text import tokenised
from vlmlab.lm.tokenizer import texts_of, train_tokenizer
from vlmlab.towers.source import embedded


class ScratchTextTower(PairText):
    """A SigLIP text tower with random weights (arXiv 2303.15343 for the family; sizes are ours), to be trained.

    Its tokenizer is trained on some text, or the embedded LM's, whose words are those of the embedded world.

    Args:
        projection_size: width of the pooled output; of the vision tower's own where the two are compared themselves.
        max_position_embeddings: length of its context.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in ``SiglipTextConfig``.
        text: the data set whose prompts and answers its tokenizer is trained on; null: the embedded LM's tokenizer.
        tokenizer_samples: how many of its samples.
        vocab_size: upper bound of that tokenizer's vocabulary.
    """

    def __init__(
        self,
        projection_size: Width,
        max_position_embeddings: Count,
        hidden_size: Width,
        intermediate_size: Width,
        num_hidden_layers: Depth,
        num_attention_heads: Width,
        text: SampleSource | None = None,
        tokenizer_samples: Count = 4000,
        vocab_size: Vocabulary = 512,
    ) -> None:
        super().__init__()
        learnt = None if text is None else train_tokenizer(texts_of(text, tokenizer_samples), vocab_size)
        # by its file: AutoTokenizer would put the rules of Qwen2 in place of its own
        read: Any = {"tokenizer_file": str(embedded("lm") / "tokenizer.json")}
        self.tokenizer = PreTrainedTokenizerFast(
            **(read if learnt is None else {"tokenizer_object": learnt.backend_tokenizer}),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="right",
            model_max_length=max_position_embeddings,
        )
        self.context, self.pad = max_position_embeddings, int(self.tokenizer.pad_token_id)
        self.width, self.state_width = projection_size, hidden_size
        self.source, self.head = None, None
        config = SiglipTextConfig(
            vocab_size=len(self.tokenizer),
            projection_size=projection_size,
            max_position_embeddings=max_position_embeddings,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.pad,
        )
        self.model: nn.Module = SiglipTextModel(config)
        self.tokenise = partial(tokenised, self.tokenizer, context=self.context)

    def forward(self, ids: Tensor) -> Textual:
        """(B, T) -> states (B, T, Dt), and the pooled text (B, E)."""
        out = self.model(input_ids=torch.where(ids < 0, self.pad, ids))
        return Textual(out.last_hidden_state, out.pooler_output, ids >= 0)
