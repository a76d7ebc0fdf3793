"""``comp_lora``: LoRA that leaves each weight's strongest singular directions alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.adapter.base import Layer, check_name, insert
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import Drop, Names, Natural, NotNegative, Text, Width, Wrapped


class CompLoraAdapter(Adapter):
    """dW = (alpha / r) (I - U_k U_k^T) B A (I - V_k V_k^T), with W = U S V^T: the update lives in the complement.

    What the tower knows best stays as it is. k = 0 is ordinary LoRA (arXiv 2106.09685). U_k and V_k belong to the
    weights at the time of wrapping and are saved with the adapter. A layer of rank at most k has no complement and is
    left as it is.

    Args:
        parts: what to wrap, of ``lm``, ``encoder``, ``connector`` and ``fusion``.
        r: rank of the update.
        k: protected directions.
        alpha: scale; the update is alpha / r times B A.
        dropout: on the adapter's input.
        targets: ends of the names of linear layers, or "all-linear": every one but the LM head.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        name: of the adapter, where several share one tower.
    """

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        r: Width = 4,
        k: Natural = 16,
        alpha: Width = 8,
        dropout: Drop = 0.0,
        targets: Text | Names = "all-linear",
        lr: NotNegative | None = None,
        name: Text = "default",
    ) -> None:
        if r < 1 or k < 0:
            raise UserError(f"adapter.r={r}, adapter.k={k} is not possible; give r of at least 1 and k of at least 0.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.r, self.k, self.alpha, self.dropout = r, k, alpha, dropout
        self.targets = targets

    def wrap(self, part: nn.Module) -> nn.Module:
        """The tower with its linear layers wrapped in place; equal to the tower before the first update (B = 0)."""

        def new(base: nn.Module) -> nn.Module | None:
            if not isinstance(base, nn.Linear):
                raise UserError(f"adapter.targets names a {type(base).__name__}; name linear layers.")
            if min(base.weight.shape) <= self.k:
                return None
            return CompLora(base.weight, self.r, self.k, self.alpha / self.r, self.dropout)

        return insert(part, self.targets, self.name, CompLoraLayer, new)


class CompLora(nn.Module):
    """The update of one weight (O, I). Parameters: r (O + I)."""

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor, r: int, k: int, scale: float, dropout: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        u, _, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        self.register_buffer("left", u[:, :k].contiguous())  # (O, k), in memory as what a file gives
        self.register_buffer("right", vh[:k].T.contiguous())  # (I, k)
        self.dropout = nn.Dropout(dropout)
        self.a = nn.Linear(columns, r, bias=False)
        self.b = nn.Linear(r, rows, bias=False)
        self.scale = scale
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))  # as in LoRA's code
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        wide = self.dropout(x.to(self.a.weight.dtype))
        update = self.b(self.a(_beside(wide, self.right)))
        return (self.scale * _beside(update, self.left)).to(x.dtype)

    def weight(self) -> Tensor:
        """The update of the weight, dW (O, I)."""
        return self.scale * _beside(self.b.weight.T, self.left).T @ _beside(self.a.weight, self.right)


def _beside(x: Tensor, directions: Tensor) -> Tensor:
    """(..., F) without its share in orthonormal directions (F, k)."""
    return x - (x @ directions.to(x.dtype)) @ directions.to(x.dtype).T


class CompLoraLayer(Layer):
    """A linear layer and its update."""

    base_layer: nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the update's."""
        out: Tensor = self.base_layer(x, *args, **kwargs)  # (..., O)
        return out if self.acting is None else out + self.acting(x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- W + dW of the adapter that acts."""
        if self.acting is not None:
            self.base_layer.weight.data += self.acting.weight().to(self.base_layer.weight.dtype)
            self.merged_adapters = list(self.active_adapters)

    def unmerge(self) -> None:
        """The weight as it was, up to rounding."""
        names, self.merged_adapters = self.merged_adapters, []
        for name in names:
            self.base_layer.weight.data -= self.adapters[name].weight().to(self.base_layer.weight.dtype)  # type: ignore[operator]
