"""What an answer costs under each fusion, at real size: ``python experiments/fusion_efficiency/run.py --help``.

Nothing is loaded or trained: every composition is built without weights and a prompt is sent through it
(``vlmlab cost``). Writes ``table.csv``; and from that the figure, and the tables of ``README.md``.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from sweeps import markdown, with_page  # noqa: E402, I001  # first: it finds the package
from hydra import compose, initialize_config_dir  # noqa: E402

from vlmlab.runs import places as places  # noqa: E402  # registers the resolvers
from vlmlab.runs.files import write_atomic  # noqa: E402

LMS = {"qwen2_5_7b": "Qwen2-7B", "vicuna_7b": "Vicuna-7B"}
"""Choice of lm -> the shape that it has; Qwen2.5-7B and Qwen2-7B have the same."""
FUSIONS = {
    "concat": ["fusion=concat"],
    "composite": ["fusion=composite"],
    "lavi": ["fusion=lavi", "fusion.every=4"],
    "vlora": ["fusion=vlora", "fusion.every=4", "fusion.rank=64", "fusion.depth=8", "fusion.heads=16"],
    "gated_xattn": ["fusion=gated_xattn", "fusion.every=4", "fusion.head_width=64"],
}
CROPS = ["encoder=siglip_so400m_384"]
FRAMES = [*CROPS, "encoder.image_size=392", "connector=pool", "connector.side=14"]
LARGE = [*CROPS, "encoder.image_size=980"]
ANSWER = 20


@dataclass(frozen=True)
class Setting:
    """Compositions that differ in the fusion alone.

    Attributes:
        name: in the table.
        words: of the composition beside lm and fusion.
        prompts: images and text tokens.
        fusions: names of those that are counted.
        lms: likewise.
    """

    name: str
    words: Sequence[str]
    prompts: Sequence[tuple[int, int]]
    fusions: Sequence[str] = tuple(FUSIONS)
    lms: Sequence[str] = tuple(LMS)


SETTINGS = [
    Setting("crops", CROPS, [(1, 32), (1, 64), (1, 128), (2, 64), (5, 64), (10, 32), (10, 64), (10, 128)]),
    Setting("frames", FRAMES, [(1, 64), (8, 64), (32, 64)]),
    Setting("980 px", LARGE, [(1, 64)], ("concat", "composite"), tuple(LMS)),
]
SIZES = ["lm", "setting", "fusion", "images", "text", "visual_tokens", "prompt", "params", "added"]
COUNTS = ["vision", "fusing", "prefill", "token", "first", "answering", "cache", "memory", "weights", "peak"]


def main() -> int:
    """Count what is asked for and write the page; what was counted before stays in the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(FUSIONS), default=list(FUSIONS))
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in SETTINGS], default=[s.name for s in SETTINGS])
    parser.add_argument("--lms", nargs="+", choices=list(LMS), default=list(LMS))
    parser.add_argument("--page", action="store_true", help="count nothing; write the page from table.csv")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    given = parser.parse_args()
    if not (given.page or given.check):
        for row in rows(given.settings, given.lms, given.only):
            known = {key_of(other): other for other in read()}
            write_atomic(HERE / "table.csv", as_csv([*(known | {key_of(row): row}).values()]))
    found = read()
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    text = with_page(readme, page(found), "table.csv")
    if given.check:
        return int(text != readme)
    write_atomic(HERE / "README.md", text)
    drawn(found)
    return 0


# -- counting ----------------------------------------------------------------------------------------------------------


def rows(settings: Sequence[str], lms: Sequence[str], fusions: Sequence[str]) -> Iterator[dict[str, str]]:
    """One a fusion, LM and prompt."""
    from vlmlab.plan.inference import as_json, inference_costs

    for setting in [one for one in SETTINGS if one.name in settings]:
        for lm in [name for name in setting.lms if name in lms]:
            for fusion in [name for name in setting.fusions if name in fusions]:
                words = [f"lm={lm}", *setting.words, *FUSIONS[fusion], "precision=bf16"]
                with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                    cfg = compose("train", words)
                for (images, text), cost in zip(setting.prompts, inference_costs(cfg, setting.prompts), strict=True):
                    numbers = as_json(cost, ANSWER)
                    about = {"lm": lm, "setting": setting.name, "fusion": fusion, "images": images, "text": text}
                    yield {name: str((about | numbers)[name]) for name in [*SIZES, *COUNTS]}
                print(setting.name, lm, fusion, flush=True)


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("setting", "lm", "fusion", "images", "text"))


