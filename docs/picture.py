"""The demo's picture: test questions of the world, the run's answers with the right image and with a wrong one.

    python docs/picture.py outputs/<name>

takes the first question of each of four kinds in ``predictions/world_test.jsonl``, chosen by nothing else, and writes
``docs/assets/demo.png``. The run of the committed picture: ``python train.py budget.steps_scale=0.3
budget.eval_limit=64``.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from vlmlab.data.world.sources import WorldQuestions

KINDS = ("attribute", "count", "position", "relation")
TO = Path(__file__).parent / "assets" / "demo.png"


def rows(file: Path) -> list[dict[str, Any]]:
    """The answers of one file of predictions."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rendered(names: set[str]) -> dict[str, NDArray[Any]]:
    """The test images of these names."""
    source = WorldQuestions(split="test", size=2100, multi_turn=False)
    found: dict[str, NDArray[Any]] = {}
    for index in range(len(source)):
        sample = source[index]
        found |= {name: image for name, image in zip(sample.image_ids, sample.images, strict=True) if name in names}
        if len(found) == len(names):
            break
    return found


def panel(axes: Axes, image: NDArray[Any], title: str, answer: str, right: bool) -> None:
    """One image with what was answered under it."""
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(answer, fontsize=11, fontweight="bold", color="#1b7837" if right else "#b2182b")


def main(run: Path) -> None:
    """Draw the picture of a finished run."""
    given, wrong = (rows(run / "predictions" / f"world_test{end}.jsonl") for end in ("", ".shuffled"))
    pairs = [next((a, b) for a, b in zip(given, wrong, strict=True) if a["kind"] == kind) for kind in KINDS]
    images = rendered({name for pair in pairs for row in pair for name in row["image_ids"]})
    figure, grid = plt.subplots(2, len(KINDS), figsize=(9, 5), layout="constrained")
    for column, pair in enumerate(pairs):
        for row, axes in zip(pair, grid[:, column], strict=True):
            title = "\n".join(textwrap.wrap(row["prompt"], 32)) if row is pair[0] else ""
            panel(axes, images[row["image_ids"][0]], title, row["prediction"], row["prediction"] in row["references"])
    for axes, text in zip(grid[:, 0], ("its own image", "a wrong image"), strict=True):
        axes.set_ylabel(text, fontsize=11)
    TO.parent.mkdir(exist_ok=True)
    figure.savefig(TO, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
