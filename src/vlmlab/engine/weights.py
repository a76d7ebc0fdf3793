"""The model of a recipe as its stages go by: what is frozen, what was ever trained, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from vlmlab.contracts.errors import CheckpointError, UserError, listed, reason
from vlmlab.contracts.parts import Mask, Objective
from vlmlab.engine.layers import chosen
from vlmlab.engine.shards import shard
from vlmlab.engine.stage import check_objectives
from vlmlab.engine.stamp import CHECKSUM, RUN, Stamp, check_whole, checksum
from vlmlab.mask.leak import check_mask
from vlmlab.recipe.stage import Stage, leads
from vlmlab.runs.files import placing, share
from vlmlab.runs.renamed import with_present_names
from vlmlab.runs.withheld import stored

FORMAT = 1
"""Version of ``model.safetensors``'s metadata."""

COMPOSITION = ("encoder", "connector", "fusion", "lm")
BASE = ".base"


class StagedModel:
    """A model that goes through the stages of a recipe: what trains in each, and what has been trained so far.

    Args:
        model: a ``VLM`` or ``DualEncoder``.

    Attributes:
        rates: learning rate of what trains in the stage entered last, by the key of its ``train``.
        adapted: parts that its adapter wraps.
        objectives: the losses of that stage, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rates: dict[str, float] = {}
        self.adapted: tuple[str, ...] = ()
        self.objectives: dict[str, Objective] = {}
        self._parts: set[str] = set()  # those that the stage trains, or something in them
        self._ever: dict[int, nn.Parameter] = {}  # by identity: an adapter renames the weights it wraps
        self._begun: dict[int, nn.Parameter] = {}  # those that came from an earlier run, likewise

    # -- stages --------------------------------------------------------------------------------------------------

    def enter(self, stage: Stage) -> None:
        """Set mask and adapter, then freeze everything but what this stage trains (which becomes fp32)."""
        model: Any = self.model
        if (mask := build_mask(stage)) is not None:
            model.set_mask(mask)
        self.objectives = build_objectives(stage)
        self._set_objectives(stage)
        adapter = instantiate(stage.adapter) if stage.adapter else None
        self.adapted = tuple(getattr(adapter, "parts", ()))
        if self.adapted:
            model.set_adapter(adapter)
        self.rates = stage.rates
        if (own := getattr(adapter, "lr", None)) is not None:
            self.rates |= {path: float(own) for path in self.rates if path.split(".")[0] in self.adapted}
        check_paths(model, stage)
        model.requires_grad_(False)
        for part, named in model.parts().items():
            if stage.trains(part):
                self._thaw(part, named, stage)
        self._parts = {part for part in model.parts() if stage.trains(part)}
        _set_modes(model)

    def _thaw(self, part: str, named: list[tuple[str, nn.Parameter]], stage: Stage) -> None:
        """Let a part train, or the paths and layers of it that the stage names.

        Raises:
            UserError: these hold nothing of it, as with an adapter that is not in the layers.
        """
        inside = chosen(self.model, stage, part)
        meant = [parameter for name, parameter in named if stage.deciding(part, name) in self.rates]
        if named and not meant:
            paths = listed(path for path in self.rates if path.split(".")[0] == part)
            raise UserError(
                f"{stage.key('train')}: {paths} leads to no weight that can train, since the {part}'s adapter has none "
                f"there; give a rate to {part}, or choose other adapter.targets."
            )
        trained = [parameter for parameter in meant if inside is None or id(parameter) in inside]
        if named and not trained:
            raise UserError(f"{stage.key('layers')}.{part} names layers without any weight to train; leave it out.")
        for parameter in trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            self._ever[id(parameter)] = parameter

    def _set_objectives(self, stage: Stage) -> None:
        """Make the weights that objectives have of their own a part of the model, for this stage.

        Raises:
            UserError: there are some and the stage gives them no learning rate.
        """
        model: Any = self.model
        own = {name: objective for name, objective in self.objectives.items() if isinstance(objective, nn.Module)}
        if own and not stage.trains("objective"):
            raise UserError(
                f"{stage.key('objective')} has weights of its own ({listed(own)}) and {stage.key('train')} gives "
                "them no learning rate; add train.objective."
            )
        if own or len(getattr(model, "objectives", ())):
            model.set_objectives(own)

    def shard(self, half: bool, mesh: DeviceMesh) -> None:
        """Cut the towers' weights into shards (``vlmlab.engine.shards``); what was ever trained stays so."""
        ever = [name for name, parameter in self.model.named_parameters() if id(parameter) in self._ever]
        begun = self.begun()
        shard(self.model, mesh, half)
        cut = dict(self.model.named_parameters())
        self._ever = {id(cut[name]): cut[name] for name in ever}
        self._begun = {}
        self.begun_with(begun)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the present stage trains, by name."""
        parts: Mapping[str, list[tuple[str, nn.Parameter]]] = self.model.parts()  # type: ignore[operator]
        return {n: p for part, named in parts.items() if part in self._parts for n, p in named if p.requires_grad}

    def table(self, stage: Stage) -> list[tuple[str, int, int, float | None]]:
        """Part, or path inside one, with its weights, those that train, and their learning rate.

        What no path of a part leads to has a line of its own, "<part>, the rest".
        """
        lines = []
        for part, named in self.model.parts().items():  # type: ignore[operator]
            decided: dict[str | None, list[nn.Parameter]] = {}
            for name, parameter in named:
                decided.setdefault(stage.deciding(part, name), []).append(parameter)
            for path in [part, None, *(path for path in stage.train if path != part)]:
                if path in decided:
                    sizes = [(p.numel(), p.numel() if p.requires_grad else 0) for p in decided[path]]
                    alone = len(decided) == 1 and path in (part, None)
                    shown = path if path not in (part, None) else part if alone else f"{part}, the rest"
                    total, trains = (sum(size) for size in zip(*sizes, strict=True))
                    lines.append((str(shown), total, trains, self.rates.get(path or "") if trains else None))
        return lines

    def live(self) -> dict[str, Tensor]:
        """What the present stage may change: trained weights and the buffers of modules that hold any."""
        return {**self.trained(), **{n: b for n, b, owned in self._buffers() if any(p.requires_grad for p in owned)}}

    def frozen(self) -> dict[str, Tensor]:
        """Everything else: must be the same bits after the stage."""
        live = self.live()
        everything = [*self.model.named_parameters(), *((n, b) for n, b, _ in self._buffers())]
        return {name: tensor for name, tensor in everything if name not in live}

    def ever_trained(self) -> int:
        """Number of weights that any stage so far trained."""
        return sum(parameter.numel() for parameter in self._ever.values())

    def begun_with(self, names: Iterable[str]) -> None:
        """Remember that these weights came from an earlier run: the run's own files have them from then on."""
        known = dict(self.model.named_parameters())
        self._begun |= {id(known[name]): known[name] for name in names if name in known}

    def begun(self) -> list[str]:
        """The present names of the weights that came from an earlier run, sorted."""
        return sorted(name for name, parameter in self.model.named_parameters() if id(parameter) in self._begun)

    def named(self) -> dict[str, Tensor]:
        """Every weight and buffer by name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _buffers(self) -> Iterator[tuple[str, Tensor, list[nn.Parameter]]]:
        """Every buffer a state dict has, with the parameters of the smallest module around it that has any."""
        persistent = self.model.state_dict(keep_vars=True)
        for name, buffer in self.model.named_buffers():
            if name not in persistent:
                continue
            path = name.split(".")[:-1]
            owned: list[nn.Parameter] = []
            while not owned:
                owned = list(self.model.get_submodule(".".join(path)).parameters())
                if not path:
                    break
                path = path[:-1]
            yield name, buffer, owned

    # -- the file ------------------------------------------------------------------------------------------------

    def kept(self) -> dict[str, Tensor]:
        """Every tensor that differs from the source towers: ever trained, of an earlier run, or without source."""
        sources = self.sources()
        parts: Mapping[str, list[tuple[str, nn.Parameter]]] = self.model.parts()  # type: ignore[operator]
        found: dict[str, Tensor] = {}
        fresh: set[int] = set()
        for part, named in parts.items():
            from_source = part.removesuffix(BASE) in sources and (part.endswith(BASE) or part + BASE not in parts)
            for name, parameter in named:
                if not from_source or id(parameter) in self._ever or id(parameter) in self._begun:
                    found[name] = parameter.detach()
                    fresh.add(id(parameter))
        for name, buffer, owned in self._buffers():
            if any(id(p) in fresh for p in owned):
                found[name] = buffer.detach()
        return found

    def save(self, path: Path, stage: Stage, cfg: DictConfig, stamp: Stamp | None = None) -> None:
        """Write ``kept()`` at once and durably, with a checksum; equal bytes for equal weights of equal runs."""
        facts = {
            "format": FORMAT,
            "stage": stage.name,
            "sources": self.sources(),
            "composition": {key: stored(cfg).get(key) for key in COMPOSITION},
        }
        if self._begun:
            facts["begun"] = self.begun()
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in sorted(self.kept().items())}
        facts |= {RUN: asdict(stamp)} if stamp is not None else {}
        facts = json.loads(json.dumps(facts, default=str))
        facts[CHECKSUM] = checksum(facts, tensors)
        # one key only: safetensors writes several in random order
        written = {"vlmlab": json.dumps(facts, sort_keys=True, default=str)}
        with placing(path, durable=True) as new:
            save_file(tensors, str(new), metadata=written)
            share(new)

    def load(self, path: Path, stamp: Stamp | None = None) -> None:
        """Read what ``save`` wrote for this composition and these stages; nothing more and nothing less.

        Args:
            path: the file.
            stamp: of the run and stage that it must belong to; None: any.

        Raises:
            CheckpointError: unreadable, damaged, of another run or stage, other source towers, or a missing, unexpected
                or differently shaped tensor.
        """
        facts = read_facts(path)
        if stamp is not None:
            stamp.check(path, facts)
        self.begun_with(facts.get("begun", ()))
        self.take(self._read(path))

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Have these values, by name."""
        named = self.named()
        for name, tensor in tensors.items():
            named[name].data = tensor.to(named[name].device)

    def mix(self, path: Path, share: float) -> None:
        """Set the weights to share x these + (1 - share) x another run's (SPHINX, arXiv 2311.07575).

        At 0 and 1 it is exactly either of the two. Tensors of whole numbers are this model's unless the share is 0.

        Raises:
            CheckpointError: as for ``load``.
        """
        self.mix_with(self._read(path), share)

    def mix_with(self, others: Mapping[str, Tensor], share: float) -> None:
        """The same with values by name (of the stage's own start: WiSE-FT, arXiv 2109.01903, section 3)."""
        named = self.named()
        for name, other in others.items():
            mine = named[name].data
            if mine.is_floating_point():
                mixed = torch.lerp(other.to(mine.device).double(), mine.double(), share).to(mine.dtype)
            else:
                mixed = mine if share else other.to(mine.device)
            named[name].data = mixed

    def _read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file that fits this model."""
        facts = read_facts(path)
        tensors = read_tensors(path)
        remedy = "load the tower it was trained on, or train again with fresh=true"
        check_sources(path, facts.get("sources", {}), self.sources(), remedy)
        _check_tensors(path, self.kept(), tensors)
        check_whole(path, facts, tensors)
        return tensors

    def sources(self) -> dict[str, str]:
        """Part -> sha256 of the tower it was loaded from."""
        return dict(self.model.sourced())  # type: ignore[operator]


def read_facts(path: Path) -> dict[str, Any]:
    """What a stage's file says about itself.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get("vlmlab", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}); delete it to train that stage again."
        ) from error
    if not isinstance(facts, dict) or not _well_formed(facts):
        raise CheckpointError(f"{path} says nothing that can be read of itself; delete it to train that stage again.")
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {facts.get('format')} and this code reads {FORMAT}; train again.")
    return facts


