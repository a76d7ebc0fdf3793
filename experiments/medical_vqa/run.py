"""VQA-RAD and SLAKE through instruction tuning: ``python experiments/medical_vqa/run.py --help``.

Runs one sweep per data set, as the printed commands would by hand, and writes ``table.md`` and ``table.csv`` from the
answers in their folders. Cells that are finished are not run again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from sweeps import command, cpu_hours, markdown, number, run_sweeps  # noqa: E402, I001  # first: it finds the package
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from vlmlab.contracts.sample import Turn, turns_of  # noqa: E402
from vlmlab.evaluate.lookup import Lookup, commonest  # noqa: E402
from vlmlab.analyse.results import RunRecord, read_sweep  # noqa: E402
from vlmlab.analyse.stats import FEWEST_PAIRS, Interval, mean_interval  # noqa: E402
from vlmlab.analyse.combination import Combination  # noqa: E402
from vlmlab.analyse.sweep import combinations  # noqa: E402
from vlmlab.evaluate.metrics.rows import Row, read_rows  # noqa: E402
from vlmlab.evaluate.metrics.scoring import BASELINES, predictions_file  # noqa: E402
from vlmlab.evaluate.metrics.vqa import VqaAccuracy, normalise  # noqa: E402

SETS = ("vqa_rad", "slake")
SIZES = "64,128"
RECIPE = [
    "recipe=joint", "recipe.stages.joint.batch_size=8", "recipe.stages.joint.steps=240",
    "+recipe.stages.joint.optimizer=muon", "+recipe.stages.joint.train.encoder=1e-3",
    "recipe.stages.joint.train.connector=5e-3", "recipe.stages.joint.train.lm=5e-3",
]  # fmt: skip
"""One stage: encoder, connector and LM together, since none of the towers has seen a radiograph or a medical word."""
KINDS: dict[str, Callable[[str, str], bool]] = {
    "yes/no": lambda kind, answer: normalise(answer) in ("yes", "no"),
    "open": lambda kind, answer: kind == "open",
}
"""Questions by the data set's own word for their kind and by their answer; other closed ones are in no row."""
SHOWN = ("", *BASELINES)


def main() -> int:
    """Run what is left of the chosen sweeps and write the table; the exit code of the worst sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="has vqa_rad/ and slake/")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="default", choices=("test", "default"))
    parser.add_argument("--at", type=Path, default=ROOT, help="folder to run the commands from; sweeps/ is made in it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of table.md and table.csv")
    parser.add_argument("--table", action="store_true", help="only write the table from what is there")
    given = parser.parse_args()
    words = {name: overrides(name, given.budget, given.seeds, given.data, given.at) for name in given.only}
    chosen = [] if given.table else given.only
    worst = run_sweeps({folder_of(name, given.budget): words[name] for name in chosen}, given.at)
    given.out.mkdir(parents=True, exist_ok=True)
    scores = [score for name in words for score in scored(given.at / "sweeps" / folder_of(name, given.budget), name)]
    (given.out / "table.csv").write_text(as_csv(scores), encoding="utf-8")
    text = page(words, scores, given.at / "sweeps", given.budget)
    (given.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return worst


# -- the sweeps --------------------------------------------------------------------------------------------------------


def folder_of(name: str, budget: str) -> str:
    """Name of a sweep."""
    return f"medical_vqa_{name}" + ("" if budget == "default" else f"_{budget}")


def overrides(name: str, budget: str, seeds: str, data: Path, at: Path) -> list[str]:
    """What stands behind ``python train.py -m``."""
    root = os.path.relpath(data / name, at)
    return [
        f"name={folder_of(name, budget)}", f"seed={seeds}", f"encoder.image_size={SIZES}", f"budget={budget}",
        f"data={name}", f"data.path={root}/vqa.json", f"data.images={root}", "data.suffix=''", *RECIPE,
        "evaluation.held_out=[instruct]",
    ]  # fmt: skip


# -- the scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Answers to the questions of one kind, over the seeds.

    Attributes:
        data, pixels, kind: which.
        tokens: visual tokens.
        questions: how many.
        accuracy: of the model, and with wrong images and without any (keys of ``SHOWN``).
        constant: accuracy of the commonest training answer of that kind, whatever is asked.
        lookup: accuracy of the commonest training answer to the question's own words (`vlmlab.evaluate.lookup`).
    """

    data: str
    pixels: str
    tokens: float | None
    kind: str
    questions: int
    accuracy: dict[str, Interval]
    constant: float
    lookup: float


