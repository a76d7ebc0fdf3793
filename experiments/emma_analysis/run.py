"""What EMMA's mixing does in finished runs: ``python experiments/emma_analysis/run.py RUN [RUN ...]``.

Trains nothing. Reads how much each visual token takes from which token, and how much more the mixed features say of the
answer than the unmixed ones, and writes ``table.csv`` and the tables of ``README.md``.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sweeps import markdown, with_page  # noqa: E402, I001  # first: it finds the package
import torch  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch import Tensor  # noqa: E402

from vlmlab import load  # noqa: E402
from vlmlab.analyse.information import Numbers, bootstrap, infonce_terms, ksg_terms, principal  # noqa: E402
from vlmlab.contracts.parts import Fusion  # noqa: E402
from vlmlab.contracts.sample import Sample  # noqa: E402
from vlmlab.fusion.emma import InstructionMixing, share_taken  # noqa: E402
from vlmlab.loading import LoadedModel  # noqa: E402
from vlmlab.model.build import build_collator  # noqa: E402
from vlmlab.runs.files import write_atomic  # noqa: E402

BATCH = 64
Row: TypeAlias = dict[str, str]
COLUMNS = ["run", "measure", "what", "value", "low", "high"]


def main() -> int:
    """Measure the given runs, or write the page from the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="folders of finished runs with fusion=emma or emma_attention")
    parser.add_argument("--samples", type=int, default=1024, help="of the run's own data.val.captions source")
    parser.add_argument("--at", type=Path, default=HERE, help="folder of table.csv and README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    given = parser.parse_args()
    path = given.at / "table.csv"
    if given.runs and not given.check:
        rows = [row for run in given.runs for row in measured(run, given.samples)]
        write_atomic(path, as_csv(rows))
    if not path.is_file():
        print(f"{path} is not there yet; give folders of finished runs with fusion=emma.")
        return 1
    readme = (given.at / "README.md").read_text(encoding="utf-8")
    text = with_page(readme, page(path), "table.csv")
    if given.check:
        return int(text != readme)
    write_atomic(given.at / "README.md", text)
    return 0


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(run: str, count: int) -> Iterator[Row]:
    """The rows of one run."""
    loaded = load(run)
    part = mixing_of(loaded)
    name = Path(run).name
    if isinstance(part, InstructionMixing):
        for what, value in share_taken(part.mix.weight, part.tokens).items():
            yield row(name, "weights", what, value)
    before, after, other, answers = representations(loaded, part, samples_of(loaded, count))
    for estimate, terms in (("InfoNCE", infonce_terms), ("KSG", ksg_terms)):
        found = {what: terms(x, answers) for what, x in (("X", before), ("X~", after), ("X~, another's", other))}
        for what, each in found.items():
            yield row(name, estimate, what, *bootstrap(each))
        yield row(name, estimate, "X~ - X", *bootstrap(found["X~"] - found["X"]))
        yield row(name, estimate, "X~ - X~, another's", *bootstrap(found["X~"] - found["X~, another's"]))


def mixing_of(loaded: LoadedModel) -> Fusion:
    """The fusion that changes features."""
    fusion = loaded.model.fusion
    found = [part for part in getattr(fusion, "parts", {}).values() if part.reads_text]
    if not found:
        raise SystemExit("error: this run mixes no instruction into features; give one with fusion=emma.")
    return found[0]  # type: ignore[no-any-return]


def samples_of(loaded: LoadedModel, count: int) -> list[Sample]:
    """Held-out images, each with a caption and the prompt that asks for it."""
    source = loaded.config.data.val.captions.copy()
    source.size = count
    made = instantiate(source)
    return [made[index] for index in range(count)]


@torch.no_grad()
def representations(loaded: LoadedModel, part: Fusion, samples: Sequence[Sample]) -> list[Numbers]:
    """Principal components (n, 16) of features before, after, after with another's prompt, and of answers."""
    model = loaded.model
    assert model.encoder is not None and model.text is not None
    config = OmegaConf.merge(loaded.config, {"collate": {"pack_length": None}})
    collate = build_collator(config, model, "chat")
    found: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        batch = collate(some)
        assert batch.text_ids is not None
        visual = model.encoder(batch.pixels)
        mixed = [
            part.features(visual, batch, model.text(asked)) for asked in (batch.text_ids, batch.text_ids.roll(1, 0))
        ]
        for into, kind in zip(found, [visual, *mixed], strict=False):
            into.append(torch.cat(kind.grids, -1).mean(1))  # (B, Dv)
        ids = model.text.tokenise([sample.turns[-1].answer for sample in some])
        said, kept = model.text(ids), (ids >= 0)[..., None]
        found[3].append((said * kept).sum(1) / kept.sum(1))  # (B, Dt)
    return [principal(torch.cat(each).double().numpy()) for each in found]


# -- the page ----------------------------------------------------------------------------------------------------------


def row(run: str, measure: str, what: str, value: float, low: float | None = None, high: float | None = None) -> Row:
    """One number, with its interval where it has one."""
    ends = ["" if end is None else f"{end:.6g}" for end in (low, high)]
    return dict(zip(COLUMNS, [run, measure, what, f"{value:.6g}", *ends], strict=True))


def as_csv(rows: Sequence[Row]) -> str:
    """The table as a file."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def page(path: Path) -> list[str]:
    """A table for the weights and one for the information, a line a run."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines: list[str] = []
    for title, measures in (
        ("What is taken", ["weights"]),
        ("What the features say of the caption, nats", ["InfoNCE", "KSG"]),
    ):
        chosen = [each for each in rows if each["measure"] in measures]
        if chosen:
            lines += [
                f"**{title}**",
                "",
                *markdown(["run", "measure", "what", "value", "95 % interval"], map(_cells, chosen)),
                "",
            ]
    return lines[:-1]


def _cells(each: Row) -> list[str]:
    interval = f"{float(each['low']):.3f} to {float(each['high']):.3f}" if each["low"] else ""
    return [each["run"], each["measure"], each["what"], f"{float(each['value']):.3f}", interval]


if __name__ == "__main__":
    sys.exit(main())
