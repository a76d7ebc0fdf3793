"""A first look at the user's files, so that a broken one is found before hours of training and not after them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.terminal import tell
from vlmlab.data.overlap import Stored, reads, same_bytes, sentence, stored_images
from vlmlab.data.provenance import KEY, changed_data, data_of, shown
from vlmlab.data.skipped import next_usable
from vlmlab.runs.data import CHANGED
from vlmlab.runs.folder import RunFolder


def check_sources(cfg: DictConfig) -> list[str]:
    """Read every file that training and scoring will need, and one sample of each.

    Returns:
        What is worth saying: images on both sides.

    Args:
        cfg: the composed configuration; read are ``recipe.stages``, ``data`` and ``evaluation.held_out``.

    Raises:
        UserError: a file or its first sample cannot be used; says which.
    """
    seen: set[str] = set()
    kept: dict[str, list[Stored]] = {}
    for key, node in _used(cfg):
        described = json.dumps(OmegaConf.to_container(node, resolve=True), sort_keys=True, default=str)
        if described in seen:
            continue
        seen.add(described)
        source = instantiate(node)
        if not len(source):
            raise DataError(f"{key} has no samples; check the file and the split it is for")
        next_usable(source, 0, None, []) if OmegaConf.select(cfg, "data.max_bad_fraction") else source[0]
        kept[key] = stored_images(source)
    trained = [key for key in kept if key.startswith("data.train.")]
    pairs = [(key, other) for key in trained for other in kept if other not in trained]
    shared = {pair: same_bytes(kept[pair[0]], kept[pair[1]]) for pair in pairs}
    return [sentence(found, *pair) for pair, found in shared.items() if found]


def check_same(run: RunFolder, cfg: DictConfig) -> None:
    """Note the fingerprints of a run's data, and refuse to go on with a training whose data have changed.

    Before anything was learnt, or after the training, other data are reported and used: what was learnt is kept, and
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
        tell(f"note: since this run began its data have changed: {shown([*learnt, *scored])}")
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
