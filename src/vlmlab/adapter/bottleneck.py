"""``bottleneck``: a small residual network after the sublayers of a tower (arXiv 1902.00751, 2005.00247)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlmlab.adapter.base import Layer, check_name, insert
from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import Names, NotNegative, Text, Width, Wrapped


class BottleneckAdapter(Adapter):
    """h <- h + W_up act(W_down LN(h)) on the output of a sublayer, before it joins the residual stream.

    After attention and FFN it is Houlsby's (arXiv 1902.00751, section 2), after the FFN alone Pfeiffer's
    (arXiv 2005.00247, section 3); the norm in front is a key of its own.

    Args:
        parts: what to wrap, of ``lm``, ``encoder``, ``connector`` and ``fusion``.
        width: of the bottleneck.
        targets: ends of the names of the output projections; names that a tower lacks are passed over.
        norm: LayerNorm before W_down.
        activation: by transformers' name.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        name: of the adapter, where several share one tower.
    """

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        width: Width = 16,
        targets: Text | Names = ("o_proj", "down_proj"),
        norm: bool = True,
        activation: Text = "gelu",
        lr: NotNegative | None = None,
        name: Text = "default",
    ) -> None:
        if activation not in ACT2FN:
            raise UserError(f"adapter.activation={activation} is unknown; use one of {listed(sorted(ACT2FN))}.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.width, self.norm, self.activation = width, norm, activation
        self.targets = targets

    def wrap(self, part: nn.Module) -> nn.Module:
        """The tower with its output projections wrapped in place; equal to it before the first update (W_up = 0)."""

        def new(base: nn.Module) -> nn.Module:
            if not isinstance(base, nn.Linear):
                raise UserError(f"adapter.targets names a {type(base).__name__}; name linear layers.")
            return Bottleneck(base.out_features, self.width, self.norm, self.activation)

        return insert(part, self.targets, self.name, BottleneckLayer, new)


class Bottleneck(nn.Module):
    """The residual branch. Parameters: 2 D W + W + D, and 2 D with the norm."""

    def __init__(self, features: int, width: int, norm: bool, activation: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features) if norm else nn.Identity()
        self.down = nn.Linear(features, width)
        self.act: nn.Module = ACT2FN[activation]
        self.up = nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        wide = hidden.to(self.up.weight.dtype)
        return self.up(self.act(self.down(self.norm(wide)))).to(hidden.dtype)


class BottleneckLayer(Layer):
    """An output projection and what comes after it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The projection's output with the branch added."""
        hidden: Tensor = self.base_layer(x, *args, **kwargs)  # (..., D)
        return hidden if self.acting is None else hidden + self.acting(hidden)
