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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlmlab.contracts.errors import UserError, reason
from vlmlab.contracts.tensors import Layout, Memory, Split
from vlmlab.contracts.watch import Watch

Block = Callable[..., Tensor]
Change = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Queries (B, H, Q, dh), keys and values (B, G, K, dh), who sees whom or None (causal) -> (B, Q, H, dh)."""


@dataclass(frozen=True)
class Inside:
    """What travels to the layers; Q are the positions that they compute in this call.

    Attributes:
        layout: (B, Q) what these positions are.
        memories: what blocks read, by the key that they were put with; `sees` is (B, Q, I).
        with_image: (B, Q) bool: positions whose packed sample has an image.
        start: how many positions are before these, in a cache.
        before: (B, start + Q) what those are and these; None where none are before.
    """

    layout: Layout
    memories: dict[str, Memory]
    with_image: Tensor
    start: int = 0
    before: Layout | None = None

    def at(self, positions: Tensor) -> Inside:
        """For some positions (Q,) of the rows; those after the last are generated: text of the row's last sample."""
        last = self.layout.kind.shape[1] - 1
        known = positions.clamp(max=last)
        start, end = int(positions[0]), int(positions[-1]) + 1
        layout = self.layout.extended(end)
        memories = self.changed(lambda t: t[:, known], lambda t: t, lambda t: t[:, known] & (positions <= last))
        before = layout.at(torch.arange(end, device=positions.device)) if start else None
        return Inside(layout.at(positions), memories, self.with_image[:, known], start, before)

    def repeated(self, times: int) -> Inside:
        """Every row `times` times in a row, in the order of beams and of several answers to one prompt."""
        return self.of(torch.arange(len(self.with_image), device=self.with_image.device).repeat_interleave(times))

    def of(self, rows: Tensor) -> Inside:
        """For some rows (R,), in the given order; they may repeat."""
        memories = self.changed(*[lambda t: t[rows]] * 3)
        before = None if self.before is None else self.before.select(rows)
        return Inside(self.layout.select(rows), memories, self.with_image[rows], self.start, before)

    def changed(self, sees: Change, slots: Change, own: Change) -> dict[str, Memory]:
        """The memories with other `sees`, `slots` and ``split.own``, made once for all blocks that share them."""
        once: dict[int, Any] = {id(None): None}
        for memory in self.memories.values():
            if id(memory.sees) not in once:
                once |= {id(memory.sees): sees(memory.sees), id(memory.slots): slots(memory.slots)}
            if memory.split is not None and id(memory.split) not in once:
                once[id(memory.split)] = Split.of(own(memory.split.own))
        return {
            key: replace(m, sees=once[id(m.sees)], slots=once[id(m.slots)], split=once[id(m.split)])
            for key, m in self.memories.items()
        }


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
ATTENTION = "self_attn"
"""The module of a layer that calls the attention function, in all families."""
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


def exchange(model: PreTrainedModel, new: Mapping[nn.Module, nn.Module]) -> None:
    """Let other modules be at the ports in the place of those that fusions have put there, as around them.

    Args:
        model: the LM; nothing is done where it has no ports.
        new: old module -> new module.
    """
    layers: Any = getattr(model.base_model, "layers", ())
    for site in (site for layer in layers if isinstance(layer, PortedLayer) for site in layer.ports.sites.values()):
        site.blocks = [_instead(block, new) for block in site.blocks]
        site.map = None if site.map is None else _instead(site.map, new)


def _instead(block: Any, new: Mapping[nn.Module, nn.Module]) -> Any:
    return new.get(block, block) if isinstance(block, nn.Module) else block


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
class LayerContext:
    """What a layer lends to what is in it, while it computes.

    Attributes:
        layout: (B, Q) what its positions are.
        with_image: (B, Q) bool: positions whose packed sample has an image.
        memories: port -> what each block there reads, in their order; None where this batch has nothing for it.
        splits: port -> which positions are taken over there; None where nothing takes any in this batch.
        before: (B, K) what its keys are, from the row's first position on.
        start: how many positions are before these, in a cache.
    """

    layout: Layout
    with_image: Tensor
    memories: dict[str, list[Memory | None]]
    splits: dict[str, Split | None]
    start: int
    before: Layout