def scored(sweep: Path, name: str) -> list[Score]:
    """The scores of a sweep's finished cells, from their prediction files."""
    return [score for row in combinations(read_sweep(sweep)) if row.finished for score in _scores(row, name)]


def _scores(row: Combination, name: str) -> list[Score]:
    runs = [{shown: _answers(record, name, shown) for shown in SHOWN} for record in row.finished]
    taught = training_turns(OmegaConf.load(row.finished[0].folder / "config.yaml"))
    lookup = Lookup(taught)
    found = []
    for kind, belongs in KINDS.items():
        chosen = [
            {shown: [r for r in run[shown] if belongs(r.kind, r.references[0])] for shown in SHOWN} for run in runs
        ]
        if not chosen[0][""]:
            continue
        constant = commonest(Counter(turn.answer for turn in taught if belongs(turn.kind, turn.answer)))
        found.append(
            Score(
                data=name,
                pixels=row.values.get("encoder.image_size", "64"),
                tokens=row.cost("visual_tokens"),
                kind=kind,
                questions=len(chosen[0][""]),
                accuracy={shown: mean_interval([accuracy(run[shown]) for run in chosen]) for shown in SHOWN},
                constant=accuracy([replace(r, prediction=constant) for r in chosen[0][""]]),
                lookup=accuracy([replace(r, prediction=lookup.answer(r.prompt, r.kind)) for r in chosen[0][""]]),
            )
        )
    return found


def _answers(record: RunRecord, name: str, shown: str) -> list[Row]:
    return read_rows(predictions_file(record.folder, f"{name}_test", shown))


def accuracy(rows: Sequence[Row]) -> float:
    """Mean accuracy of answers."""
    metric = VqaAccuracy()
    return fmean(metric.score(row) for row in rows)


def training_turns(config: DictConfig) -> list[Turn]:
    """All training questions of a run, none of its images."""
    source = instantiate(config.data.train.instruct)
    return [turn for index in range(len(source)) for turn in turns_of(source, index)]


# -- the table ---------------------------------------------------------------------------------------------------------


def as_csv(scores: Sequence[Score]) -> str:
    """One line per data set, size, kind and evaluation."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["data", "pixels", "visual_tokens", "kind", "questions", "shown", "n", "accuracy", "low", "high"])
    for s in scores:
        first = [s.data, s.pixels, number(s.tokens, 0), s.kind, s.questions]
        for shown, i in s.accuracy.items():
            writer.writerow([*first, shown or "right image", i.n, i.mean, i.low, i.high])
        writer.writerow([*first, "commonest training answer", "", s.constant, "", ""])
        writer.writerow([*first, "lookup", "", s.lookup, "", ""])
    return out.getvalue()


def page(words: Mapping[str, Sequence[str]], scores: Sequence[Score], sweeps: Path, budget: str) -> str:
    """The page that is committed."""
    today = datetime.date.today().isoformat()
    lines = [f"Made on {today} from the sweeps below; every interval is a 95 % t interval over seeds.", ""]
    if not scores:
        return "\n".join([*lines, "No cell is finished."])
    seeds = min(score.accuracy[""].n for score in scores)
    spent = sum(cpu_hours(sweeps / folder_of(name, budget)) for name in words)
    claim = f" Fewer than {FEWEST_PAIRS} seeds support no significance claim." if seeds < FEWEST_PAIRS else ""
    lines += ["```", *(command(text) for text in words.values()), "```", ""]
    lines += [f"`budget={budget}`, {spent:.2f} CPU-hours in all; n is the number of seeds.{claim}", ""]
    titles = ["data", "pixels", "visual tokens", "kind", "questions", "n", "accuracy", "shuffled", "no image",
              "commonest training answer", "lookup"]  # fmt: skip
    rows = []
    for s in scores:
        first = [s.data, s.pixels, number(s.tokens, 0), s.kind, str(s.questions), str(s.accuracy[""].n)]
        levels = [number(s.constant, 3), number(s.lookup, 3)]
        rows.append([*first, *(number(s.accuracy[shown]) for shown in SHOWN), *levels])
    return "\n".join([*lines, *markdown(titles, rows), ""])


if __name__ == "__main__":
    sys.exit(main())
