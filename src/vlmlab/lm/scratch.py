"""``scratch``: a Qwen2 with random weights and a byte-level BPE trained on the spot; for ``recipe=embedded_towers``."""

from __future__ import annotations

import copy
from functools import partial

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.room import check_room
from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.values import Count, Depth, Positive, Texts, Vocabulary, Width
from vlmlab.lm.causal import CausalLanguageModel
from vlmlab.lm.tokenizer import texts_of, train_tokenizer


class ScratchLanguageModel(CausalLanguageModel):
    """A randomly initialised Qwen2 (architecture of Qwen2, sizes are ours) and a tokenizer trained on some text.

    Args:
        text: the data set whose prompts and answers the tokenizer is trained on.
        tokenizer_samples: how many of its samples.
        vocab_size: upper bound of the vocabulary, the 256 bytes included.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        max_position_embeddings: as in ``Qwen2Config``.
        initializer_range: standard deviation of the initial weights; about width ** -0.5 for a narrow model.
        rope_theta: base of the rotary positions (1e6 in Qwen2).
        fused: words written as ``one+other`` that take one position: their embedding is the sum of those of their
            parts, as the feature of a patch holds all that is in it. They are read, never predicted, and have no
            weights of their own; None: there are none.

    Raises:
        UserError: heads do not divide the width, or groups of them the heads.

    Attributes:
        plain_tokenizer: the tokenizer without the fused words, which goes with the saved model.
    """

    def __init__(
        self,
        text: SampleSource,
        tokenizer_samples: Count,
        vocab_size: Vocabulary,
        hidden_size: Width,
        intermediate_size: Width,
        num_hidden_layers: Depth,
        num_attention_heads: Width,
        num_key_value_heads: Width,
        max_position_embeddings: Count = 1024,
        initializer_range: Positive = 0.02,
        rope_theta: Positive = 1e6,
        fused: Texts | None = None,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise UserError(
                f"lm.num_attention_heads={num_attention_heads} does not divide lm.hidden_size={hidden_size}; "
                "choose a number that does."
            )
        if num_attention_heads % num_key_value_heads:
            raise UserError(
                f"lm.num_key_value_heads={num_key_value_heads} does not divide "
                f"lm.num_attention_heads={num_attention_heads}; choose a number that does."
            )
        tokenizer = train_tokenizer(texts_of(text, tokenizer_samples), vocab_size)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=True,
            initializer_range=initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        check_room("lm", config.to_dict(), partial(Qwen2ForCausalLM, config))
        super().__init__(Qwen2ForCausalLM(config), tokenizer)
        self.plain_tokenizer, self.known = copy.deepcopy(tokenizer), len(tokenizer)
        pieces = [_pieces(tokenizer, word) for word in fused or ()]
        longest = max(map(len, pieces), default=1)
        padded = torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in pieces], dtype=torch.long)
        self.parts = padded.reshape(-1, longest)  # (F, P), -1 where a word has fewer; no buffer: it is not a weight
        tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in fused or ()])

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        fused = input_ids >= self.known  # (B, S)
        if not bool(fused.any()):
            return super().embed(input_ids)
        embeds = super().embed(input_ids.masked_fill(fused, 0))  # (B, S, D)
        parts = self.parts.to(input_ids.device)[input_ids[fused] - self.known]  # (F, P)
        embeds[fused] = (super().embed(parts.clamp(min=0)) * (parts >= 0)[..., None]).sum(1)  # (F, D)
        return embeds


def _pieces(tokenizer: PreTrainedTokenizerFast, word: str) -> list[int]:
    """The tokens of the parts of a fused word, each part read as a word after a blank."""
    ids: list[int] = tokenizer("".join(f" {part}" for part in word.split("+")))["input_ids"]
    return ids