class LayerPorts:
    """The ports of one layer.

    Attributes:
        layer: the decoder layer.
        paths: port -> the norm or linear map that it is at.
        sites: port -> what is there.
        now: what the layer lends, while it computes.
    """

    def __init__(self, layer: nn.Module, paths: dict[str, str]) -> None:
        self.layer = layer
        self.paths = paths
        self.sites = {where: Site(self, where) for where in ("before", "after")}
        self.now: LayerContext | None = None

    def put(self, where: str, block: Block, key: str, instead: bool = False) -> None:
        """Let a block act at a port, after those that are there; or at `mlp` instead of the network.

        It is called with the keywords `layout` and `memory`, and at

            before, after    the layer's states (B, Q, D), and gives the states that take their place;
            norm.*           the norm's input, the same normalised without scale and shift, and its output, all
                             (B, Q, D), and gives the output that takes its place;
            linear.*         the map's input (B, Q, Din) and output (B, Q, Dout), and gives the output;
            mlp              the same of the whole feed-forward network;
            attention        what gives (B, Q, H, dh) of the four tensors that follow, which are queries (B, H, Q, dh),
                             keys and values (B, G, K, dh) of all positions so far, and who sees whom, (B, 1, Q, K) bool
                             or None: causal; with the keywords `scale` of the scores and `keys`, the layout of all
                             positions so far, and gives (B, Q, H, dh). A later block wraps an earlier one.

        Args:
            where: name of the port.
            block: of the fusion, which keeps its weights.
            key: of the memory that it reads; the block is passed over where the batch has none of that key.
            instead: where the block has a memory, the network is not computed and the block gets None for its output.

        Raises:
            UserError: the family has no such port, or another fusion already replaces the network.
        """
        if where == "attention":
            where = self._attention().where
        elif where in self.paths:
            self._site(where)
        elif where not in ("before", "after"):
            names = ", ".join(["before", "after", "attention", *self.paths])
            raise UserError(f"lm: this family has no port {where}; choose from {names}.")
        site = self.sites[where]
        if instead and site.instead:
            raise UserError(f"fusion: two of several fusions replace the {where}; leave one of them out.")
        site.instead = site.instead or instead
        place = 0 if instead else len(site.blocks)
        site.blocks.insert(place, block)
        site.keys.insert(place, key)

    def module(self, where: str) -> Any:
        """The norm, linear map or feed-forward network at a port, inside its adapters.

        Raises:
            UserError: the family has no such port.
        """
        if where not in self.paths:
            raise UserError(f"lm: this family has no port {where}; choose from {', '.join(self.paths)}.")
        return _standing(self.layer, self.paths[where])[0]

    def take_over(self, where: str, map: Change, key: str) -> None:
        """Let another map compute some positions in a map's place, which then computes the others alone.

        Blocks at the same port see the output of both. An adapter around a linear map acts on all positions.

        Args:
            where: name of the port of a norm, a linear map or the feed-forward network.
            map: (V, Din) -> (V, Dout); a module of the fusion, which keeps its weights, or a function.
            key: of the memory whose `split` says which positions; nothing is taken over where the batch has none.

        Raises:
            UserError: the family has no such port, or another fusion has taken it over.
        """
        if where not in self.paths:
            raise UserError(f"lm: this family has no port {where}; choose from {', '.join(self.paths)}.")
        self._take(self._site(where), map, key)

    def skip_queries(self, key: str) -> None:
        """Do not compute what some positions look for: each of them sees itself alone, whatever the mask says.

        So its result is its own value, without a query and without scores. Keys and values of all positions stay.

        Args:
            key: of the memory whose `split` says which positions.

        Raises:
            UserError: another fusion computes these queries itself.
        """
        self._take(self._attention(), None, key)
        width = self.module("linear.o").in_features
        if "linear.q" in self.paths:
            self.take_over("linear.q", partial(nothing, width), key)
        else:
            self.take_over("linear.qkv", partial(_without_queries, self.module("linear.qkv"), width), key)

    def adapt_attention(self, around: Callable[[Attend, float], Attend]) -> None:
        """Let an adapter act around the attention, inside all blocks, also where the layer is given nothing to read.

        Args:
            around: what gives the attention's inner function and the scale of its scores -> the function in its place.

        Raises:
            UserError: a fusion does not compute some queries, and counts the layer's own keys for that.
        """
        site = self._attention()
        if site.taken_by is not None:
            raise UserError(
                "adapter: keys of its own cannot be put before a layer's where the fusion leaves out visual queries; "
                "use adapter=lora, or another fusion."
            )
        site.adapter = around

    def _take(self, site: Site, map: Change | None, key: str) -> None:
        if site.taken_by is not None:
            raise UserError(f"fusion: two of several fusions take over {site.where}; leave one of them out.")
        site.taken_by, site.map = key, map

    def _attention(self) -> Site:
        """What is at the layer's attention, whose class has ports from here on."""
        attention: Any = _standing(self.layer, ATTENTION)[0]
        site = self.sites.setdefault(ATTENTION, Site(self, ATTENTION))
        if not isinstance(attention, Ported):
            attention.__class__ = _with_ports(attention, PortedAttention)
            attention.site = site
        return site

    def _site(self, where: str) -> Site:
        """What is at a norm or map, whose class has ports from here on."""
        site = self.sites.setdefault(where, Site(self, where))
        for module in _standing(self.layer, self.paths[where]):
            if not isinstance(module, Ported):
                module.__class__ = _with_ports(module, PortedNorm if where.startswith("norm") else PortedMap)
                module.site = site  # type: ignore[assignment]
        return site

    def blocks(self) -> Iterator[Block]:
        """All blocks that are at the ports, and what takes positions over."""
        for site in self.sites.values():
            yield from site.blocks
            if site.map is not None:
                yield site.map

    def context(self, inside: Inside | None) -> LayerContext | None:
        """What of this call is for this layer's blocks.

        Every layer finds its memories by other keys. So this is done before what is compiled, which gets them by place
        and is one graph for all layers.
        """
        if inside is None:
            return None
        memories, splits = {}, {}
        for where, site in self.sites.items():
            memories[where] = [inside.memories.get(key) for key in site.keys]
            taken = None if site.taken_by is None else inside.memories.get(site.taken_by)
            splits[where] = None if taken is None else taken.split
        before = inside.layout if inside.before is None else inside.before
        return LayerContext(inside.layout, inside.with_image, memories, splits, inside.start, before)


