"""The model of a recipe as its stages go by: what is frozen, what was ever trained, and the file that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.recipe.base import Objective, check_objectives
from vlmlab.recipe.stage import Stage

FORMAT = 1
"""Version of ``model.safetensors``'s metadata."""

COMPOSITION = ("encoder", "connector", "fusion", "lm")
BASE = ".base"


class Trainee:
    """A model on its way through the stages.

    Args:
        model: a ``VLM`` or ``DualEncoder``.

    Attributes:
        rates: learning rate of every part that trains in the stage entered last.
        adapted: parts that its adapter wraps.
        objectives: the losses of that stage, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rates: dict[str, float] = {}
        self.adapted: tuple[str, ...] = ()
        self.objectives: dict[str, Objective] = {}
        self._ever: dict[int, nn.Parameter] = {}  # by identity: an adapter renames the weights it wraps

    # -- stages --------------------------------------------------------------------------------------------------

    def enter(self, stage: Stage) -> None:
        """Set mask and adapter, then freeze everything but what this stage trains (which becomes fp32)."""
        model: Any = self.model
        if stage.mask:
            model.set_mask(instantiate(stage.mask))
        self.objectives = build_objectives(stage)
        self._set_objectives(stage)
        adapter = instantiate(stage.adapter) if stage.adapter else None
        self.adapted = tuple(getattr(adapter, "parts", ()))
        if self.adapted:
            model.set_adapter(adapter)
        self.rates = dict(stage.train)
        if (own := getattr(adapter, "lr", None)) is not None:
            self.rates |= {part: float(own) for part in self.adapted if part in stage.train}
        model.requires_grad_(False)
        for part, named in model.parts().items():
            if part in self.rates:
                for _, parameter in named:
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(True)
                    self._ever[id(parameter)] = parameter
        _set_modes(model)

    def _set_objectives(self, stage: Stage) -> None:
        """Make the weights that objectives have of their own a part of the model, for this stage.

        Raises:
            UserError: there are some and the stage gives them no learning rate.
        """
        model: Any = self.model
        own = {name: objective for name, objective in self.objectives.items() if isinstance(objective, nn.Module)}
        if own and "objective" not in stage.train:
            raise UserError(
                f"{stage.key('objective')} has weights of its own ({', '.join(own)}) and {stage.key('train')} gives "
                "them no learning rate; add train.objective."
            )
        if own or len(getattr(model, "objectives", ())):
            model.set_objectives(own)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the present stage trains, by name."""
        parts: Mapping[str, list[tuple[str, nn.Parameter]]] = self.model.parts()  # type: ignore[operator]
        return {name: p for part, named in parts.items() if part in self.rates for name, p in named}

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
        """Every tensor that differs from the source towers: ever trained, or of a part that has no source."""
        sources = self._sources()
        parts: Mapping[str, list[tuple[str, nn.Parameter]]] = self.model.parts()  # type: ignore[operator]
        found: dict[str, Tensor] = {}
        fresh: set[int] = set()
        for part, named in parts.items():
            from_source = part.removesuffix(BASE) in sources and (part.endswith(BASE) or part + BASE not in parts)
            for name, parameter in named:
                if not from_source or id(parameter) in self._ever:
                    found[name] = parameter.detach()
                    fresh.add(id(parameter))
        for name, buffer, owned in self._buffers():
            if any(id(p) in fresh for p in owned):
                found[name] = buffer.detach()
        return found

    def save(self, path: Path, stage: Stage, cfg: DictConfig) -> None:
        """Write ``kept()`` at once and durably; the same bytes for the same weights."""
        facts = {
            "format": FORMAT,
            "stage": stage.name,
            "sources": self._sources(),
            "composition": {key: plain_key(cfg, key) for key in COMPOSITION},
        }
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in sorted(self.kept().items())}
        new = path.with_name(f".{path.name}.new")
        # one key only: safetensors writes several in random order
        save_file(tensors, str(new), metadata={"vlmlab": json.dumps(facts, sort_keys=True, default=str)})
        replace_durably(new, path)

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote for this composition and these stages; nothing more and nothing less.

        Raises:
            CheckpointError: unreadable, other source towers, or a missing, unexpected or differently shaped tensor.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("vlmlab", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it to train that stage again.") from error
        if facts.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {facts.get('format')} and this code reads {FORMAT}; train again.")
        self._check_sources(path, facts.get("sources", {}))
        expected = self.kept()
        _check_tensors(path, expected, tensors)
        named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, tensor in tensors.items():
            named[name].data = tensor.to(named[name].device)

    def _sources(self) -> dict[str, str]:
        return dict(self.model.sourced())  # type: ignore[operator]

    def _check_sources(self, path: Path, saved: Mapping[str, str]) -> None:
        now = self._sources()
        for part in sorted({*saved, *now}):
            if saved.get(part) != now.get(part):
                raise CheckpointError(
                    f"{path} was trained on another {part} (sha256 {str(saved.get(part))[:12]}, here "
                    f"{str(now.get(part))[:12]}); load the tower it was trained on, or train again with fresh=true."
                )


def build_objectives(stage: Stage) -> dict[str, Objective]:
    """The objectives of a stage by name; a single configuration is called ``objective``.

    Raises:
        UserError: there is none, or one of them does not go with the stage.
    """
    config = {"objective": stage.objective} if "_target_" in stage.objective else stage.objective
    objectives = {str(name): instantiate(value) for name, value in config.items() if value}
    if not objectives:
        raise UserError(f"{stage.key('objective')} is empty; give one with _target_, or a mapping of several.")
    check_objectives(stage, objectives)
    return objectives


def replace_durably(new: Path, path: Path) -> None:
    """Move a finished file into its place after it is on the disk."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_names(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a file with other tensors than expected.

    Raises:
        CheckpointError: naming the first few that are missing or too many.
    """
    for what, names in (("lacks", expected.keys() - found.keys()), ("also has", found.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{path} {what} {shown}; load it with the composition it was trained with.")


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
