"""All pairs: rows in which every choice of a group meets every choice of every other, and what becomes of a row."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from tests.test_conf import CONF, composed
from vlmlab.cli.rules import check
from vlmlab.contracts.errors import UserError, user_error_in
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder

Row = dict[str, str]
Value = tuple[str, str]

DEFAULTS: Row = {
    "connector": "mlp", "recipe": "two_stage", "adapter": "none", "objective": "lm",
    "mask": "bidir", "encoder": "embedded", "fusion": "concat",
}  # fmt: skip
"""The groups that are paired, and what fills a row where nothing is left to cover."""

PAIRS = (
    "contrastive",
    "contrastive_then_vlm",
    "dc_clip",
    "fdt",
    "fg_clip_2",
    "lexvla",
    "medslip",
    "ood_vlm_distill",
    "priorclip",
)
LEFT_OUT = {
    ("encoder", "scratch"), ("recipe", "embedded_towers"), ("recipe", "embedded_text_tower"),
    *(("recipe", name) for name in PAIRS),
}  # fmt: skip
"""They rebuild the towers, or train two towers, for which most groups have nothing to choose.
Encoders with a path of their own, and recipes of presets at real size, are left out too."""

BESIDE = ("cluster_attribution", "dc_clip", "hard_negatives", "medslip", "ood_vlm_distill", "overuse", "text_contrast")
"""Objectives of two towers."""

ALONE = {
    ("fusion", "none"), ("mask", "visual_rows_open"), ("recipe", "blip2"),
    *(("objective", name) for name in ("siglip", "clip", "itc", "itm", "itg", "blip2", *BESIDE)),
}  # fmt: skip
"""Choices that go with few others, or leave vision out: they fill no row that tests other pairs and might hide them."""

RATE = 1e-3
"""Of objectives with weights of their own, in every stage."""

FEW = ("budget=test", "precision=fp32", "trainer.progress=false", "trainer.save_every_s=3600")


def real_size() -> set[Value]:
    """Recipes of presets that bring an LM of the hub; each is named as its preset."""
    presets = [path for path in (CONF / "preset").glob("*.yaml") if "override /lm:" in path.read_text()]
    return {("recipe", path.stem) for path in presets}


def factors() -> dict[str, list[str]]:
    """Every choice of every paired group, by globbing, the default first."""
    found = {}
    for group, default in DEFAULTS.items():
        paths = [path for path in (CONF / group).glob("*.yaml") if "path" not in list(OmegaConf.load(path))]
        names = {path.stem for path in paths if (group, path.stem) not in LEFT_OUT | real_size()}
        found[group] = [default, *sorted(names - {default})]
    return found


def pairs_of(row: Row) -> set[frozenset[Value]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def design(choices: Mapping[str, Sequence[str]] | None = None) -> list[Row]:
    """Rows that hold every pair at least once: greedy, without chance, choices that combine with nothing last."""
    choices = choices or factors()
    every = [(group, name) for group, names in choices.items() for name in names]
    open_pairs = {frozenset(p): p for p in itertools.combinations(every, 2) if p[0][0] != p[1][0]}
    rows = []
    for pair in sorted(open_pairs.values(), key=lambda pair: len(ALONE.intersection(pair))):
        if frozenset(pair) not in open_pairs:
            continue
        row = dict(pair)
        for group, names in choices.items():
            if group not in row:
                row[group] = max(
                    (name for name in names if (group, name) not in ALONE),
                    key=lambda name: sum(frozenset(((group, name), other)) in open_pairs for other in row.items()),
                )
        rows.append({group: row[group] for group in choices})
        for covered in pairs_of(row):
            open_pairs.pop(covered, None)
    return rows


class Compositions:
    """Configurations of rows, put together from one composition per choice (Hydra takes most of a second for each)."""

    def __init__(self) -> None:
        self.base = composed(*FEW)
        OmegaConf.set_struct(self.base, False)
        self.parts: dict[Value, Any] = {}

    def __call__(self, row: Row) -> DictConfig:
        """The row with its first and last stage, four samples a step; extra objectives are added to ``lm``."""
        cfg = copy.deepcopy(self.base)
        for group, name in row.items():
            cfg[group] = copy.deepcopy(self._part(group, name))
        if row["objective"] not in ("lm", "blip2", "itc", "itm", "itg", "siglip", "clip", *BESIDE):
            cfg.objective = {"lm": self._part("objective", "lm"), row["objective"]: cfg.objective}
        stages = cfg.recipe.stages
        for middle in list(stages)[1:-1]:
            stages.pop(middle)
        for stage in stages.values():
            stage.batch_size, stage.accumulate = 4, 1
            stage.train.objective = stage.train.get("objective") or RATE
        return cfg

    def _part(self, group: str, name: str) -> Any:
        if (group, name) not in self.parts:
            self.parts[group, name] = composed(f"{group}={name}")[group]
        return self.parts[group, name]


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
        row: the choices.
        kind: "ran", "rule" (refused before torch), "refused" (by a sentence, later) or "failed".
        message: the sentence or the exception.
        seconds: until then.
    """

    row: Row
    kind: str
    message: str
    seconds: float


def attempt(row: Row, make: Compositions, folder: Path) -> Outcome:
    """Two optimizer steps in the first and the last stage, without benchmarks."""
    cfg = make(row)
    begin = time.perf_counter()
    try:
        kind, message = _attempt(cfg, row, folder)
    except Exception as error:  # whatever else comes is what this design looks for
        kind, message = "failed", f"{type(error).__name__}: {error}".strip()
    return Outcome(row, kind, message, time.perf_counter() - begin)


def _attempt(cfg: DictConfig, row: Row, folder: Path) -> tuple[str, str]:
    try:
        config = plain(cfg)
        check(cfg, config, row)
    except UserError as error:
        return "rule", str(error)
    from vlmlab.train.run import train

    try:
        with RunFolder(folder) as run:
            run.open(config)
            train(cfg, folder, lambda model, cfg, folder: {})
    except UserError as error:
        return "refused", str(error)
    except InstantiationException as error:
        mistake = user_error_in(error)
        if mistake is None:
            raise
        return "refused", str(mistake)
    return "ran", ""


def summary(outcomes: Sequence[Outcome]) -> str:
    """Counts of rows and pairs, one line each."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    met = set().union(*(pairs_of(outcome.row) for outcome in outcomes))
    ran = set().union(*(pairs_of(outcome.row) for outcome in outcomes if outcome.kind == "ran"))
    rows = ", ".join(f"{kinds[kind]} {kind}" for kind in ("ran", "rule", "refused", "failed"))
    return f"{len(outcomes)} rows: {rows}\n{len(met)} pairs: {len(ran)} ran, {len(met - ran)} only in rows that did not"


def sentences(outcomes: Sequence[Outcome]) -> str:
    """Every message that was not a run, how often, and the first row it came from."""
    lines = []
    messages = Counter((outcome.kind, outcome.message) for outcome in outcomes if outcome.kind != "ran")
    for (kind, message), count in messages.most_common():
        first = next(outcome.row for outcome in outcomes if outcome.message == message)
        changed = " ".join(f"{group}={name}" for group, name in first.items() if name != DEFAULTS[group])
        lines.append(f"{kind} x{count}: {message}\n    {changed}")
    return "\n".join(lines)
