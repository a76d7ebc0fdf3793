"""Small run folders for the tests of the analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(accuracy: float, cider: float = 0.8) -> dict[str, float]:
    """Metrics of a question and a caption benchmark."""
    return {
        "quiz/vqa_accuracy": accuracy,
        "quiz/vqa_accuracy/shuffled": 0.3,
        "quiz/vqa_accuracy/no_image": 0.25,
        "quiz/vqa_accuracy/lookup": 0.4,
        "quiz/vqa_accuracy/kind/count": accuracy - 0.1,
        "quiz/vqa_accuracy/kind/count/shuffled": 0.2,
        "quiz/vqa_accuracy/count": 40,
        "quiz/vqa_accuracy/new": 0.5,
        "quiz/vqa_accuracy/new/shuffled": 0.1,
        "quiz/vqa_accuracy/new/count": 7,
        "quiz/chance": 0.28,
        "quiz/chance/kind/count": 0.2,
        "quiz/floor/lookup": 0.4,
        "quiz/floor/chance/kind/count": 0.2,
        "quiz/floor/shuffled/new": 0.1,
        "quiz/normalised": (accuracy - 0.4) / 0.6,
        "quiz/normalised/kind/count": (accuracy - 0.3) / 0.8,
        "quiz/normalised/new": 0.4 / 0.9,
        "tales/cider_d": cider,
        "tales/cider_d/shuffled": 0.1,
        "tales/cider_d/leave_one_out": 0.75 * cider,
        "tales/human/cider_d": 1.0,
        "tales/count": 10,
    }


def write_cell(sweep: Path, *overrides: str, **files: Any) -> Path:
    """A cell folder with ``overrides.json`` and the given files (``result={...}`` writes ``result.json``)."""
    folder = sweep / "_".join(text.replace("=", "-") for text in overrides)
    folder.mkdir(parents=True)
    (folder / "overrides.json").write_text(json.dumps(list(overrides)))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


def write_answers(folder: Path, right: list[bool], each: int = 2, benchmark: str = "quiz") -> None:
    """Predictions of a run to yes-or-no questions, `each` of an image, and the configuration that scores them."""
    target = "vlmlab.evaluate.metrics.vqa.VqaAccuracy"
    config = {"data": {"benchmarks": {benchmark: {"metrics": [{"_target_": target}]}}}}
    (folder / "config.yaml").write_text(json.dumps(config))
    rows = [
        {
            "benchmark": benchmark, "id": f"q{i}", "turn": 0, "kind": ("count", "colour")[i % 2], "prompt": "?",
            "prediction": "yes" if right[i] else "no", "references": ["yes"], "image_ids": [f"image{i // each}"],
            "group": "new" if i < 6 else "",
        }
        for i in range(len(right))
    ]  # fmt: skip
    (folder / "predictions").mkdir()
    (folder / "predictions" / f"{benchmark}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def result(accuracy: float, cider: float = 0.8) -> dict[str, Any]:
    """Contents of ``result.json``."""
    cost = {"seconds": 12.5, "params": 1_500_000, "visual_tokens": 16}
    return {"format": 1, "seed": 0, "overrides": [], "metrics": metrics(accuracy, cider), "cost": cost}
