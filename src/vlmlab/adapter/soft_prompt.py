"""``soft_prompt``: learnt tokens before every sample (arXiv 2104.08691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.adapter.base import Layer, check_name, insert
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import NotNegative, Text, Width, Wrapped


class SoftPromptAdapter(Adapter):
    """`length` learnt vectors in the LM's embedding space are before every sample.

    The collator writes them into the sequence as the ids -1, -2, ... with role system, so that masks, packing,
    positions and cached generation treat them as any other token, and the embedding table looks them up here. Without
    such ids in a batch the LM is unchanged; with them it starts as nothing else, since the sequence is longer.

    Args:
        parts: ``lm`` alone.
        length: tokens before every sample.
        lr: learning rate of the adapter wherever a stage trains the LM; null takes the stage's.
        name: of the adapter, where several share one LM; they are switched with batches of their own length.
    """

    lm_only = True
    in_layers = False

    def __init__(
        self, parts: Wrapped = ("lm",), length: Width = 8, lr: NotNegative | None = None, name: Text = "default"
    ) -> None:
        if tuple(parts) != ("lm",):
            raise UserError(f"adapter.parts={list(parts)}: soft prompts are read by the LM; set it to [lm].")
        if length < 1:
            raise UserError(f"adapter.length={length} leaves no token; give at least 1.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.prompt_tokens = length

    def wrap(self, part: Any) -> nn.Module:
        """The LM with its embedding table wrapped; equal to the LM for ids of at least 0.

        Raises:
            UserError: the tower reads no ids.
        """
        find = getattr(part, "get_input_embeddings", None)
        table = find() if find is not None else None
        if not isinstance(getattr(table, "base_layer", table), nn.Embedding):
            raise UserError(
                f"adapter=soft_prompt needs an LM with a table of words, not {type(part).__name__}; use lora"
            )
        path = next(path for path, module in part.named_modules() if module is table)
        return insert(part, [path], self.name, SoftPromptLayer, lambda base: SoftPrompt(base, self.prompt_tokens))


class SoftPrompt(nn.Module):
    """The vectors (P, D), at first those of random tokens (arXiv 2104.08691, section 3.1: sampled vocabulary)."""

    def __init__(self, table: nn.Module, length: int) -> None:
        super().__init__()
        size = int(table.weight.shape[0])  # type: ignore[union-attr, index]
        device = table.weight.device  # type: ignore[union-attr]
        with torch.no_grad():
            rows: Tensor = table(torch.randint(size, (length,)).to(device))  # type: ignore[arg-type]
        self.weight = nn.Parameter(rows.float())

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) ids from -1 downwards -> (B, S, D); what is at other ids means nothing."""
        return F.embedding((-1 - ids).clamp(0, len(self.weight) - 1), self.weight)


class SoftPromptLayer(Layer):
    """The embedding table, with its attributes; ids below 0 are soft prompts."""

    base_layer: nn.Embedding

    @property
    def num_embeddings(self) -> int:
        """Tokens of the vocabulary, without soft prompts."""
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """The LM's width."""
        return self.base_layer.embedding_dim

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S) -> (B, S, D).

        Raises:
            ValueError: the batch was made for a soft prompt and none acts.
        """
        prompt = ids < 0
        if self.acting is None:
            if bool(prompt.any()):
                raise ValueError("this batch has soft prompts and none acts; make it again after switching")
            plain: Tensor = self.base_layer(ids, *args, **kwargs)
            return plain
        embeds: Tensor = self.base_layer(ids.clamp(min=0), *args, **kwargs)  # (B, S, D)
        return torch.where(prompt[..., None], self.acting(ids).to(embeds.dtype), embeds)
