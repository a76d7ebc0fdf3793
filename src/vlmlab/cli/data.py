"""A first look at the user's files, so that a broken one is found before hours of training and not behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.provenance import KEY, changed_data, data_of, shown
from vlmlab.data.skipped import next_usable
from vlmlab.runs.data import CHANGED
from vlmlab.runs.folder import RunFolder

FILE = "path"
"""Key of a source that reads a file; one without it is generated and cannot be broken."""


def check_sources(cfg: DictConfig) -> None:
    """Read every file that training and scoring will need, and one sample of each.

    Args:
        cfg: the composed configuration; read are ``recipe.stages``, ``data`` and ``evaluation.held_out``.

    Raises:
        UserError: a file or its first sample cannot be used; says which.
    """
    seen: set[str] = set()
    for key, node in _used(cfg):
        described = json.dumps(OmegaConf.to_container(node, resolve=True), sort_keys=True, default=str)
        if described in seen:
            continue
        seen.add(described)
        source = instantiate(node)
        if not len(source):
            raise DataError(f"{key} has no samples; check the file and the split it is for")
        next_usable(source, 0, None, []) if OmegaConf.select(cfg, "data.max_bad_fraction") else source[0]


def check_same(run: RunFolder, cfg: DictConfig) -> None:
    """Note the fingerprints of a run's data, and refuse to go on with a training whose data have changed.

    Before anything was learnt, or behind the training, other data are said and taken: what was learnt stands, and
    scores of a benchmark that is another now are made anew.

    Args:
        run: the folder, opened.
        cfg: the composed configuration.

    Raises:
        UserError: naming the sources and what changed.
    """
    before, now = run.env().get(KEY) or {}, data_of(cfg)
    learnt = changed_data(before, now, ("train",))
    if learnt and run.learnt() and not run.trained():
        raise UserError(
            f"{run.path} has learnt from other data: {shown(learnt)}; put the old data back, or choose another "
            "name=... or fresh=true to train on the present ones"
        )
    scored = changed_data(before, now, ("val", "benchmarks"))
    if learnt or scored:
        print(f"note: since this run began its data have changed: {shown([*learnt, *scored])}", flush=True)
    if scored:
        run.keep_aside()
    if learnt and run.trained():
        now = {**now, "train": before["train"]}  # what it was trained on
    run.update_env(**{KEY: now, CHANGED: ""})


def _used(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Key and configuration of every source with a file that this run reads."""
    stages = OmegaConf.to_container(cfg.recipe.stages, resolve=True)
    trained = [stage.get("data") for stage in stages.values() if isinstance(stage, Mapping)]  # type: ignore[union-attr]
    held_out = OmegaConf.select(cfg, "evaluation.held_out") or []
    nodes: list[tuple[str, Any]] = [
        *((f"data.train.{name}", OmegaConf.select(cfg, f"data.train.{name}")) for name in dict.fromkeys(trained)),
        *((f"data.val.{name}", OmegaConf.select(cfg, f"data.val.{name}")) for name in held_out),
        *(
            (f"data.benchmarks.{name}.source", benchmark.get("source"))
            for name, benchmark in (OmegaConf.select(cfg, "data.benchmarks") or {}).items()
        ),
    ]
    return ((key, node) for key, node in nodes if isinstance(node, DictConfig) and reads(node))


def reads(node: DictConfig) -> bool:
    """Whether a source, or one of those it is mixed from, reads a file."""
    return node.get(FILE) is not None or any(reads(part) for part in node.get("sources") or ())
