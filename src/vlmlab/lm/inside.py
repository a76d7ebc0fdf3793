"""The ports into a language model's layers: where the blocks of a fusion act, and how what they read gets there.

transformers recomputes a layer's ``forward`` under activation checkpointing, and nothing around it. So what blocks read
travels as the keyword argument `inside` of the layers' ``forward``: a layer with ports takes it, lends it to its norms
and linear maps for the time of the call (they get no keywords in any family) and leaves it out of what it hands on.
A layer gets its ports as torch's ``fully_shard`` gives it shards, by a subclass of its own class: the names of weights
stay, and without blocks, or without `inside`, it computes what it computed before.

The weights of blocks belong to ``model.fusion``; a port holds a plain reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vlmlab.contracts.errors import UserError, reason
from vlmlab.contracts.tensors import Layout, Memory

Block = Callable[..., Tensor]


@dataclass(frozen=True)
class Inside:
    """What travels to the layers; Q are the positions that they compute in this call.

    Attributes:
        layout: (B, Q) what these positions are.
        memories: what blocks read, by the key that they were put with; `sees` is (B, Q, I).
        with_image: (B, Q) bool: positions whose packed sample has an image.
    """

    layout: Layout
    memories: dict[str, Memory]
    with_image: Tensor

    def at(self, positions: Tensor) -> Inside:
        """For some positions (Q,) of the rows; those behind the last are generated: text of the row's last sample."""
        last = self.layout.kind.shape[1] - 1
        known = positions.clamp(max=last)
        layout = self.layout.extended(int(positions[-1]) + 1).at(positions)
        return Inside(layout, self._seeing(lambda t: t[:, known], lambda t: t), self.with_image[:, known])

    def repeated(self, times: int) -> Inside:
        """Every row `times` times in a row, as beams and several answers to one prompt stand."""
        return self.of(torch.arange(len(self.with_image), device=self.with_image.device).repeat_interleave(times))

    def of(self, rows: Tensor) -> Inside:
        """For some rows (R,), in the given order; they may repeat."""
        memories = self._seeing(lambda t: t[rows], lambda t: t[rows])
        return Inside(self.layout.select(rows), memories, self.with_image[rows])

    def _seeing(self, sees: Callable[[Tensor], Tensor], slots: Callable[[Tensor], Tensor]) -> dict[str, Memory]:
        """The memories with other `sees` and `slots`, made once for all blocks that share them."""
        once: dict[int, Tensor] = {}
        for memory in self.memories.values():
            if id(memory.sees) not in once:
                once |= {id(memory.sees): sees(memory.sees), id(memory.slots): slots(memory.slots)}
        return {k: replace(m, sees=once[id(m.sees)], slots=once[id(m.slots)]) for k, m in self.memories.items()}


# -- the families ------------------------------------------------------------------------------------------------------

LLAMA = {
    "norm.attention": "input_layernorm",
    "norm.mlp": "post_attention_layernorm",
    "linear.q": "self_attn.q_proj",
    "linear.k": "self_attn.k_proj",
    "linear.v": "self_attn.v_proj",
    "linear.o": "self_attn.o_proj",
    "linear.gate": "mlp.gate_proj",
    "linear.up": "mlp.up_proj",
    "linear.down": "mlp.down_proj",
    "mlp": "mlp",
}
FOUR_NORMS = LLAMA | {
    "norm.attention_out": "post_attention_layernorm",
    "norm.mlp": "pre_feedforward_layernorm",
    "norm.mlp_out": "post_feedforward_layernorm",
}
JOINED = {
    "norm.attention": "input_layernorm",
    "norm.mlp": "post_attention_layernorm",
    "linear.qkv": "self_attn.qkv_proj",
    "linear.o": "self_attn.o_proj",
    "linear.gate_up": "mlp.gate_up_proj",
    "linear.down": "mlp.down_proj",
    "mlp": "mlp",
}
FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), FOUR_NORMS),
    "phi3": JOINED,
}
"""Model type in transformers -> port -> module of a layer; SmolLM and SmolLM2 are of the type llama."""


# -- opening -----------------------------------------------------------------------------------------------------------


def open_ports(model: PreTrainedModel) -> list[LayerPorts]:
    """The ports of every decoder layer, made at the first call and the same ones at every later call.

    Args:
        model: a causal LM, its modules wrapped by adapters or not.

    Raises:
        UserError: its family is not one of those whose layers are known, or its layers are built otherwise.
    """
    family = str(model.config.model_type)
    known = FAMILIES.get(family)
    layers: Any = getattr(model.base_model, "layers", None)
    if known is None or layers is None:
        raise UserError(
            f"lm: nothing can act inside the layers of the family {family}; known are {', '.join(FAMILIES)}; use "
            "fusion=concat and another adapter than mma, or another lm."
        )
    return [_ports_of(layer, known, family) for layer in layers]


