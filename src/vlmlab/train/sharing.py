"""Stages that several runs have in common, each trained once: what makes two stages the same, and who trains.

The address of a stage is made of everything its weights depend on: the bits of every weight it begins with (and by them
the towers, the seed and all stages before), the stage's own keys, what else it reads of the configuration
(`vlmlab.runs.identity.stage_leaves`), the fingerprint of its data, the code, the versions and the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.cache.address import code_of
from vlmlab.contracts.sample import SampleSource
from vlmlab.data.fingerprint import source_fingerprint
from vlmlab.data.skipped import Skipped, note, noted
from vlmlab.engine import proof
from vlmlab.engine.precision import on_gpu
from vlmlab.engine.restore import weights_file
from vlmlab.engine.weights import StagedModel, plain_key
from vlmlab.recipe.stage import Stage
from vlmlab.runs.config import leaves, plain
from vlmlab.runs.environment import code_fingerprint
from vlmlab.runs.files import read_json, write_json
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.identity import LENGTH, leaves_about, stage_leaves
from vlmlab.runs.origin import put_file
from vlmlab.runs.shared import FACTS, KEY, SEVERAL_RANKS, Place, Shared, held, shelf_of, unshared
from vlmlab.runs.withheld import hidden, stored

FORMAT = 2
"""Of a stage on a shelf; part of its address."""


class Sharing:
    """What one run shares.

    Args:
        cfg: its configuration.
        folder: its folder.
        say: takes a line.

    Attributes:
        shelf: the folder of shared stages; None: nothing is shared.
    """

    def __init__(self, cfg: DictConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.cfg, self.folder, self.say = cfg, folder, say
        self.shelf = shelf_of(OmegaConf.select(cfg, KEY), folder.path)
        ranks = SEVERAL_RANKS if int(os.environ.get("WORLD_SIZE", "1")) != 1 else ""
        if self.shelf is not None and (reason := unshared(plain(cfg)) or ranks):
            self.say(f"stages are not shared with other runs: {reason}")
            self.shelf = None

    @contextmanager
    def place(self, stage: Stage, staged: StagedModel, source: SampleSource) -> Iterator[CommonStage | None]:
        """The stage's place on the shelf, this run's alone while it is open; None where the stage is not shared."""
        if self.shelf is None or stage.mix is not None or not (staged.trained() and stage.steps):
            yield None
            return
        about = describe(self.cfg, stage, staged, source, self.folder)
        with ExitStack() as stack:
            common = None
            try:
                place = stack.enter_context(held(self.shelf, address(about), self.say))
                shown = hidden(about, stored(self.cfg), plain(self.cfg))
                common = CommonStage(place, shown, stage, self.folder, self.say)
            except OSError as error:
                self.say(f"this stage is not shared: {self.shelf} cannot be used ({error.strerror})")
            yield common


class CommonStage:
    """A stage that other runs may have, too, while this run holds it.

    Args:
        place: on the shelf.
        about: what its address is made of, as it may be written down.
        stage: the stage.
        folder: the run folder.
        say: takes a line.
    """

    def __init__(
        self, place: Place, about: Mapping[str, Any], stage: Stage, folder: RunFolder, say: Callable[[str], None]
    ) -> None:
        self.place, self.about, self.stage, self.folder, self.say = place, about, stage, folder, say
        self.weights = weights_file(folder.path, stage)
        self.data = f"data.train.{stage.data}"

    def take(self) -> list[dict[str, Any]] | None:
        """Have the run folder be as if the stage had been trained here; its rows of ``metrics.jsonl``, or None."""
        shared = self.place.look()
        if shared is None:
            return None
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        self.folder.cut_back(self.stage.name, -1)
        for row in shared.rows:
            self.folder.log(row)
        note(self.folder.path, self.data, [Skipped(str(row["id"]), str(row["reason"])) for row in shared.skipped])
        write_json(self.weights.with_name(FACTS), shared.facts, durable=True)
        put_file(shared.weights, self.weights)  # last: where it is, the stage is finished
        self.weights.with_name("last.ckpt").unlink(missing_ok=True)
        self.place.sign(self.folder.path)
        self.say(f"taken from {self.place.folder}: the same stage was trained for another run")
        return shared.rows

    def give(self) -> None:
        """Put the stage that was trained here on the shelf, if the disk takes it."""
        shared = Shared(
            weights=self.weights,
            facts=read_json(self.weights.with_name(FACTS)) or {},
            rows=[row for row in self.folder.metrics() if row.get("stage") == self.stage.name],
            skipped=[row for row in noted(self.folder.path) if row["data"] == self.data],
        )
        try:
            self.place.put(shared, self.about)
            self.place.sign(self.folder.path)
        except OSError as error:
            self.say(f"this stage is not shared: {self.place.folder} does not take it ({error.strerror})")


def describe(
    cfg: DictConfig, stage: Stage, staged: StagedModel, source: SampleSource, folder: RunFolder
) -> dict[str, Any]:
    """All that the result of a stage depends on, as plain values.

    Args:
        cfg: the configuration.
        stage: the stage.
        staged: the model, which has entered it.
        source: its samples.
        folder: the run's, whose ``env.json`` has the versions.
    """
    config, env = plain(cfg), folder.env()
    about = {
        "format": FORMAT,
        "stage": asdict(stage),
        "read": stage_leaves(config, stage.data),
        "length": OmegaConf.select(cfg, LENGTH),
        "machine": leaves_about(config, "execution"),
        "data": source_fingerprint(source),
        "watched": _watched(cfg, stage),
        "log_every": OmegaConf.select(cfg, "trainer.log_every"),
        "weights": _weights(staged),
        "kept": sorted(staged.kept()),
        "begun": staged.begun(),
        "towers": staged.sources(),
        "code": code_fingerprint(),
        "versions": {"python": env.get("python"), "platform": env.get("platform"), **env.get("packages", {})},
        "device": torch.cuda.get_device_name() if on_gpu(cfg) else torch.backends.cpu.get_cpu_capability(),
    }
    about = json.loads(json.dumps(about, default=str))
    return about | {"classes": _digest(code_of([*map(type, staged.model.modules()), *_named(about)]))}


def _watched(cfg: DictConfig, stage: Stage) -> Any:
    """What the rows of validation depend on, with ``evaluation.every``; None without."""
    names = dict.fromkeys([stage.data, *(OmegaConf.select(cfg, "evaluation.watched") or ())])
    held_out = [node for name in names if (node := plain_key(cfg, f"data.val.{name}")) is not None]
    asked = OmegaConf.select(cfg, "evaluation.slices") or ()
    held_out += [node for name in asked if (node := plain_key(cfg, f"data.benchmarks.{name}.source")) is not None]
    if not OmegaConf.select(cfg, "evaluation.every") or not held_out:
        return None
    return [plain_key(cfg, "evaluation"), held_out, [source_fingerprint(instantiate(node)) for node in held_out]]


def address(about: Mapping[str, Any]) -> str:
    """32 hexadecimal digits, equal for equal descriptions only."""
    return _digest(about)


def _weights(staged: StagedModel) -> str:
    tensors = {**staged.frozen(), **staged.live()}
    bits = proof.fingerprints(tensors.items())
    return _digest(sorted((name, list(t.shape), str(t.dtype), bits[name]) for name, t in tensors.items()))


def _named(about: Mapping[str, Any]) -> Iterator[Any]:
    """The classes and functions that the configuration names."""
    for key, value in leaves(about, deep=True):
        if key.rpartition(".")[2] in ("_target_", "module") and isinstance(value, str):
            yield get_object(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