class Site:
    """The blocks at one port.

    The keys of their memories are apart from them, since every layer may have others and one graph is for all.

    An adapter may copy the module that it is at; the copy belongs to the same layer and has the same blocks.
    """

    def __init__(self, ports: LayerPorts, where: str) -> None:
        self.ports = ports
        self.where = where
        self.blocks: list[Block] = []
        self.keys: list[str] = []  # of what each block reads
        self.instead = False  # whether the first block replaces the module
        self.taken_by: str | None = None  # the key of the memory whose split is taken over
        self.map: Change | None = None  # what computes those positions; the attention has none
        self.adapter: Callable[[Attend, float], Attend] | None = None  # around the attention

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        if id(self.ports.layer) not in memo:  # that module alone is being copied, not the layer
            return self
        twin = memo[id(self)] = Site.__new__(Site)
        twin.where, twin.instead, twin.keys, twin.taken_by = self.where, self.instead, [*self.keys], self.taken_by
        twin.ports = copy.deepcopy(self.ports, memo)
        twin.blocks = copy.deepcopy(self.blocks, memo)
        twin.map = copy.deepcopy(self.map, memo)
        twin.adapter = copy.deepcopy(self.adapter, memo)
        return twin

    @property
    def split(self) -> Split | None:
        """Which positions are taken over here in this call."""
        now = self.ports.now
        return None if now is None else now.splits[self.where]

    def compute(self, own: Change, x: Tensor) -> Tensor:
        """(B, Q, Din) -> (B, Q, Dout): what a map gives, and for some positions what takes its place."""
        split, now = self.split, self.ports.now
        if self.instead and now is not None and now.memories[self.where][0] is not None:
            return None  # type: ignore[return-value]  # for the block that is there
        if split is None:
            return own(x)
        assert self.map is not None
        flat = x.flatten(0, -2)  # (B * Q, Din)
        rest = own(flat.index_select(0, split.rest))
        here = self.map(flat.index_select(0, split.here)).to(rest.dtype)
        return torch.cat([here, rest]).index_select(0, split.back).unflatten(0, x.shape[:-1])

    def change(self, out: Tensor, *given: Tensor) -> Tensor:
        """What a layer, norm or linear map gave, as the blocks that have a memory in this call change it."""
        now = self.ports.now
        if now is not None:
            for block, memory in zip(self.blocks, now.memories[self.where], strict=True):
                if memory is not None:
                    out = block(*given, out, layout=now.layout, memory=memory)
        return out

    def around(self, plain: Attend, scale: float) -> Attend:
        """A layer's attention with the blocks that have a memory in this call around it."""
        now, found = self.ports.now, plain if self.adapter is None else self.adapter(plain, scale)
        if now is not None:
            for block, memory in zip(self.blocks, now.memories[self.where], strict=True):
                if memory is not None:
                    given = {"scale": scale, "layout": now.layout, "keys": now.before, "memory": memory}
                    found = partial(block, found, **given)
        return found