def has_ports(model: PreTrainedModel) -> bool:
    """Whether ``open_ports`` was called for this model, so that its layers take `inside`."""
    layers: Any = getattr(model.base_model, "layers", ())
    return any(isinstance(layer, PortedLayer) for layer in layers)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules among what fusions have put at the ports, each once, from the first layer to the last."""
    layers: Any = getattr(model.base_model, "layers", ())
    found = (block for layer in layers if isinstance(layer, PortedLayer) for block in layer.ports.blocks())
    return list({id(block): block for block in found if isinstance(block, nn.Module)}.values())


def _ports_of(layer: nn.Module, known: dict[str, str], family: str) -> LayerPorts:
    if isinstance(layer, PortedLayer):
        return layer.ports
    try:
        for path in known.values():
            _standing(layer, path)
    except AttributeError as error:
        raise UserError(f"lm: a layer of this {family} is not built as that family's are ({reason(error)}).") from error
    ports = LayerPorts(layer, known)
    layer.__class__ = _with_ports(layer, PortedLayer)
    layer.ports = ports  # type: ignore[assignment]
    return ports


def _standing(layer: nn.Module, path: str) -> list[nn.Module]:
    """The module of a layer that is called at a path, inside its adapters; and the copies by which one replaces it."""
    module: Any = layer
    copies: list[nn.Module] = []
    for name in path.split("."):
        module = getattr(module, name)
        while isinstance(module, BaseTunerLayer):
            wrapper: Any = module
            copies += wrapper.ln_tuning_layers.values() if isinstance(wrapper, LNTuningLayer) else ()
            module = wrapper.base_layer
    return [module, *copies]


def _with_ports(module: nn.Module, ported: type) -> Any:
    """The subclass with ports of a layer's or a module's class."""
    kind: Any = type(module)
    return _subclass(kind, ported)


@cache
def _subclass(kind: type, ported: type) -> type:
    """One for all instances of a kind, so that one graph serves them."""
    return type(f"Ported{kind.__name__}", (ported, kind), {"__module__": __name__})


@dataclass(frozen=True)
class Lent:
    """What a layer lends to what is in it, while it computes.

    Attributes:
        layout: (B, Q) what its positions are.
        with_image: (B, Q) bool: positions whose packed sample has an image.
        memories: port -> what each block there reads, in their order; None where this batch has nothing for it.
    """

    layout: Layout
    with_image: Tensor
    memories: dict[str, list[Memory | None]]


class LayerPorts:
    """The ports of one layer.

    Attributes:
        layer: the decoder layer.
        paths: port -> the norm or linear map that it is at.
        sites: port -> what stands there.
        now: what the layer lends, while it computes.
    """

    def __init__(self, layer: nn.Module, paths: dict[str, str]) -> None:
        self.layer = layer
        self.paths = paths
        self.sites = {where: Site(self, where) for where in ("before", "after")}
        self.now: Lent | None = None

    def put(self, where: str, block: Block, key: str) -> None:
        """Let a block act at a port, after those that are there.

        It is called with the keywords `layout` and `memory`, and at

            before, after    the layer's states (B, Q, D), and gives the states that take their place;
            norm.*           the norm's input, the same normalised without scale and shift, and its output, all
                             (B, Q, D), and gives the output that takes its place;
            linear.*         the map's input (B, Q, Din) and output (B, Q, Dout), and gives the output;
            mlp              the same of the whole feed-forward network.

        Args:
            where: name of the port.
            block: of the fusion, which keeps its weights.
            key: of the memory that it reads; the block is passed over where the batch has none of that key.

        Raises:
            UserError: the family has no such port.
        """
        if where in self.paths:
            site = self.sites.setdefault(where, Site(self, where))
            for module in _standing(self.layer, self.paths[where]):
                if not isinstance(module, Ported):
                    module.__class__ = _with_ports(module, PortedNorm if where.startswith("norm") else PortedMap)
                    module.site = site  # type: ignore[assignment]
        elif where not in self.sites:
            names = ", ".join(["before", "after", *self.paths])
            raise UserError(f"lm: this family has no port {where}; choose from {names}.")
        self.sites[where].blocks.append((key, block))

    def module(self, where: str) -> Any:
        """The norm, linear map or feed-forward network at a port, inside its adapters.

        Raises:
            UserError: the family has no such port.
        """
        if where not in self.paths:
            raise UserError(f"lm: this family has no port {where}; choose from {', '.join(self.paths)}.")
        return _standing(self.layer, self.paths[where])[0]

    def blocks(self) -> Iterator[Block]:
        """All blocks that stand at the ports."""
        return (block for site in self.sites.values() for _, block in site.blocks)

    def lent(self, inside: Inside | None) -> Lent | None:
        """What of this call is for this layer's blocks.

        Every layer finds its memories by other keys. So this is done before what is compiled, which gets them by place
        and is one graph for all layers.
        """
        if inside is None:
            return None
        found = {where: [inside.memories.get(key) for key, _ in site.blocks] for where, site in self.sites.items()}
        return Lent(inside.layout, inside.with_image, found)


class Site:
    """The blocks at one port.

    An adapter may copy the module that it stands at; the copy belongs to the same layer and has the same blocks.
    """

    def __init__(self, ports: LayerPorts, where: str) -> None:
        self.ports = ports
        self.where = where
        self.blocks: list[tuple[str, Block]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        if id(self.ports.layer) not in memo:  # that module alone is being copied, not the layer
            return self
        twin = memo[id(self)] = Site.__new__(Site)
        twin.where = self.where
        twin.ports = copy.deepcopy(self.ports, memo)
        twin.blocks = copy.deepcopy(self.blocks, memo)
        return twin

    def change(self, out: Tensor, *given: Tensor) -> Tensor:
        """What a layer, norm or linear map gave, as the blocks that have a memory in this call change it."""
        now = self.ports.now
        if now is not None:
            for (_, block), memory in zip(self.blocks, now.memories[self.where], strict=True):
                if memory is not None:
                    out = block(*given, out, layout=now.layout, memory=memory)
        return out


class PortedLayer(nn.Module):
    """A decoder layer with ports."""

    ports: LayerPorts

    def forward(self, hidden_states: Tensor, *args: Any, inside: Inside | None = None, **kwargs: Any) -> Any:
        """The layer's own, with its blocks."""
        return self.compute(hidden_states, *args, lent=self.ports.lent(inside), **kwargs)

    def compute(self, hidden_states: Tensor, *args: Any, lent: Lent | None, **kwargs: Any) -> Any:
        """The same for what it lends; what ``torch.compile`` is to be given."""
        ports = self.ports
        ports.now = lent
        try:  # recomputation leaves by an exception as soon as it has what it needs
            hidden_states = ports.sites["before"].change(hidden_states)
            out = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            return ports.sites["after"].change(out)
        finally:
            ports.now = None


