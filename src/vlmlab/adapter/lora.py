"""``lora``: low-rank adapters in the linear layers of a tower (arXiv 2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class LoraAdapter:
    """peft's LoRA on each named tower; the tower's own weights stay frozen and the stage trains the adapter instead.

    Args:
        parts: towers to wrap, of ``lm`` and ``encoder``.
        r: rank.
        alpha: scale; the update is alpha / r times B A.
        dropout: on the adapter's input.
        targets: peft's ``target_modules``; "all-linear" is every linear layer but the LM head.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
    """

    def __init__(
        self,
        parts: Sequence[str] = ("lm",),
        r: int = 16,
        alpha: int = 32,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        lr: float | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.lr = lr
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.targets = targets if isinstance(targets, str) else list(targets)

    def wrap(self, part: nn.Module) -> nn.Module:
        """The tower with its linear layers wrapped in place; equal to the tower before the first update (B = 0)."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.targets)
        return inject_adapter_in_model(config, part, adapter_name="default")
