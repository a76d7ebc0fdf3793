"""When does each connector and fusion begin to look, and how little training answers: ``run.py --help``.

Runs the sweeps below one after the other, exactly as the printed commands would by hand, and writes ``table.md`` and
``figure.png`` from what their folders hold. Every number of the sweep over shares is kept in ``budget.csv``. Cells that
are finished are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from sweeps import command, cpu_hours, markdown, number, run_sweeps  # noqa: E402  # first: it finds the package

from vlmlab.analyse.combination import Combination  # noqa: E402
from vlmlab.analyse.results import RunRecord, read_sweep  # noqa: E402
from vlmlab.analyse.sweep import combinations  # noqa: E402
from vlmlab.runs.folder import RunFolder  # noqa: E402

CURVES = {
    "connectors": ["connector=mlp,qformer,perceiver,resampler_1l,pool"],
    "fusions": ["fusion=lavi,gated_xattn,emma"],
}
"""Sweeps whose held-out losses are looked at while they train, one seed; the baseline is the first cell."""
BUDGET = "budget"
"""The sweep of the rule: the baseline at shares of the recipe."""
SHARES = (0.1, 0.2, 0.3, 1.0)
PASSES = 0.6
"""The rule: of its own final normalised accuracy."""
LOOKS = 0.02
"""Nats a token: a model looks from where shuffled images cost it so much more for good."""
ACCURACY, NORMALISED = "world_test/vqa_accuracy", "world_test/normalised"
HELD, WRONG = "held_out/loss", "held_out/shuffled_loss"


def main() -> int:
    """Run what is left of the chosen sweeps and write the table; the exit code of the worst sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*CURVES, BUDGET], default=[*CURVES, BUDGET])
    parser.add_argument("--budget", default="default", choices=("test", "short", "default"))
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the recipe; the last one is the whole")
    parser.add_argument("--seeds", default="0,1,2", help="of the sweep over shares")
    parser.add_argument("--at", type=Path, default=ROOT, help="folder to run the commands from; sweeps/ is made in it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of table.md and figure.png")
    parser.add_argument("--table", action="store_true", help="only write the table from what is there")
    given = parser.parse_args()
    words = {name: overrides(name, given) for name in [*CURVES, BUDGET]}
    given.out.mkdir(parents=True, exist_ok=True)
    record = f"hydra.launcher.record='{given.out.resolve() / 'budget.csv'}'"
    sweeps = {
        folder_of(name, given.budget): [*words[name], *([record] if name == BUDGET else [])]
        for name in given.only
        if not given.table
    }
    worst = run_sweeps(sweeps, given.at)
    text = page(words, given.at / "sweeps", given.budget, given.out)
    (given.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return worst


# -- the sweeps --------------------------------------------------------------------------------------------------------


def folder_of(name: str, budget: str) -> str:
    """Name of a sweep."""
    return f"testbed_{name}" + ("" if budget == "default" else f"_{budget}")


def overrides(name: str, given: argparse.Namespace) -> list[str]:
    """What stands behind ``python train.py -m``."""
    common = [f"name={folder_of(name, given.budget)}", "preset=testbed", f"budget={given.budget}"]
    if name == BUDGET:
        return [*common, f"budget.steps_scale={given.shares}", f"seed={given.seeds}"]
    return [*common, *CURVES[name], "evaluation.every=20"]


# -- the table ---------------------------------------------------------------------------------------------------------


def page(words: Mapping[str, Sequence[str]], sweeps: Path, budget: str, out: Path) -> str:
    """The page that is committed; draws the figure beside it."""
    cells = {name: read_sweep(sweeps / folder_of(name, budget)) for name in words}
    there = {name: [cell for cell in records if cell.done] for name, records in cells.items()}
    there = {name: records for name, records in there.items() if records}
    lines = [f"Made on {datetime.date.today().isoformat()} from the sweeps below.", ""]
    if not there:
        return "\n".join([*lines, "No cell is finished.", ""])
    spent = sum(cpu_hours(sweeps / folder_of(name, budget)) for name in there)
    count = sum(map(len, there.values()))
    lines += ["```", *(command(words[name]) for name in there), "```", ""]
    lines += [f"{count} cells, {spent:.2f} CPU-hours in all, starting and scoring included.", ""]
    watched = [cell for name in CURVES for cell in there.get(name, [])]
    if watched:
        lines += ["## When each begins to look", "", *_looking(watched), ""]
        if drawn(out / "figure.png", watched):
            lines += ["![held-out loss with right and with shuffled images](figure.png)", ""]
    if BUDGET in there:
        lines += ["## How little training answers", "", *_shares(combinations(there[BUDGET])), ""]
    return "\n".join(lines)


def _looking(cells: Sequence[RunRecord]) -> list[str]:
    titles = ["", "visual tokens", "looks from step", "of", "shuffled - right at the end, nats a token"]
    titles += ["accuracy", "shuffled", "lookup", "CIDEr-D", "training, s"]
    scores = [ACCURACY, f"{ACCURACY}/shuffled", f"{ACCURACY}/lookup", "world_captions/cider_d"]
    rows = []
    for cell in cells:
        curve = gaps(cell)
        begins = begins_to_look(curve)
        rows.append(
            [
                called(cell),
                number(cell.cost.get("visual_tokens"), 0),
                "never" if begins is None else str(begins),
                str(curve[-1][0] if curve else 0),
                number(curve[-1][1] if curve else None, 3),
                *(number(cell.metrics.get(score), 3) for score in scores),
                number(cell.cost.get("seconds"), 0),
            ]
        )
    said = (
        f"One seed: no comparison. A composition looks from the step on from which shuffled images always cost it "
        f"{LOOKS} nats a token more than right ones, on 200 held-out samples of the stage's own data."
    )
    return [said, "", *markdown(titles, rows)]


def called(cell: RunRecord) -> str:
    """What makes this cell another than the baseline."""
    return next((cell.overrides[key] for key in ("fusion", "connector") if key in cell.overrides), "mlp")


def gaps(cell: RunRecord) -> list[tuple[int, float]]:
    """(step from the run's beginning, nats a token that shuffled images cost more) for every look."""
    found: list[tuple[int, float]] = []
    offset, stage, last = 0, None, 0
    for row in RunFolder(cell.folder).metrics():
        if row.get("stage") != stage:
            offset, stage = offset + last, row.get("stage")
        last = int(row.get("step", 0))
        if HELD in row:
            found.append((offset + last, float(row[WRONG]) - float(row[HELD])))
    return found


def begins_to_look(curve: Sequence[tuple[int, float]]) -> int | None:
    """The first step from which the gap stays; None where it does not at the end."""
    begins = None
    for step, gap in reversed(curve):
        if gap < LOOKS:
            break
        begins = step
    return begins


def drawn(path: Path, cells: Sequence[RunRecord]) -> bool:
    """The gaps over the steps, a line a cell; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for cell in cells:
        if curve := gaps(cell):
            axes.plot(*zip(*curve, strict=True), label=called(cell), linewidth=1.4)
    axes.set_xlabel("optimizer step, all stages")
    axes.set_ylabel("shuffled minus right images, nats a token")
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _shares(rows: Sequence[Combination]) -> list[str]:
    """The baseline at shares of the recipe, and what the rule says."""
    key = "budget.steps_scale"
    by = {float(row.records[0].overrides[key]): row for row in rows}
    final = _median(by[max(by)], NORMALISED)
    lines, smallest = [], None
    for share, row in sorted(by.items()):
        reached = _median(row, NORMALISED)
        part = reached / final if final > 0 else 0.0
        if smallest is None and part >= PASSES:
            smallest = share
        scores = (ACCURACY, f"{ACCURACY}/shuffled", f"{ACCURACY}/lookup", NORMALISED)
        numbers = [number(row.interval(score)) for score in scores]
        lines.append([f"{share:g}", str(len(row.finished)), *numbers, f"{reached:.3f}", f"{part:.2f}"])
        lines[-1].append(number(row.cost("seconds"), 0))
    titles = ["share", "n", "accuracy", "shuffled", "lookup", "normalised", "its median", "of the last row's"]
    said = (
        f"The rule of `budget=ablation`: the smallest share of the recipe at which the baseline's median seed passes "
        f"{PASSES} of its own final normalised accuracy. Here: {'none' if smallest is None else f'{smallest:g}'}."
    )
    return [said, "", *markdown([*titles, "training, s"], lines)]


def _median(row: Combination, metric: str) -> float:
    return median(row.by_seed(metric).values()) if row.by_seed(metric) else 0.0


if __name__ == "__main__":
    sys.exit(main())