class Ported(nn.Module):
    """A module of a layer with blocks at it."""

    site: Site


class PortedNorm(Ported):
    """A norm with blocks at it."""

    def forward(self, states: Tensor) -> Tensor:
        """The norm's own output, as its blocks change it."""
        out: Tensor = super().forward(states)  # type: ignore[misc]
        return out if self.site.ports.now is None else self.site.change(out, states, normalised(self, states))


class PortedMap(Ported):
    """A linear map, or a feed-forward network, with blocks at it."""

    def forward(self, x: Tensor) -> Tensor:
        """The map's own output, as its blocks change it."""
        out: Tensor = super().forward(x)  # type: ignore[misc]
        return self.site.change(out, x)


def normalised(norm: nn.Module, states: Tensor) -> Tensor:
    """(B, Q, D) as the norm sees them before its scale and shift; in float32 on the way, as all families do."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(states, norm.normalized_shape, eps=norm.eps)
    eps: Any = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    wide = states.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(states.dtype)


# -- generation --------------------------------------------------------------------------------------------------------


@contextmanager
def generating_inside(model: PreTrainedModel, inside: Inside | None) -> Iterator[None]:
    """While this is open, every step of ``generate()``, which refuses unknown keywords, gives the layers their part.

    Args:
        model: the LM.
        inside: of the left-padded prompts; None: nothing is given.
    """
    if inside is None:
        yield
        return

    def announce(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = next(v for v in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if v is not None)
        past = kwargs.get("past_key_values")
        start = 0 if past is None else int(past.get_seq_length())
        step = inside.at(torch.arange(start, start + given.shape[1], device=given.device))
        times = len(given) // len(inside.with_image)
        return args, {**kwargs, "inside": step if times == 1 else step.repeated(times)}

    handle = model.base_model.register_forward_pre_hook(announce, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# -- what blocks share -------------------------------------------------------------------------------------------------


def look(q: Tensor, keys: Tensor, values: Tensor, memory: Memory, scale: float | None = None) -> Tensor:
    """Attention of positions over the tokens of the images that they see.

    Exactly 0 where a position sees none. An image that a position does not see changes no bit of its result, and
    without any image all weights still have a gradient, of zeros, so that ranks which share weights stay together.

    Args:
        q: (B, Q, H, dh).
        keys: (I, N, H, dh) of every image.
        values: (I, N, H, dh).
        memory: who sees which image.
        scale: of the scores; None is 1 / sqrt(dh).

    Returns:
        (B, Q, H * dh).
    """
    if memory.slots.shape[1] == 0:
        return q.flatten(2) * 0.0 + 0.0 * (keys.sum() + values.sum())
    sees, index = seen_in_row(memory)  # (B, Q, J), (B, J)
    any_image = sees.any(-1, keepdim=True)  # (B, Q, 1)
    allowed = (sees | ~any_image).repeat_interleave(keys.shape[1], -1)  # (B, Q, J * N); a softmax needs a key
    k, v = (x[index].flatten(1, 2).transpose(1, 2) for x in (keys, values))  # (B, H, J * N, dh)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=allowed[:, None], scale=scale)
    return torch.where(any_image, out.transpose(1, 2).flatten(2), 0.0)  # (B, Q, H * dh)


def seen_in_row(memory: Memory) -> tuple[Tensor, Tensor]:
    """For each position the images of its own row: which it sees (B, Q, J) bool, and their indices (B, J).

    A slot behind a row's last image has index 0 and is seen by nobody.
    """
    index = memory.slots.clamp(min=0)
    sees = memory.sees.gather(2, index[:, None].expand(-1, memory.sees.shape[1], -1))
    return sees & (memory.slots >= 0)[:, None], index