def as_csv(found: Sequence[dict[str, str]]) -> str:
    """In the order of the settings."""
    order = [setting.name for setting in SETTINGS]
    places_of = {"setting": order, "lm": list(LMS), "fusion": list(FUSIONS)}

    def place(row: dict[str, str]) -> tuple[int, ...]:
        named = tuple(places_of[name].index(row[name]) for name in ("setting", "lm"))
        return (*named, int(row["images"]), int(row["text"]), places_of["fusion"].index(row["fusion"]))

    file = io.StringIO()
    writer = csv.DictWriter(file, [*SIZES, *COUNTS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(found, key=place))
    return file.getvalue()


def read() -> list[dict[str, str]]:
    """The rows of ``table.csv``; none where it is not there."""
    if not (HERE / "table.csv").is_file():
        return []
    return list(csv.DictReader(io.StringIO((HERE / "table.csv").read_text(encoding="utf-8"))))


# -- the page ----------------------------------------------------------------------------------------------------------


HEAD = (
    "fusion", "images", "text", "visual tokens in the sequence", "added parameters", "encoder TFLOP",
    "before the first token, TFLOP", "against concat", "without the encoder", f"answer of {ANSWER} tokens",
    "a token, GFLOP", "kept, MB", "against concat ", "weights, GB", "weights and peak",
)  # fmt: skip


def page(found: Sequence[dict[str, str]]) -> list[str]:
    """A table for each LM and setting, every row against ``concat`` with the same prompt."""
    base = {key_of(row): row for row in found if row["fusion"] == "concat"}
    lines: list[str] = []
    for setting in SETTINGS:
        for lm in setting.lms:
            chosen = [row for row in found if (row["setting"], row["lm"]) == (setting.name, lm)]
            if chosen:
                told = f"**{setting.name}, {LMS[lm]} and SigLIP-So400m**"
                lines += [told, "", *markdown(HEAD, [_cells(row, base) for row in chosen]), ""]
    return lines[:-1]


def _cells(row: dict[str, str], base: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    other = base[(row["setting"], row["lm"], "concat", row["images"], row["text"])]

    def n(name: str, of: dict[str, str] = row) -> int:
        return int(of[name])

    def less(mine: float, theirs: float) -> str:
        return "" if row is other else f"{100 * (mine / theirs - 1):+.1f} %"

    kept, held = n("cache") + n("memory"), n("weights") + n("peak")
    return [
        row["fusion"], row["images"], row["text"], f"{n('visual_tokens') * n('images'):,}",
        f"{n('added') / 1e6:,.0f}M", f"{n('vision') / 1e12:.2f}", f"{n('first') / 1e12:.2f}",
        less(n("first"), n("first", other)),
        less(n("first") - n("vision"), n("first", other) - n("vision", other)),
        less(n("answering"), n("answering", other)),
        f"{n('token') / 1e9:.1f}", f"{kept / 1e6:,.0f}", less(kept, n("cache", other) + n("memory", other)),
        f"{n('weights') / 1e9:.1f}", less(held, n("weights", other) + n("peak", other)),
    ]  # fmt: skip


def drawn(found: Sequence[dict[str, str]]) -> None:
    """FLOPs before the first token against the images' tokens of ``concat``, for crops and 64 words."""
    from matplotlib.figure import Figure

    lms = [lm for lm in LMS if any(row["lm"] == lm for row in found)]
    figure = Figure(figsize=(1 + 4.5 * len(lms), 3.6), layout="constrained")
    for axes, lm in zip(figure.subplots(1, len(lms), sharey=True, squeeze=False)[0], lms, strict=True):
        for fusion in FUSIONS:
            _line(axes, found, lm, fusion, "first", {"label": fusion, "marker": "o"})
        _line(axes, found, lm, "concat", "vision", {"label": "encoder alone", "color": "black", "linestyle": ":"})
        axes.set(xscale="log", yscale="log", title=LMS[lm], xlabel="features of the image (729 a crop)")
    figure.axes[0].set_ylabel("TFLOP before the first token")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(HERE / "figure.png", dpi=150)


def _line(axes: Any, found: Sequence[dict[str, str]], lm: str, fusion: str, number: str, style: dict[str, str]) -> None:
    wanted = {"setting": "crops", "lm": lm, "fusion": fusion, "text": "64"}
    chosen = [row for row in found if all(row[name] == value for name, value in wanted.items())]
    axes.plot([729 * int(row["images"]) for row in chosen], [int(row[number]) / 1e12 for row in chosen], **style)


if __name__ == "__main__":
    sys.exit(main())