def _well_formed(facts: Mapping[str, Any]) -> bool:
    """Whether what a file says of itself has the types that it is written with."""
    begun = facts.get("begun", [])
    kinds = all(isinstance(facts.get(key, {}), dict) for key in ("sources", "composition"))
    return kinds and isinstance(begun, list) and all(isinstance(name, str) for name in begun)


def tensor_names(path: Path) -> list[str]:
    """The names of a stage's tensors.

    Raises:
        CheckpointError: as `read_facts`.
    """
    read_facts(path)
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a stage's file, by name."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def check_sources(shown: object, saved: Mapping[str, str], now: Mapping[str, str], remedy: str) -> None:
    """Refuse weights that were trained on other towers.

    Raises:
        CheckpointError: naming the tower.
    """
    for part in sorted({*saved, *now}):
        if saved.get(part) != now.get(part):
            raise CheckpointError(
                f"{shown} was trained on another {part} (sha256 {str(saved.get(part))[:12]}, here "
                f"{str(now.get(part))[:12]}); {remedy}."
            )


def mixed_in(stage: Stage, cfg: DictConfig) -> Path | None:
    """The file that a stage's ``mix`` names, of the same composition; None without one.

    Raises:
        UserError: there is no such run or stage.
        CheckpointError: it cannot be read, or is of another composition.
    """
    if stage.mix is None or stage.mix["run"] is None:
        return None
    run, name, key = Path(stage.mix["run"]).expanduser(), stage.mix["stage"], stage.key("mix")
    files = sorted(file for file in (run / "stages").glob("*/model.safetensors") if file.is_file())
    path = next((file for file in files if file.parent.name.partition("_")[2] == name), None)
    if path is None:
        there = listed(file.parent.name.partition("_")[2] for file in files)
        raise UserError(f"{key}: {run} has no finished stage {name} (there: {there}); set {key}.run and {key}.stage.")
    saved = with_present_names(read_facts(path).get("composition", {}))
    for part in COMPOSITION:
        if saved.get(part) != stored(cfg).get(part):
            raise CheckpointError(f"{key}: {path} has another {part}; mix runs of the same composition only.")
    return path


