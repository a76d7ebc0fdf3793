"""The parts of a model by name: what stages train, what adapters wrap, and where it all came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.parts import Adapter, Connector, Encoder, Fusion, Mask, NamedParameters, TextTower
from vlmlab.lm.causal import CausalLanguageModel
from vlmlab.lm.inside import exchange

PARTS = ("encoder", "connector", "fusion", "lm", "text")
"""Attributes that are parts, in the order of the data."""

TOWERS = ("lm", "encoder")
ADAPTABLE = ("lm", "encoder", "connector", "fusion")
"""Parts that adapters wrap, and those of them that are towers."""


@dataclass(frozen=True)
class Adapted:
    """What an adapter did to one part.

    Attributes:
        adapter: the adapter.
        tensors: state-dict names of its weights and buffers.
        ratios: learning rates that are a multiple of the others', by name.
    """

    adapter: Adapter
    tensors: set[str]
    ratios: dict[str, float]


class Parts(nn.Module):
    """Named parts and the adapters around them; ``VLM`` adds the way of the data.

    Args:
        encoder, connector, fusion, lm, mask, text: as in ``VLM``.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        connector: Connector | None,
        fusion: Fusion,
        lm: CausalLanguageModel,
        mask: Mask,
        text: TextTower | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.fusion = fusion
        self.lm = lm
        self.text = text
        self.mask = mask
        self._adapted: dict[str, dict[str, Adapted]] = {}  # part -> name -> its adapter
        self.objectives = nn.ModuleDict()  # those of the stage that have weights of their own
        self._acting: dict[str, str | None] = {}  # part -> name of the adapter that acts

    # -- stages --------------------------------------------------------------------------------------------------

    def set_mask(self, mask: Mask) -> None:
        """The policy of the stage that begins."""
        self.mask = mask

    def set_objectives(self, objectives: Mapping[str, Any]) -> None:
        """The objectives of the stage that begins, as far as they have weights; those of the stage before are dropped.

        Raises:
            UserError: one of them does not go with this composition.
        """
        for objective in objectives.values():
            objective.attach(self)
        self.objectives = nn.ModuleDict(dict(objectives))

    def set_adapter(self, adapter: Adapter) -> None:
        """Lets the adapter act on the parts that it names, wrapping each of them once per name of an adapter.

        Raises:
            UserError: the adapter names a part that this composition does not have, or its name or kind does not go
                with the adapters that are there.
        """
        for part in adapter.parts:
            if part not in ADAPTABLE or getattr(self, part) is None:
                there = listed(name for name in ADAPTABLE if getattr(self, name) is not None)
                raise UserError(f"adapter.parts has {part}, which this composition has not; use some of {there}.")
            if adapter.towers_only and part not in TOWERS:
                raise UserError(f"adapter.parts has {part} and {type(adapter).__name__} wraps lm and encoder alone.")
            others = self._adapted.setdefault(part, {})
            _check_company(adapter, part, others)
            if adapter.name not in others:
                known = {id(t) for t in self.state_dict(keep_vars=True).values()}
                owner, place = self._tower(part)
                with self._ports_kept(part):
                    wrapped = adapter.wrap(getattr(owner, place))
                setattr(owner, place, wrapped)
                ratios = {id(p): ratio for p, ratio in adapter.ratios(wrapped).items()}
                new = {n: t for n, t in _once(self.state_dict(keep_vars=True)).items() if id(t) not in known}
                rates = {n: ratios[id(t)] for n, t in new.items() if id(t) in ratios}
                others[adapter.name] = Adapted(adapter, set(new), rates)
        self._switch(adapter.parts, adapter.name)

    def check_adapter(self, adapter: Adapter) -> None:
        """Look for an adapter's targets, long before it is set.

        Raises:
            UserError: a part that it wraps has none of them.
        """
        from vlmlab.adapter.base import check_targets

        for part in adapter.parts:
            owner, place = self._tower(part)
            if (targets := getattr(adapter, "targets", None)) and getattr(owner, place, None) is not None:
                check_targets(getattr(owner, place), targets)

    def switch(self, name: str | None) -> None:
        """Let the adapters of this name act, and no other; None: none, every tower as it was loaded.

        One model serves many tasks: switch between batches or requests. Soft prompts are in the batches, so make
        those with a collator built after switching.

        Raises:
            UserError: no tower has such an adapter, or one cannot be without its adapter.
        """
        known = sorted({other for others in self._adapted.values() for other in others})
        if name is not None and name not in known:
            raise UserError(f"there is no adapter {name} to switch to; the model has {listed(known)}.")
        if name is None and any(a.adapter.alone for others in self._adapted.values() for a in others.values()):
            raise UserError("adapter.pissa=true took its share out of the tower's weights; it cannot be switched off.")
        self._switch(self._adapted, name)

    def _switch(self, parts: Iterable[str], name: str | None) -> None:
        from vlmlab.adapter.base import switch

        for part in parts:
            owner, place = self._tower(part)
            switch(getattr(owner, place), name)
            self._acting[part] = name if name in self._adapted[part] else None

    def merge(self) -> None:
        """Put the adapters that act into the towers' own weights and drop all adapters: plain towers again.

        Raises:
            UserError: an adapter that acts is not a change of weights.
        """
        from vlmlab.adapter.base import merge

        for part in list(self._adapted):
            owner, place = self._tower(part)
            with self._ports_kept(part):
                setattr(owner, place, merge(getattr(owner, place)))
            del self._adapted[part], self._acting[part]

    def _tower(self, part: str) -> tuple[Any, str]:
        """Where what an adapter wraps is: its owner and the attribute's name."""
        inside = {"lm": (self.lm, "model"), "encoder": (self.encoder, "tower")}
        return inside.get(part, (self, part))

    @contextmanager
    def _ports_kept(self, part: str) -> Iterator[None]:
        """While this is open modules of a part may be wrapped or come out again: ports of the LM see to it."""
        old = dict(self.fusion.named_modules()) if part == "fusion" else {}
        yield
        now = dict(self.fusion.named_modules()) if old else {}
        if new := {old[path]: now[path] for path in old if path in now and now[path] is not old[path]}:
            exchange(self.lm.model, new)

    @property
    def prompt_tokens(self) -> int:
        """Positions that the adapter that acts on the LM wants before every sample."""
        name = self._acting.get("lm")
        return 0 if name is None else self._adapted["lm"][name].adapter.prompt_tokens

    def adapter_tensors(self, name: str) -> set[str]:
        """State-dict names of the weights and buffers of the adapters of this name."""
        return {n for others in self._adapted.values() if name in others for n in others[name].tensors}

    def ratios(self) -> dict[str, float]:
        """Learning rates that are a multiple of their part's, by the parameter's name."""
        return {n: r for others in self._adapted.values() for a in others.values() for n, r in a.ratios.items()}

    def parts(self) -> dict[str, NamedParameters]:
        """Part -> its named parameters that a stage may train.

        Of an adapted tower that is the adapter that acts; "<part>.base" are its own weights and "<part>.<name>" other
        adapters.
        """
        out: dict[str, NamedParameters] = {}
        gone = {id(p) for module in self.fusion.replaced() for p in module.parameters()}
        for part in PARTS:
            module = getattr(self, part)
            own = [] if module is None else list(module.trainable() if hasattr(module, "trainable") else named(module))
            found = [(f"{part}.{name}", p) for name, p in own if id(p) not in gone]
            if adapters := self._adapted.get(part):
                every = set().union(*(adapted.tensors for adapted in adapters.values()))
                out[f"{part}.base"] = [(n, p) for n, p in found if n not in every]
                for name, adapted in adapters.items():
                    key = part if name == self._acting.get(part) else f"{part}.{name}"
                    out[key] = [(n, p) for n, p in found if n in adapted.tensors]
            elif found:
                out[part] = found
        if own := named(self.objectives):
            out["objective"] = [(f"objectives.{name}", p) for name, p in own]
        return out

    def added(self) -> int:
        """Number of weights that are in no tower: those of connector, fusion, objectives and adapters."""
        towers = [module for module in (self.encoder, self.lm, getattr(self, "text", None)) if module is not None]
        in_towers = {id(p) for tower in towers for p in tower.parameters()}
        adapters = {n for others in self._adapted.values() for adapted in others.values() for n in adapted.tensors}
        return sum(p.numel() for n, p in self.named_parameters() if id(p) not in in_towers or n in adapters)

    def sourced(self) -> dict[str, str]:
        """Part -> sha256 of the tower it was loaded from."""
        towers = {"encoder": self.encoder, "lm": self.lm, "text": self.text}
        return {part: tower.source for part, tower in towers.items() if tower is not None and tower.source is not None}


def _check_company(adapter: Adapter, part: str, others: Mapping[str, Adapted]) -> None:
    """Refuse an adapter that cannot share a tower with those that are there."""
    for name, other in others.items():
        if type(other.adapter) is not type(adapter):
            kinds = f"{type(other.adapter).__name__} {name} and {type(adapter).__name__} {adapter.name}"
            raise UserError(f"adapter: {part} cannot have {kinds} together; use one kind of adapter in all stages.")
        if name != adapter.name and (other.adapter.alone or adapter.alone):
            raise UserError(f"adapter.pissa=true goes with no second adapter on {part}; use one name in all stages.")


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor that modules share under its first name alone, as ``named_parameters`` has it."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def named(module: nn.Module) -> NamedParameters:
    """The parameters of a module under their names in it."""
    return list(module.named_parameters())
