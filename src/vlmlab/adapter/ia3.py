"""``ia3``: learnt factors on keys, values and the hidden layer of the FFN (arXiv 2205.05638), by peft."""

from __future__ import annotations

from peft import IA3Config
from torch import nn

from vlmlab.adapter.base import check_name, inject
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import Names, NotNegative, Text, Wrapped


class Ia3Adapter(Adapter):
    """peft's IA3 on each named tower: one vector for each target, all ones at first.

    Args:
        parts: what to wrap, of ``lm``, ``encoder``, ``connector`` and ``fusion``.
        targets: ends of the names of the linear layers; names that a tower lacks are passed over.
        feedforward: those of them whose input is scaled instead of their output.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        name: of the adapter, where several share one tower.
    """

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        targets: Names = ("k_proj", "v_proj", "down_proj"),
        feedforward: Names = ("down_proj",),
        lr: NotNegative | None = None,
        name: Text = "default",
    ) -> None:
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.targets, self.feedforward = list(targets), list(feedforward)

    def wrap(self, part: nn.Module) -> nn.Module:
        """The tower with the targets wrapped in place; equal to the tower before the first update."""
        config = IA3Config(
            target_modules=[*self.targets, *self.feedforward],
            feedforward_modules=self.feedforward,
        )
        return inject(config, part, self.name)