def check_fusion_learns(model: Any, stages: Sequence[Stage]) -> None:
    """Refuse a recipe that leaves a fusion as it starts, by which vision has no say in most of them.

    Args:
        model: a ``VLM`` or ``DualEncoder``.
        stages: all that train it.

    Raises:
        UserError: the fusion has weights and no stage trains them.
    """
    size = sum(parameter.numel() for _, parameter in model.parts().get("fusion", ()))
    if size and not any(stage.trains("fusion") for stage in stages):
        raise UserError(
            f"{stages[-1].key('train')}: the fusion has {size:,} weights and no stage trains them, so that it would "
            f"stay as it starts; add +{stages[-1].key('train')}.fusion=1e-3."
        )


def check_paths(model: Any, stage: Stage) -> None:
    """Refuse a path of a stage's ``train`` that leads to no weight of the model, also where its stage is far away.

    A part without any weight in this composition is passed over, as it is where it trains whole.

    Raises:
        UserError: naming the path and what there is in its place.
    """
    parts = model.parts()
    for path in stage.train:
        part, *names = path.split(".")
        weights = [*parts.get(part, ()), *parts.get(f"{part}{BASE}", ())]
        within = [name.split(".")[1:] for name, _ in weights]
        if not names or not within or any(leads(path, weight) for weight in within):
            continue
        known = part
        for name in names:
            if name == "**" or not any(leads(f"{known}.{name}", weight) for weight in within):
                break
            known += f".{name}"
        depth = known.count(".")
        there = dict.fromkeys(w[depth] for w in within if len(w) > depth and leads(known, w))
        raise UserError(f"{stage.key('train')}.{path} leads to no weight; in {known} there is {listed(there, 200)}.")


