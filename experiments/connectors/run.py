"""Connectors at 1, 4 and 16 tokens, and contrastive alignment: ``python experiments/connectors/run.py --help``.

Runs the sweeps below one after the other, exactly as the printed commands would by hand, and writes ``table.md`` and
``figure.png`` from what their folders hold. Cells that are finished are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from sweeps import command, cpu_hours, markdown, number, run_sweeps  # noqa: E402, I001  # first: it finds the package
from hydra import compose, initialize_config_dir  # noqa: E402

from vlmlab.analyse.figure import draw  # noqa: E402
from vlmlab.analyse.results import read_sweep  # noqa: E402
from vlmlab.analyse.stats import FEWEST_PAIRS, paired_difference  # noqa: E402
from vlmlab.analyse.combination import Combination  # noqa: E402
from vlmlab.analyse.sweep import combinations, short_names  # noqa: E402
from vlmlab.recipe.stage import parse  # noqa: E402
from vlmlab.runs import names as names  # noqa: E402  # registers the resolvers

TOKENS = {
    "pool": ["connector=pool", "connector.side=1,2,4"],
    "resampler": ["connector=resampler_1l", "connector.side=1,2,4"],
    "perceiver": ["connector=perceiver", "connector.latents=1,4,16"],
    "qformer": ["connector=qformer", "connector.queries=1,4,16"],
}
"""The sweeps of part (a): three numbers of tokens each."""
ALIGNMENT = "alignment"
"""The sweep of part (b)."""
ACCURACY, CAPTIONS = "world_test/vqa_accuracy", "world_captions/cider_d"
ABOVE = ("shuffled", "lookup")
"""Floors that a model which looks is above."""


def main() -> int:
    """Run what is left of the chosen sweeps and write the table; the exit code of the worst sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*TOKENS, ALIGNMENT], default=[*TOKENS, ALIGNMENT])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="short", choices=("test", "short", "default"))
    parser.add_argument("--at", type=Path, default=ROOT, help="folder to run the commands from; sweeps/ is made in it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of table.md and figure.png")
    parser.add_argument("--table", action="store_true", help="only write the table from what is there")
    given = parser.parse_args()
    words = {name: overrides(name, given.budget, given.seeds) for name in [*TOKENS, ALIGNMENT]}
    chosen = [] if given.table else given.only
    worst = run_sweeps({folder_of(name, given.budget): words[name] for name in chosen}, given.at)
    given.out.mkdir(parents=True, exist_ok=True)
    text = page(words, given.at / "sweeps", given.budget, given.out)
    (given.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return worst


# -- the sweeps --------------------------------------------------------------------------------------------------------


def folder_of(name: str, budget: str) -> str:
    """Name of a sweep."""
    return f"connectors_{name}" + ("" if budget == "short" else f"_{budget}")


def overrides(name: str, budget: str, seeds: str) -> list[str]:
    """What stands behind ``python train.py -m``."""
    common = [f"name={folder_of(name, budget)}", f"seed={seeds}", f"budget={budget}"]
    if name != ALIGNMENT:
        return [*common, *TOKENS[name]]
    every = instructions(budget)
    sizes = f"data.train.instruct.size={every},{max(1, every // 10)}"
    return [*common, "preset=cg_vlm", "recipe=cg_vlm,two_stage", sizes]


def instructions(budget: str) -> int:
    """Conversations that the instruction stage of ``cg_vlm`` sees in one pass: all of them are 100 %."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        last = parse(compose("train", ["recipe=cg_vlm", f"budget={budget}"]))[-1]
    return last.steps * last.batch_size


# -- the table ---------------------------------------------------------------------------------------------------------


def page(words: Mapping[str, Sequence[str]], sweeps: Path, budget: str, out: Path) -> str:
    """The page that is committed; draws the figure beside it."""
    there = {name: combinations(read_sweep(sweeps / folder_of(name, budget))) for name in words}
    there = {name: rows for name, rows in there.items() if any(row.finished for row in rows)}
    today = datetime.date.today().isoformat()
    lines = [f"Made on {today} from the sweeps below; every interval is a 95 % t interval over seeds.", ""]
    if not there:
        return "\n".join([*lines, "No cell is finished."])
    lines += ["```", *(command(words[name]) for name in there), "```", "", _cost(there, sweeps, budget), ""]
    if tokens := [(_said(row), row) for name, rows in there.items() if name != ALIGNMENT for row in rows]:
        lines += ["## Connectors at 1, 4 and 16 tokens", "", *_table(tokens), "", *_looking(tokens), ""]
    aligned = there.get(ALIGNMENT)
    if aligned:
        lines += ["## Contrastive and generative alignment against generative alone", ""]
        lines += [*_table([(_aligned(row), row) for row in aligned]), "", *_differences(aligned), ""]
    figures = [Combination({"row": label}, row.records) for label, row in tokens]
    figures += [Combination({"row": _aligned(row)}, row.records) for row in aligned or ()]
    if draw(out / "figure.png", figures, [ACCURACY, CAPTIONS]) is not None:
        lines += ["![accuracy and CIDEr-D beside their floors and the grammar's own score](figure.png)", ""]
    return "\n".join(lines)


def _cost(there: Mapping[str, Sequence[Combination]], sweeps: Path, budget: str) -> str:
    """Cells, seeds and processor time."""
    records = [record for rows in there.values() for row in rows for record in row.records]
    done = [record for record in records if record.done]
    spent = sum(cpu_hours(sweeps / folder_of(name, budget)) for name in there)
    training = sum(record.cost.get("seconds", 0.0) for record in done) / 3600
    seeds = min(len(row.finished) for rows in there.values() for row in rows)
    missing = f"; {len(records) - len(done)} cells are not finished" if len(done) < len(records) else ""
    stale = "; some cells were made by other code than the present" if any(r.stale for r in done) else ""
    claim = f" Fewer than {FEWEST_PAIRS} seeds support no significance claim." if seeds < FEWEST_PAIRS else ""
    return (
        f"{len(done)} cells, n = {seeds} seeds a row, `budget={budget}`, {spent:.2f} CPU-hours in all (training took "
        f"{training:.2f} hours by the clock){missing}{stale}.{claim}"
    )


def _table(rows: Sequence[tuple[str, Combination]]) -> list[str]:
    titles = ["", "visual tokens", "n", "accuracy", "shuffled", "lookup", "chance", "CIDEr-D", "shuffled", "lookup"]
    titles.append("training, s")
    scores = [ACCURACY, *(f"{ACCURACY}/{floor}" for floor in ABOVE), "world_test/chance"]
    scores += [CAPTIONS, *(f"{CAPTIONS}/{floor}" for floor in ABOVE)]
    lines = []
    for label, row in rows:
        numbers = [number(row.cost("visual_tokens"), 0), str(len(row.finished))]
        numbers += [number(row.interval(score)) for score in scores]
        lines.append([label, *numbers, number(row.cost("seconds"))])
    return markdown(titles, lines)


def _looking(rows: Sequence[tuple[str, Combination]]) -> list[str]:
    """What right images are worth: each model's score minus that with shuffled ones, and minus the lookup's."""
    keys = [(key, f"{key}/{floor}") for key in (ACCURACY, CAPTIONS) for floor in ABOVE]
    lines = []
    for label, row in rows:
        pairs = [paired_difference(row.by_seed(key), row.by_seed(floor)) for key, floor in keys]
        lines.append([label, *(str(pair.difference) if pair else "-" for pair in pairs)])
    titles = ["", *(f"{score} - {floor}" for score in ("accuracy", "CIDEr-D") for floor in ABOVE)]
    return ["Right images minus what comes without looking, paired by seed:", "", *markdown(titles, lines)]


def _said(row: Combination) -> str:
    """The connector and what sets its number of tokens, from the cell's own overrides."""
    given = row.records[0].overrides
    keys = [key for key in given if key.startswith("connector.")]
    sizes = [f"{short} {given[key]}" for key, short in zip(keys, short_names(keys), strict=True)]
    return ", ".join([given.get("connector", ""), *sizes])


def _aligned(row: Combination) -> str:
    given = row.records[0].overrides
    return f"{'contrastive + generative' if given['recipe'] == 'cg_vlm' else 'generative'}, {given[SIZE]} conversations"


SIZE = "data.train.instruct.size"


def _differences(rows: Sequence[Combination]) -> list[str]:
    """Contrastive + generative minus generative, with as many conversations and with a tenth against all of them."""
    by = {(row.records[0].overrides["recipe"], row.records[0].overrides[SIZE]): row for row in rows}
    sizes = sorted({size for _, size in by}, key=int)
    few, every = sizes[0], sizes[-1]
    lines = []
    for mine, other in dict.fromkeys([(few, few), (every, every), (few, every)]):
        first, second = by.get(("cg_vlm", mine)), by.get(("two_stage", other))
        found = first and second and paired_difference(first.by_seed(ACCURACY), second.by_seed(ACCURACY))
        if found:
            lines.append(f"- {mine} against {other} conversations: accuracy {found.difference} ({found.verdict()})")
    return ["Contrastive + generative minus generative, paired by seed:", "", *lines] if lines else []


if __name__ == "__main__":
    sys.exit(main())
