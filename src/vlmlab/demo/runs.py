"""The runs that a demo shows: their models, what they are made of, and test pictures to ask about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from vlmlab.analyse.report import headlines, plain_part
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Image, Sample
from vlmlab.data.overlap import spread
from vlmlab.evaluate.baselines import Shuffled
from vlmlab.loading import LoadedModel, load
from vlmlab.runs.folder import RunFolder

PARTS = ("encoder", "connector", "fusion", "lm", "mask", "memory_mask", "adapter")
"""Groups of a run that are named on the page."""

CHOICE = 78
"""Characters of a test question in the list of them."""


@dataclass(frozen=True)
class Shown:
    """One run of the demo.

    Attributes:
        letter: A or B.
        name: of its folder.
        model: what answers.
        result: the contents of its ``result.json``.
    """

    letter: str
    name: str
    model: LoadedModel
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A test sample of a run to ask about, with the pictures of another one.

    Attributes:
        name: benchmark and place in it.
        question: of its first turn; image tags only where there are several pictures.
        answers: what is right.
        right: its pictures.
        wrong: those that the shuffled baseline gives it.
    """

    name: str
    question: str
    answers: Sequence[str]
    right: tuple[Image, ...]
    wrong: tuple[Image, ...]

    @property
    def label(self) -> str:
        """As it stands in the list of them."""
        text = f"{self.name}: {self.question}"
        return text if len(text) <= CHOICE else text[: CHOICE - 1] + "…"


@dataclass(frozen=True)
class Row:
    """One line of the table of runs: a key, its value in each run, and whether they differ."""

    key: str
    values: Sequence[str]
    differs: bool


def open_runs(folders: Sequence[Path], device: str, trust: bool) -> list[Shown]:
    """Load the models.

    Raises:
        UserError: one of them cannot be loaded, as ``vlmlab.load`` says.
    """
    shown = []
    for letter, folder in zip("AB", folders, strict=False):
        model = load(folder, device=device, trust=trust)
        shown.append(Shown(letter, folder.resolve().name, model, RunFolder(folder).result() or {}))
    return shown


def rows(runs: Sequence[Shown]) -> list[Row]:
    """What the runs are made of, and their scores."""
    configs: list[Any] = [OmegaConf.to_container(run.model.config, resolve=True) for run in runs]
    table = [(part, _parts([config.get(part) for config in configs])) for part in PARTS]
    stages = [" → ".join((config.get("recipe") or {}).get("stages") or ()) for config in configs]
    table += [("stages", stages), ("seed", [str(config.get("seed")) for config in configs])]
    scores = [_scores(run.result) for run in runs]
    table += [(name, [each.get(name, "") for each in scores]) for name in dict.fromkeys(chain(*scores))]
    return [Row(key, values, len({*values}) > 1) for key, values in table if any(values)]


def _parts(nodes: Sequence[Any]) -> list[str]:
    """The class of a part in every run; where it is the same, in brackets its settings that are not."""
    found = [plain_part(node) for node in nodes]
    if len({name for name, _ in found}) > 1:
        return [name for name, _ in found]
    first = found[0][1]
    same = {key for key, value in first.items() if all(key in own and own[key] == value for _, own in found)}
    return [_written(name, {k: v for k, v in settings.items() if k not in same}) for name, settings in found]


def _written(name: str, settings: Mapping[str, Any]) -> str:
    said = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"{name} ({said})" if said else name


def _scores(result: Mapping[str, Any]) -> dict[str, str]:
    """Benchmark and score -> the value, with the levels that it is to be compared with."""
    heads = headlines({k: v for k, v in (result.get("metrics") or {}).items() if isinstance(v, int | float)})
    return {
        f"{head['benchmark']}, {head['score']}": head["value"] + (f" ({head['beside']})" if head["beside"] else "")
        for head in heads
    }


def examples(config: Any, count: int) -> tuple[list[Example], str]:
    """Samples of a run's benchmarks in turn, spread over each; and why there are none, in one sentence.

    Args:
        config: the run's configuration.
        count: how many at most.
    """
    found, why = [], "This run has no benchmark with pictures: upload one."
    for name, benchmark in (OmegaConf.select(config, "data.benchmarks") or {}).items():
        try:
            found.append(_of(str(name), instantiate(benchmark.source), count))
        except (UserError, OSError) as error:
            why = f"The test pictures of {name} cannot be read ({error}): upload one."
    mixed = [one for turn in zip_longest(*found) for one in turn if one is not None][:count]
    return mixed, "" if mixed else why


def _of(name: str, source: Any, count: int) -> list[Example]:
    shuffled = Shuffled(source)
    pairs = ((index, source[index]) for index in spread(range(len(source)), count))
    return [_picture(name, index, sample, shuffled[index]) for index, sample in pairs if sample.images]


def _picture(name: str, index: int, sample: Sample, wrong: Sample) -> Example:
    turn = sample.turns[0]
    question = turn.prompt if len(sample.images) > 1 else turn.prompt.replace(IMAGE_TAG, "").strip()
    answers = tuple(dict.fromkeys([turn.answer, *turn.references]))
    return Example(f"{name} #{index}", question, answers, sample.images, wrong.images)