class PortedLayer(nn.Module):
    """A decoder layer with ports."""

    ports: LayerPorts

    def forward(self, hidden_states: Tensor, *args: Any, inside: Inside | None = None, **kwargs: Any) -> Any:
        """The layer's own, with its blocks."""
        return self.compute(hidden_states, *args, context=self.ports.context(inside), **kwargs)

    def compute(self, hidden_states: Tensor, *args: Any, context: LayerContext | None, **kwargs: Any) -> Any:
        """The same for what it lends; what ``torch.compile`` is to be given."""
        ports = self.ports
        ports.now = context
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
        out = self.site.compute(super().forward, states)  # type: ignore[misc]
        return out if self.site.ports.now is None else self.site.change(out, states, normalised(self, states))


class PortedMap(Ported):
    """A linear map, or a feed-forward network, with blocks at it."""

    def forward(self, x: Tensor) -> Tensor:
        """The map's own output, as its blocks change it."""
        return self.site.change(self.site.compute(super().forward, x), x)  # type: ignore[misc]


class PortedAttention(Ported):
    """A layer's attention, some of whose queries are not computed (``attend``)."""


def copied(module: nn.Module) -> Any:
    """A module of a layer with weights of its own, in single precision, and without the ports that it may have."""
    own = copy.deepcopy(module).float()
    for part in own.modules():
        if isinstance(part, Ported):
            part.__class__ = type(part).__bases__[1]
            del part.__dict__["site"]
    return own


def nothing(width: int, x: Tensor) -> Tensor:
    """(V, Din) -> (V, width) zeros."""
    return x.new_zeros(len(x), width)