def check_adapter(model: Any, stage: Stage) -> None:
    """Refuse an adapter that fits nothing of the model, also where its stage is far away.

    Raises:
        UserError: naming its targets.
    """
    if stage.adapter:
        model.check_adapter(instantiate(stage.adapter))


def build_mask(stage: Stage) -> Mask | None:
    """The mask of a stage, None where it keeps the model's.

    Raises:
        UserError: it shows an answer to a position that must not know it.
    """
    if not stage.mask:
        return None
    mask: Mask = instantiate(stage.mask)
    check_mask(mask, stage.key("mask"), prompt_learnt=stage.prompt == "text")
    return mask


def build_objectives(stage: Stage) -> dict[str, Objective]:
    """The objectives of a stage by name; a single configuration is called ``objective``.

    Raises:
        UserError: there is none, one is not a configuration of an objective, or does not go with the stage.
    """
    where = stage.key("objective")
    config = {"objective": stage.objective} if "_target_" in stage.objective else stage.objective
    objectives: dict[str, Objective] = {}
    for name, value in config.items():
        if value is None:  # left out, written down
            continue
        key = where if config is not stage.objective else f"{where}.{name}"
        if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
            raise UserError(f"{key}={value} is not an objective; give it _target_, as the files of conf/objective do.")
        built = instantiate(value)
        if not callable(built) or not all(hasattr(built, needed) for needed in ("weight", "per_micro_batch")):
            raise UserError(
                f"{key}._target_={value['_target_']} is not an objective; it has to be callable and to have weight and "
                "per_micro_batch, see vlmlab.contracts.parts.Objective."
            )
        objectives[str(name)] = built
    if not objectives:
        raise UserError(f"{where} is empty; give one with _target_, or a mapping of several.")
    check_objectives(stage, objectives)
    return objectives


def check_names(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a file with other tensors than expected.

    Raises:
        CheckpointError: naming the first few that are missing or too many.
    """
    for what, names in (("lacks", expected.keys() - found.keys()), ("also has", found.keys() - expected.keys())):
        if names:
            raise CheckpointError(
                f"{path} {what} {listed(sorted(names))}; load it with the composition it was trained with."
            )


def _check_tensors(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    check_names(path, expected, found)
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)} and the model's is {tuple(expected[name].shape)}; "
                "load it with the composition it was trained with."
            )


def plain_key(cfg: DictConfig, key: str) -> Any:
    """The value of a key without OmegaConf's types."""
    node = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _set_modes(module: nn.Module) -> None:
    """Training mode for modules with a weight that trains, evaluation mode (no dropout) for wholly frozen ones."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    module.training = True
    for child in module.children():
        _set_modes(child)


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's own, by name."""
    named: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        named[name].copy_(tensor)
