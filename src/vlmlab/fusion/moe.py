"""``moe``: feed-forward networks of the LM become experts, a few for every token (MoE-LLaVA, arXiv 2401.15947)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Layers, Positive, Width
from vlmlab.fusion.base import InSequence, beside, check_counts, chosen_layers
from vlmlab.lm.inside import copied, open_ports

LEAST = 4
"""Tokens that an expert takes under a capacity, however few there are (the released code's)."""


class MixtureOfExperts(InSequence):
    """y = sum over the k likeliest experts i of p_i E_i(x), p = softmax(W x), in place of the network of some layers.

    As in MoE-LLaVA (arXiv 2401.15947 and its code) visual tokens are in the sequence, all tokens are routed, and the
    experts start as copies of the network, so that the composition starts as ``concat``, up to rounding: each token's
    p_i are divided by their sum, as the library beneath the released code does. At step 0 the router has no gradient,
    since all experts say the same; from step 1 it has, as long as each expert gets a token. The loss that balances the
    experts is an objective (``objective=balance``), which reads p from what every block notes.

    Experts are copies of the network as the LM was loaded. The paper tunes the whole LM before it makes them: train
    that run first, export it, and give the folder as the LM of the second (``lm.path``). The network itself is not
    computed any more and never trains; its weights stay in the LM's files.

    No token is dropped unless `capacity` says so, and then in training alone: an expert takes the first
    max(4, ceil(capacity k T / E)) of T tokens, first choices before second ones, and what it leaves adds nothing. That
    makes a sample depend on those beside it.

    Tokens are sorted by expert. So equal numbers are equal up to rounding where another token joins or leaves an
    expert, and compiled layers have a break there.

    Parameters per layer: E times the network's, and E D.

    Args:
        experts: E.
        top: k.
        every: the last layer of every group of so many; 2 is the paper's.
        layers: indices of the layers instead; null takes `every`.
        capacity: null drops nothing; the paper's is 1.5.

    Raises:
        UserError: a count below 1, or `top` above `experts`; from ``attach``: a layer that does not exist.
    """

    starts_as = "concat"
    waiting = ("router.weight",)
    has_experts = True
    regroups = True

    def __init__(
        self,
        experts: Width = 4,
        top: Width = 2,
        every: Width = 2,
        layers: Layers | None = None,
        capacity: Positive | None = None,
    ) -> None:
        super().__init__()
        check_counts(experts=experts, top=top)
        if top > experts:
            raise UserError(f"fusion.top={top} is more than fusion.experts={experts}; give at most that many.")
        self.experts, self.top = experts, top
        self.every, self.layers = every, layers
        self.capacity = capacity

    def attach(self, model: VisionLanguageModel) -> None:
        """Copy the networks, and put the copies in their places."""
        super().attach(model)
        ports = open_ports(model.lm.model)
        chosen = self.places = [ports[layer] for layer in chosen_layers(len(ports), self.every, self.layers)]
        self.blocks = nn.ModuleList(
            Experts(each.module("mlp"), model.lm.width, self.experts, self.top, self.capacity) for each in chosen
        )
        for k, (each, block) in enumerate(zip(chosen, self._experts(), strict=True)):
            each.put("mlp", block, f"{self.key}.{k}", instead=True)

    def _experts(self) -> list[Experts]:
        return [block for block in self.blocks if isinstance(block, Experts)]

    def replaced(self) -> Sequence[nn.Module]:
        """The networks that the experts stand for."""
        return [ports.module("mlp") for ports in self.places]

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """Nothing but a place for what each block notes."""
        memory = beside(batch)
        return {f"{self.key}.{k}": replace(memory, notes={}) for k in range(len(self.blocks))}


class Experts(nn.Module):
    """A block instead of a feed-forward network.

    Args:
        network: what every expert is at first.
        width: D.
        experts: E.
        top: k.
        capacity: of an expert in training, as a multiple of its even share; None: any number.
    """

    def __init__(self, network: nn.Module, width: int, experts: int, top: int, capacity: float | None) -> None:
        super().__init__()
        self.top, self.capacity = top, capacity
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(copied(network) for _ in range(experts))

    def forward(self, x: Tensor, out: Tensor | None, *, layout: Layout, memory: Memory) -> Tensor:
        """(B, Q, D) -> (B, Q, D); notes p (B, Q, E) as "router"."""
        flat = x.flatten(0, 1)  # (T, D)
        p = self.router(flat).softmax(-1, dtype=torch.promote_types(flat.dtype, torch.float32))  # (T, E)
        memory.notes["router"] = p.unflatten(0, x.shape[:2])
        weight, chosen = p.topk(self.top)  # (T, k) both
        if self.training and self.capacity is not None:
            weight = weight * kept(chosen, layout.valid.flatten(), len(self.experts), self.capacity)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        told = self._told(flat, chosen)  # (T, k, D)
        return (weight[..., None].to(told.dtype) * told).sum(1).unflatten(0, x.shape[:2])

    def _told(self, flat: Tensor, chosen: Tensor) -> Tensor:
        """What its chosen experts (T, k) say of each token (T, D): (T, k, D)."""
        order = chosen.flatten().argsort(stable=True)  # (T * k,) by expert
        counts = F.one_hot(chosen.flatten(), len(self.experts)).sum(0)  # (E,)
        parts = flat[order // self.top].split(_sizes(counts, len(order)))
        said = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])  # (T * k, D)
        return said[order.argsort()].unflatten(0, chosen.shape)


def kept(chosen: Tensor, valid: Tensor, experts: int, capacity: float) -> Tensor:
    """(T, k) bool: which choices (T, k) find a place with their expert; padding, where `valid` (T,) is false, none."""
    asked = F.one_hot(chosen.T, experts) * valid[:, None]  # (k, T, E) first choices are before second ones
    place = (asked.flatten(0, 1).cumsum(0) - 1).unflatten(0, asked.shape[:2])  # (k, T, E)
    own = place.gather(2, chosen.T[..., None])[..., 0].T  # (T, k)
    most = (capacity * chosen.shape[1] * valid.sum() / experts).ceil().clamp(min=LEAST)
    return (own < most) & valid[:, None]


def _sizes(counts: Tensor, total: int) -> Sequence[int]:
    """Tokens of every expert. A plan has no values; it shares them evenly, since their sum is what they cost."""
    if isinstance(counts, FakeTensor):
        share, more = divmod(total, len(counts))
        return [share + (k < more) for k in range(len(counts))]
    found: list[int] = counts.tolist()
    return found
