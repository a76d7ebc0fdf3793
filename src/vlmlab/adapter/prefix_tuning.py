"""``prefix_tuning``: learnt keys and values before those of the text in the LM's layers (arXiv 2101.00190)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmlab.adapter.base import Layer, check_name, insert
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import NotNegative, Text, Width, Wrapped
from vlmlab.lm.inside import ATTENTION, Attend, before_the_keys, open_ports

Gate = Literal["none", "zero"]
STD = 0.02


class PrefixTuningAdapter(Adapter):
    """Every layer's attention also reads `length` learnt keys and values; what else the LM computes stays.

    With ``gate=none`` they share one softmax with the text's own keys (arXiv 2101.00190, section 4), so that the LM
    starts as nothing else: keys that say nothing take their share all the same. With ``gate=zero`` they have a softmax
    of their own, whose result is added times tanh(g), g a number a head that starts at zero (LLaMA-Adapter,
    arXiv 2303.16199, section 3.2), and the LM starts as it was; then g alone has a gradient in the first step. For keys
    and values that are made from an image see ``fusion=prefix``.

    Every position sees all of them, whatever mask or window the text has. They are not rotated, and the text's
    positions stay as they are; peft counts the prefix's places before them. The paper's network that makes them all
    from smaller vectors while they train is left out.

    Parameters per layer: 2 P G dh, G being the heads of keys, and the number of heads with ``gate=zero``.

    Args:
        parts: ``lm`` alone.
        length: keys P of a layer.
        gate: "none" or "zero".
        lr: learning rate of the adapter wherever a stage trains the LM; null takes the stage's.
        name: of the adapter, where several share one LM.

    Raises:
        UserError: another part than the LM, or an unknown gate.
    """

    lm_only = True

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        length: Width = 8,
        gate: Gate = "none",
        lr: NotNegative | None = None,
        name: Text = "default",
    ) -> None:
        if tuple(parts) != ("lm",):
            raise UserError(f"adapter.parts={list(parts)}: prefixes go into the LM's attention; set it to [lm].")
        if gate not in ("none", "zero"):
            raise UserError(f"adapter.gate={gate} is unknown; choose none or zero.")
        if length < 1:
            raise UserError(f"adapter.length={length} leaves no key; give at least 1.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.length, self.gate = length, gate
        self.starts_equal = gate == "zero"

    def wrap(self, part: Any) -> nn.Module:
        """The LM with its attention modules wrapped in place; equal to it before the first update with ``gate=zero``.

        Raises:
            UserError: it is of a family without ports, or a fusion leaves out queries of its attention.
        """
        opened, config = open_ports(part), part.config
        heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads)
        head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)

        def new(base: nn.Module) -> nn.Module:
            return Prefix(self.length, groups, head, heads if self.gate == "zero" else 0)

        insert(part, [ATTENTION], self.name, PrefixLayer, new)
        for ports in opened:
            for module in ports.layer.modules():
                if isinstance(module, PrefixLayer):
                    ports.adapt_attention(module.around)
        return part


class Prefix(nn.Module):
    """Keys and values (G, P, dh) of one layer, and its gates (H,) where it has any."""

    def __init__(self, length: int, groups: int, head: int, gates: int) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(groups, length, head) * STD) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(gates)) if gates else None

    def forward(
        self, attend: Attend, scale: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention with them: queries (B, H, Q, dh), keys and values (B, G, K, dh) -> (B, Q, H, dh)."""
        keys, values = (part.to(key.dtype).expand(len(key), -1, -1, -1) for part in (self.keys, self.values))
        if self.gate is None:
            seen = torch.ones(len(query), 1, query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device)
            return before_the_keys(attend, query, key, value, mask, keys, values, seen)
        keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
        told = (scale * query @ keys.mT).softmax(-1, dtype=torch.float32).to(values.dtype) @ values  # (B, H, Q, dh)
        return attend(query, key, value, mask) + self.gate.tanh()[:, None].to(told.dtype) * told.transpose(1, 2)


class PrefixLayer(Layer):
    """An attention module with prefixes, of which at most one acts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's outputs."""
        return self.base_layer(*args, **kwargs)

    def around(self, attend: Attend, scale: float) -> Attend:
        """The attention's inner function with the prefix that acts."""
        return attend if self.acting is None else partial(self.acting, attend, scale)
