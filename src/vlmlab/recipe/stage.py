"""A stage: what trains, how fast, on which data, with which objective, mask and adapter. Never imports torch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from annotated_types import Interval
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.values import (
    Count,
    Drop,
    Natural,
    NotNegative,
    Positive,
    Share,
    Text,
    hints,
    nearest,
    refusal,
    shown,
)

PARTS = ("encoder", "connector", "fusion", "lm", "pair", "objective")
"""What a stage may train; a part the composition has no weights in is empty (``pair``: a dual encoder's head;
``objective``: the objectives' own weights, which are dropped after the stage)."""

LAYERED = ("encoder", "lm")
"""Parts made of transformer layers, which a stage may train in a range or at rates that decay with depth."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, its steps already scaled by the budget.

    Attributes:
        index: place in the recipe, from 0.
        name: its key in ``recipe.stages``.
        module: dotted path of a ``vlmlab.engine.stage.StageModule`` class.
        train: learning rate of what trains: of whole parts, and of paths inside parts (``connector.out``), of which
            the longest that leads to a weight decides about it; None: frozen there. All else is frozen.
        data: key of ``data.train``.
        prompt: "plain" (image, then caption), "chat" (the LM's template) or "text" (the template, every word
            supervised); empty takes the module's own.
        objective: one objective's configuration, or a mapping of several.
        mask: configuration of the attention mask.
        adapter: configuration of the adapter.
        steps: optimizer steps; 0 leaves the stage out of the training and its weights as they are.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches per optimizer step and rank.
        warmup: share of the steps over which the learning rate rises linearly from 0.
        schedule: "cosine", "linear" or "constant" after the warm-up.
        min_lr_ratio: where the schedule ends, as a share of the learning rate.
        optimizer: "adamw", or "muon" for the matrices inside the layers, with AdamW for all else.
        layers: of "lm" or "encoder", the first and last transformer layer that train, -1 being the last one; the rest
            of that part is frozen. None, or a part that is not there: all of it.
        layer_decay: learning rate of a layer of the LM or the encoder as a share of that of the layer above it.
        mix: post-op, ``{run, share, stage}``: the weights become share x these + (1 - share) x those that the other
            run folder has after its stage of that name (null: of this name); run null: those that this stage began
            with, as in WiSE-FT (arXiv 2109.01903, section 3).
        encoder_from: an earlier stage of two towers, whose encoder the model of this stage begins with.
        weight_decay: on weights of two or more dimensions only.
        betas: AdamW's.
        gradient_clip: largest norm of the gradient; None: no clipping.
    """

    index: int
    name: str
    module: str
    train: dict[str, float | None]
    data: str
    objective: dict[str, Any]
    steps: Natural
    batch_size: Count
    prompt: Literal["", "plain", "chat", "text"] = ""
    mask: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    accumulate: Count = 1
    warmup: Share = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Share = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    layers: dict[str, tuple[int, int]] | None = None
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0
    mix: dict[str, Any] | None = None
    encoder_from: Text | None = None
    weight_decay: NotNegative = 0.0
    betas: tuple[Drop, Drop] = (0.9, 0.999)
    gradient_clip: Positive | None = None

    def key(self, name: str) -> str:
        """The full name of one of this stage's keys on the command line."""
        return f"recipe.stages.{self.name}.{name}"

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates by part, or path inside one; what is frozen is left out."""
        return {path: rate for path, rate in self.train.items() if rate is not None}

    def trains(self, part: str) -> bool:
        """Whether it trains a part, or anything in it."""
        return part in parts_in(self.train)

    def deciding(self, part: str, weight: str) -> str | None:
        """The key of `train` that decides about a weight, as "connector.out" does about ``connector.out.bias``.

        Args:
            part: a name of ``parts()`` of a model.
            weight: its name there, the part's name before it.
        """
        within = weight.split(".")[1:]
        paths = [path for path in self.train if path.split(".")[0] == part and leads(path, within)]
        return max(reversed(paths), key=lambda path: path.count("."), default=None)

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by in an optimizer step (from 0)."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        if self.schedule == "constant":
            return 1.0
        share = (step - rising) / max(1, self.steps - rising)
        shape = 0.5 * (1.0 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1.0 - share
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape


def leads(path: str, within: Sequence[str]) -> bool:
    """Whether a path inside a part leads to a weight: ``*`` stands for any characters of a name, ``**`` for any names.

    Args:
        path: of the part, as in ``lm.**.self_attn``.
        within: the names inside the part that the weight has, from outside to inside.
    """
    return _leads(path.split(".")[1:], within)


def _leads(path: Sequence[str], within: Sequence[str]) -> bool:
    if not path:
        return True
    if path[0] == "**":
        return any(_leads(path[1:], within[k:]) for k in range(len(within) + 1))
    return bool(within) and fnmatchcase(within[0], path[0]) and _leads(path[1:], within[1:])


def paths_in(train: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every path and its rate, of rates that are nested or written with dots."""
    for key, value in train.items() if isinstance(train, Mapping) else ():
        if isinstance(value, Mapping):
            yield from paths_in(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def parts_in(train: Any) -> set[str]:
    """The parts in which something trains."""
    return {path.split(".")[0] for path, rate in paths_in(train) if rate is not None}


KEYS = {field.name for field in dataclasses.fields(Stage)} - {"index", "name"}
BY_HAND = ("module", "train", "objective", "mask", "adapter", "layers", "mix")
"""Keys whose values are read by functions of their own; those of all others are of the fields' types."""

REQUIRED = ("module", "train", "data", "steps", "batch_size")


def parse(cfg: DictConfig, parts: Collection[str] = PARTS) -> list[Stage]:
    """The stages of a composed configuration, in order, checked.

    Args:
        cfg: the whole configuration; read are ``recipe.stages``, ``data.train``, ``objective``, ``mask``, ``adapter``,
            ``trainer.gradient_clip``, ``trainer.devices``, ``budget`` and ``debug``.
        parts: names a stage may train.

    Raises:
        UserError: naming the key that is wrong and what to do.
    """
    node = OmegaConf.select(cfg, "recipe.stages")
    if not node:
        raise UserError("recipe.stages is empty; give at least one stage, as conf/recipe/four_stage.yaml does.")
    limit = _given(cfg, "debug.steps", Count | None)
    names = [str(name) for name in node]
    stages = [_stage(cfg, index, name, parts) for index, name in enumerate(names)]
    for stage in stages:
        if stage.encoder_from is not None and stage.encoder_from not in names[: stage.index]:
            before = listed(names[: stage.index]) if stage.index else "there is none"
            raise UserError(f"{stage.key('encoder_from')}={stage.encoder_from} is not a stage before it ({before}).")
    if not any(stage.steps for stage in stages):
        raise UserError(
            f"{stages[0].key('steps')} is 0, which leaves a stage out, and so is that of all others: nothing is "
            "trained; give one of them steps."
        )
    if limit is not None:
        stages = [dataclasses.replace(stages[0], steps=min(stages[0].steps, int(limit)))]
    return stages


def _stage(cfg: DictConfig, index: int, name: str, parts: Collection[str]) -> Stage:
    where = f"recipe.stages.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise UserError(f"{where}: a stage's name becomes a folder; use letters, digits and _ only.")
    raw = OmegaConf.to_container(OmegaConf.select(cfg, where), resolve=True)
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a mapping; give it {', '.join(REQUIRED)}.")
    keys = {str(key): value for key, value in raw.items()}
    for key in sorted(set(keys) - KEYS):
        near = nearest(key, KEYS) or f"; choose from {', '.join(sorted(KEYS))}"
        raise UserError(f"{where}.{key} is not a key of a stage{near}.")
    for key in REQUIRED:
        if keys.get(key) is None:
            raise UserError(f"{where}.{key} is missing; every stage needs {', '.join(REQUIRED)}.")
    for key in ("objective", "mask"):
        keys[key] = keys[key] if keys.get(key) is not None else _plain(cfg, key)
    keys.setdefault("adapter", _plain(cfg, "adapter"))  # null is a choice: none in this stage
    keys.setdefault("gradient_clip", OmegaConf.select(cfg, "trainer.gradient_clip"))
    keys = {key: value for key, value in keys.items() if value is not None}
    for key in sorted(set(keys) - set(BY_HAND)):
        if (sentence := refusal(hints(Stage)[key], keys[key], f"{where}.{key}")) is not None:
            raise UserError(sentence)
    keys["module"] = _module(keys["module"], where)
    keys["train"] = _rates(keys["train"], where, parts)
    if "layers" in keys:
        keys["layers"] = _ranges(keys["layers"], where, keys["train"])
    if "mix" in keys:
        keys["mix"] = _mix(keys["mix"], where, name)
    _check_choices(keys, where, _plain(cfg, "data.train") or {})
    _check_numbers(keys, where, _ranks(cfg))
    keys["betas"] = (float(keys["betas"][0]), float(keys["betas"][1])) if "betas" in keys else (0.9, 0.999)
    keys["steps"] = scaled_steps(int(keys["steps"]), cfg)
    return Stage(index=index, name=name, **keys)


def _plain(cfg: DictConfig, key: str) -> Any:
    node = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _given(cfg: DictConfig, key: str, kind: Any) -> Any:
    """The value of a key, None where it is absent; a UserError where it has another type."""
    value = _plain(cfg, key)
    if (sentence := refusal(kind, value, key)) is not None:
        raise UserError(sentence)
    return value


def scaled_steps(steps: int, cfg: DictConfig) -> int:
    """Steps after ``budget.steps_scale`` and ``budget.max_steps``."""
    scale, most = _given(cfg, "budget.steps_scale", Positive | None), _given(cfg, "budget.max_steps", Count | None)
    scaled = math.ceil(round(steps * (1.0 if scale is None else float(scale)), 9))
    return scaled if most is None else min(scaled, int(most))


def _module(value: Any, where: str) -> str:
    path = value.get("_target_") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or "." not in path:
        raise UserError(
            f"{where}.module={shown(path)} is not a class; give its dotted path, as in "
            "vlmlab.engine.alignment.AlignmentModule."
        )
    return path


def _rates(value: Any, where: str, parts: Collection[str]) -> dict[str, float | None]:
    if not parts_in(value):
        raise UserError(f"{where}.train is empty; give a learning rate to at least one of {', '.join(parts)}.")
    rates: dict[str, float | None] = {}
    for path, rate in paths_in(value):
        part, *within = path.split(".")
        if part not in parts:
            raise UserError(f"{where}.train.{part} is not a part of the model; choose from {', '.join(parts)}.")
        if not all(within):
            raise UserError(f"{where}.train.{path} has an empty name in it; write names with one dot between them.")
        if rate is None and not within:  # frozen, written out
            continue
        if (sentence := refusal(NotNegative | None, rate, f"{where}.train.{path}")) is not None:
            raise UserError(sentence)
        rates[path] = None if rate is None else float(rate)
    return rates


def _ranges(value: Any, where: str, train: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}.layers={value} is not a mapping; give ranges as in {{lm: [-2, -1]}}, or null.")
    ranges = {}
    for part, ends in value.items():
        key = f"{where}.layers.{part}"
        if part not in LAYERED:
            raise UserError(f"{key} is not a part made of layers; choose from {', '.join(LAYERED)}.")
        if ends is None:  # the whole part, written out
            continue
        if part not in parts_in(train):
            raise UserError(f"{key} chooses layers of a part that is frozen; add {where}.train.{part}.")
        pair = list(ends) if isinstance(ends, (list, tuple)) else []
        if len(pair) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in pair):
            raise UserError(f"{key}={ends} is not a range; give the first and the last layer, as in [-2,-1].")
        if (pair[0] < 0) == (pair[1] < 0) and pair[0] > pair[1]:
            raise UserError(f"{key}={pair} is empty; give the lower layer first, as in [-2,-1].")
        ranges[str(part)] = (pair[0], pair[1])
    return ranges


def _mix(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("run", ""), str | None):
        raise UserError(f"{where}.mix={value} names no run; give {{run: <its folder>, share: 0.5}}, or null.")
    for key in value:
        if key not in ("run", "share", "stage"):
            raise UserError(f"{where}.mix.{key} is not a key of mix; choose from run, share, stage.")
    share = value.get("share", 0.5)
    if (sentence := refusal(Share, share, f"{where}.mix.share")) is not None:
        raise UserError(sentence)
    if "run" not in value or (value["run"] is None and value.get("stage") is not None):
        raise UserError(
            f"{where}.mix={value} names no run; give {{run: <its folder>}}, or {{run: null}} for its start."
        )
    return {"run": value["run"], "share": float(share), "stage": str(value.get("stage") or name)}


def _check_choices(keys: Mapping[str, Any], where: str, sources: Collection[str]) -> None:
    if keys["data"] not in sources:
        raise UserError(f"{where}.data={shown(keys['data'])} is not in data.train; choose from {listed(sources)}.")
    if not isinstance(keys.get("objective"), Mapping):
        raise UserError(f"{where}.objective is missing; give one with _target_, or a mapping of several.")


def _ranks(cfg: DictConfig) -> Any:
    """The devices of a run over all of its machines, where their number is given."""
    devices = OmegaConf.select(cfg, "trainer.devices")
    nodes = OmegaConf.select(cfg, "trainer.nodes") or 1
    return devices * nodes if isinstance(devices, int) and devices > 0 else devices


def _check_numbers(keys: Mapping[str, Any], where: str, devices: Any) -> None:
    layer_decay = keys.get("layer_decay", 1.0)
    if layer_decay != 1.0 and not parts_in(keys["train"]) & set(LAYERED):
        raise UserError(f"{where}.layer_decay={layer_decay} has no layers to act on; train encoder or lm, or give 1.")
    if isinstance(devices, int) and devices > 0:
        check_divides(keys["batch_size"], keys.get("accumulate", 1), devices, where)


def drawn_from(cfg: DictConfig, size: int) -> int:
    """How many of a source's samples the stages draw from: all, or the first few with ``debug.overfit``."""
    few = int(OmegaConf.select(cfg, "debug.overfit") or 0)
    return min(size, few) if few else size


def check_divides(batch_size: int, accumulate: int, ranks: int, where: str) -> None:
    """Refuse a batch that does not split evenly over ranks and micro-batches.

    Raises:
        UserError: naming ``<where>.batch_size``.
    """
    if batch_size % (accumulate * ranks):
        raise UserError(
            f"{where}.batch_size={batch_size} does not divide by accumulate={accumulate} times "
            f"trainer.devices={ranks}; choose a multiple of {accumulate * ranks}."
        )
