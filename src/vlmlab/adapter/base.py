"""What all adapters share: named layers around the modules of a tower, switching between them and merging them.

Every adapter layer is a ``peft.tuners.tuners_utils.BaseTunerLayer``, peft's or ours, so that one loop serves all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from vlmlab.contracts.errors import CheckpointError, UserError, listed
from vlmlab.contracts.parts import Adapter

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the LM head."""

Found = list[tuple[str, nn.Module]]


def check_name(name: str) -> str:
    """An adapter's name becomes part of the names of its weights.

    Raises:
        UserError: it is not a word, or one that means something else there.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name == "base" or hasattr(nn.ModuleDict, name):
        raise UserError(f"adapter.name={name} cannot name weights; use a word of letters, digits and _ like task_a.")
    return name


# -- wrapping --------------------------------------------------------------------------------------------------------


def inject(config: PeftConfig, part: nn.Module, name: str) -> nn.Module:
    """The part with peft's adapter in it, under its name; the class of the part stays.

    Modules inside ``nn.MultiheadAttention`` are left out: it uses their weights without calling them.

    Raises:
        UserError: no module of the part has such a name.
    """
    attentions = [(path, m) for path, m in part.named_modules() if isinstance(m, nn.MultiheadAttention)]
    if inner := [f"{path}.{own}" for path, m in attentions for own, _ in m.named_modules() if own]:
        config.exclude_modules = inner  # type: ignore[attr-defined]
    targets = getattr(config, "target_modules", None)
    if targets == ALL_LINEAR and not isinstance(part, PreTrainedModel):  # which peft knows of these alone
        found = [re.escape(path) for path, _ in select(part, targets)]
        if not found:
            raise UserError(_nothing(part, targets))
        described: Any = config
        described.target_modules = "|".join(found)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            warnings.filterwarnings("ignore", "Unsupported layer type")  # of norms, which it does not ask for sizes
            return inject_adapter_in_model(config, part, adapter_name=name)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise UserError(_nothing(part, targets)) from error


class Layer(nn.Module, BaseTunerLayer):
    """A module of a tower with our own named adapters around it, of which at most one acts."""

    adapter_layer_names = ("adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []

    @property
    def acting(self) -> Any:
        """The adapter that acts, or None."""
        name = next(iter(self.active_adapters), None)
        return None if name is None or self.merged else self.adapters[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused unless a subclass can.

        Raises:
            UserError: always.
        """
        kind = type(self.acting).__name__
        raise UserError(f"{kind} is not a change of a weight and cannot be merged; keep the adapter beside the model.")


def insert(
    part: nn.Module,
    targets: str | Sequence[str],
    name: str,
    layer: type[Layer],
    new: Callable[[nn.Module], nn.Module | None],
) -> nn.Module:
    """The tower with `new(module)` as the adapter `name` of every target; where that is None the module stays alone.

    Raises:
        UserError: no module of the tower has such a name.
    """
    inserted = 0
    for path, module in select(part, targets):
        base = module.get_base_layer() if isinstance(module, Layer) else module
        adapter = new(base)
        if adapter is None:
            continue
        inserted += 1
        wrapped = module if isinstance(module, Layer) else layer(module)
        wrapped.adapters[name] = adapter.to(next(base.parameters()).device)
        part.set_submodule(path, wrapped)
    if not inserted:
        raise UserError(_nothing(part, targets))
    return part


def select(part: nn.Module, targets: str | Sequence[str]) -> Found:
    """Modules by peft's rule: the ends of paths, one regular expression, or ``all-linear``; outermost matches only.

    Modules inside ``nn.MultiheadAttention`` are left out: it uses their weights without calling them.
    """
    head = getattr(part, "get_output_embeddings", lambda: None)()

    def matches(path: str, module: nn.Module) -> bool:
        if targets == ALL_LINEAR:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            return isinstance(base, nn.Linear) and base is not head
        if isinstance(targets, str):
            return re.fullmatch(targets, path) is not None
        return any(f".{path}".endswith(f".{target}") for target in targets)

    found: Found = []
    closed: tuple[str, ...] = ()
    for path, module in part.named_modules():
        if not path or path.startswith(closed):
            continue
        if matches(path, module):
            found.append((path, module))
            closed += (f"{path}.",)
        elif isinstance(module, nn.MultiheadAttention):
            closed += (f"{path}.",)
    return found


def check_targets(part: nn.Module, targets: str | Sequence[str]) -> None:
    """Refuse targets that a tower does not have.

    Raises:
        UserError: naming them.
    """
    if not select(part, targets):
        raise UserError(_nothing(part, targets))


def _nothing(part: nn.Module, targets: Any) -> str:
    names = targets if isinstance(targets, str) else listed(sorted(targets or ()))
    return f"adapter.targets={names} fits no layer of {type(part).__name__}; name layers of that part."


# -- switching and merging -------------------------------------------------------------------------------------------


def layers(part: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Path and layer of every adapted module."""
    return ((path, module) for path, module in part.named_modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def switch(part: nn.Module, name: str | None) -> None:
    """Let the named adapter act on a tower, or none; what trains stays what trains."""
    trains = [(parameter, parameter.requires_grad) for parameter in part.parameters()]
    for _, layer in layers(part):
        there = any(name in getattr(layer, field) for field in layer.adapter_layer_names)
        layer.set_adapter([name] if there and name is not None else [])
    for parameter, flag in trains:  # peft's set_adapter also thaws
        parameter.requires_grad_(flag)


@torch.no_grad()
def merge(part: nn.Module) -> nn.Module:
    """The plain tower, with the adapter that acts in its weights; all others are dropped.

    Raises:
        UserError: the adapter is not a change of weights.
    """
    for path, layer in list(layers(part)):
        if layer.active_adapters:
            layer.merge()
        part.set_submodule(path, layer.get_base_layer())
    if hasattr(part, "peft_config"):
        del part.peft_config
    return part


@torch.no_grad()
def load_adapter(model: Any, adapter: Adapter, path: Path) -> None:
    """Add a trained adapter to a model from another run's ``model.safetensors``, under the name it was trained with.

    Its base and connector are not read: both runs must share them.

    Args:
        model: a ``VLM``.
        adapter: as it was configured in that run.
        path: the other run's file.

    Raises:
        CheckpointError: the file has no such adapter, or one of other shapes.
    """
    model.set_adapter(adapter)
    tensors = model.state_dict(keep_vars=True)
    with safe_open(str(path), framework="pt") as file:
        there = set(file.keys())
        for name in model.adapter_tensors(adapter.name):
            if name not in there or file.get_slice(name).get_shape() != list(tensors[name].shape):
                raise CheckpointError(f"{path} has no fitting {name}; set adapter.* as in the run that wrote it.")
            tensors[name].copy_(file.get_tensor(name))
