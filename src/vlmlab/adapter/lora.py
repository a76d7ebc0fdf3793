"""``lora``, ``dora``: low-rank adapters in the linear layers of a tower (arXiv 2106.09685, 2402.09353), by peft."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from vlmlab.adapter.base import check_name, inject, layers
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import Drop, Names, NotNegative, Positive, Text, Width, Wrapped


class LoraAdapter(Adapter):
    """peft's LoRA in each named part; the part's own weights stay frozen and the stage trains the adapter instead.

    Args:
        parts: what to wrap, of ``lm``, ``encoder``, ``connector`` and ``fusion``.
        r: rank.
        alpha: scale; the update is alpha / r times B A.
        dropout: on the adapter's input.
        targets: peft's ``target_modules``; "all-linear" is every linear layer but the LM head.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        rslora: scale by alpha / sqrt(r) (arXiv 2312.03732).
        pissa: A and B begin as the r largest singular directions of the weight, which keeps the rest (PiSSA,
            arXiv 2404.02948). The tower then equals itself up to rounding, its weights have changed, and it can hold
            no second adapter.
        lr_ratio: learning rate of B as a multiple of A's (LoRA+, arXiv 2402.12354); null is 1.
        dora: learn the length of each weight column apart and let LoRA change its direction (DoRA, arXiv 2402.09353):
            y = m (W + (alpha / r) B A) x / |W + (alpha / r) B A|, m = |W| at first; the norm is over each output's row.
        name: of the adapter, where several share one tower.
    """

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        r: Width = 16,
        alpha: Width = 32,
        dropout: Drop = 0.0,
        targets: Text | Names = "all-linear",
        lr: NotNegative | None = None,
        rslora: bool = False,
        pissa: bool = False,
        lr_ratio: Positive | None = None,
        dora: bool = False,
        name: Text = "default",
    ) -> None:
        if r < 1:
            raise UserError(f"adapter.r={r} is not a rank; give a whole number of at least 1.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.lr_ratio = lr_ratio
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.rslora, self.dora = rslora, dora
        self.alone = pissa
        self.targets = targets if isinstance(targets, str) else list(targets)

    def wrap(self, part: nn.Module) -> nn.Module:
        """The tower with its linear layers wrapped in place; equal to the tower before the first update (B = 0)."""
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights="pissa" if self.alone else True,
        )
        return inject(config, part, self.name)

    def ratios(self, part: nn.Module) -> dict[nn.Parameter, float]:
        """Every B with LoRA+'s ratio."""
        if self.lr_ratio is None:
            return {}
        held = (layer.lora_B for _, layer in layers(part) if isinstance(layer, LoraLayer))
        return {p: self.lr_ratio for b in held if self.name in b for p in b[self.name].parameters()}