def _without_queries(joined: nn.Linear, width: int, x: Tensor) -> Tensor:
    """(V, Din) -> (V, Dout) of a map to queries, keys and values: zeros in place of the queries, which are `width`."""
    bias = None if joined.bias is None else joined.bias[width:]
    return F.pad(F.linear(x, joined.weight[width:], bias), (width, 0))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers computes it by torch's fused kernels, with blocks around it.

    Args:
        module: the layer's attention.
        query: (B, H, Q, dh).
        key: (B, G, S, dh), with those of the queries' own positions after what a cache had; static ones are longer.
        value: likewise.
        attention_mask: (B, 1, Q, S), or None: causal.
        **kwargs: transformers' own, and `watch`, which keeps the weights.

    Returns:
        (B, Q, H, dh), and no scores.
    """
    watch: Watch | None = kwargs.pop("watch", None)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if not isinstance(module, PortedAttention):
        if watch is not None:
            watch.layer(query, key, shown(attention_mask, query, key), scale)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    plain: Attend = partial(_attend, module, kwargs)
    if watch is not None:
        plain = partial(_watched, watch, plain, scale)
    return module.site.around(plain, scale)(query, key, value, attention_mask), None


def _attend(
    module: PortedAttention, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """(B, Q, H, dh): the same without blocks, and without the queries that a fusion skips."""
    split, now = module.site.split, module.site.ports.now
    if split is None or now is None or not len(split.here):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    (heads, count), rows = query.shape[1:3], split.rows  # (B, R)
    start = min(now.start, key.shape[2] - count)  # a window may have dropped some
    shown = torch.arange(key.shape[2], device=rows.device) <= (rows + start)[..., None]  # (B, R, S)
    if mask is not None:
        shown = mask[:, 0].gather(1, rows[..., None].expand(-1, -1, key.shape[2]))
    asked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, query.shape[-1]))  # (B, H, R, dh)
    told, _ = sdpa_attention_forward(module, asked, key, value, shown[:, None], **kwargs)  # (B, R, H, dh)
    own = value[:, :, start : start + count].repeat_interleave(heads // value.shape[1], 1)
    own = own.transpose(1, 2)  # (B, Q, H, dh)
    index = rows[..., None, None].expand_as(told)
    real = ~split.own.gather(1, rows)[..., None, None]
    return own.scatter(1, index, torch.where(real, told, own.gather(1, index)))


def _watched(
    watch: Watch, attend: Attend, scale: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """(B, Q, H, dh): what the attention inside all blocks and adapters gives, its weights kept."""
    watch.layer(query, key, shown(mask, query, key), scale)
    return attend(query, key, value, mask)


def shown(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Who sees whom, (B or 1, 1, Q, K) bool, also where no mask says so: causal then, with no key ahead."""
    if mask is not None:
        return mask
    count, keys = query.shape[2], key.shape[2]
    return torch.ones(1, 1, count, keys, dtype=torch.bool, device=query.device).tril(keys - count)


def before_the_keys(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
) -> Tensor:
    """Attention in which further keys and values are before a layer's own, in one softmax with them.

    Args:
        attend: the attention's inner function.
        query: (B, H, Q, dh).
        key: (B, G, K, dh), the layer's own, as are the `value` beside it.
        value: (B, G, K, dh).
        mask: (B, 1, Q, K), or None: causal.
        keys: (B, G, P, dh), the further ones.
        values: (B, G, P, dh).
        seen: (B, 1, Q, P) which of them a query sees.

    Returns:
        (B, Q, H, dh).
    """
    text = shown(mask, query, key).expand(len(seen), -1, -1, -1)  # (B, 1, Q, K)
    key, value = (torch.cat([part.to(own.dtype), own], 2) for part, own in ((keys, key), (values, value)))
    return attend(query, key, value, torch.cat([seen, text], -1))


def of_keys(field: Tensor, count: int) -> Tensor:
    """(B, N) of all positions so far -> (B, K) of a layer's keys: under a window the last ones; 0 where none is yet."""
    field = field[:, max(0, field.shape[1] - count) :]
    return F.pad(field, (0, count - field.shape[1]))


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
    if memory.watch is not None:
        memory.watch.look(q.transpose(1, 2), k, allowed[:, None], any_image, scale)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=allowed[:, None], scale=scale)
    return torch.where(any_image, out.transpose(1, 2).flatten(2), 0.0)  # (B, Q, H * dh)


def seen_in_row(memory: Memory) -> tuple[Tensor, Tensor]:
    """For each position the images of its own row: which it sees (B, Q, J) bool, and their indices (B, J).

    A slot after a row's last image has index 0 and is seen by no position.
    """
    index = memory.slots.clamp(min=0)
    sees = memory.sees.gather(2, index[:, None].expand(-1, memory.sees.shape[1], -1))
    return sees & (memory.slots >= 0)[:, None], index
