"""The report: complete, self-contained, and no caption can write into it."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlmlab.analyse.curves import Curves, draw_chart, read_curves, read_slices, thinned
from vlmlab.analyse.report import ReportItem, png_base64, write_report
from vlmlab.evaluate.metrics.rows import Row

IMAGE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;"


class _Page(HTMLParser):
    """Collects tags, attributes and the classes of answers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.answers: list[tuple[str, str]] = []
        self._class = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        name = dict(attrs).get("class") or ""
        self._class = name.removeprefix("answer ") if name.startswith("answer ") else ""

    def handle_data(self, data: str) -> None:
        if self._class and data.strip():
            self.answers.append((self._class, data.strip()))
            self._class = ""

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def _items() -> list[ReportItem]:
    rows = [
        Row("tales", "t1", 0, "caption", "<image>\nDescribe.", "a red dot", ("one red dot", "a dot")),
        Row("quiz", "q1", 0, "count", "How many?", "Two", ("two",), 0.25),
        Row("quiz", "q1", 1, "colour", "Which colour?", "blue", ("red",), 0.25),
        Row("quiz", "q1", 2, "colour", "Ten people?", "red", ("red", *["blue"] * 9), 0.25),
    ]
    return [ReportItem(IMAGE, "test/1", rows, [Row("quiz", "q1", 1, "colour", "", "green", ("red",))])]


def test_report(tmp_path: Path, cells: ModuleType) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "align", "step": 1, "loss": 2.0}\n{"broken\n')
    (tmp_path / "config.yaml").write_text("seed: 3\nconnector: {_target_: lab.Mlp, layers: 2}\n")
    path = write_report(tmp_path, _items(), cells.result(0.912) | {"overrides": ["mask=causal"], "seed": 3}, "my run")
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert path == tmp_path / "report.html"
    assert page.answers == [("caption", "a red dot"), ("right", "Two"), ("wrong", "blue"), ("partly", "red")]
    for expected in (
        "my run",
        "mask=causal, seed 3",
        "one red dot",
        "answer: red",
        "with another image: green",
        "0.912",
        "shuffled 0.300, no_image 0.250, lookup 0.400, chance 0.280",
        "<td>lookup</td>",
        "new (7)",
    ):
        assert expected in text
    assert "&lt;image&gt;" not in text
    assert "Mlp(layers=2)" in text and "align" in text and page.count("polyline") == 1


def test_report_is_self_contained(tmp_path: Path, cells: ModuleType) -> None:
    page = _Page(write_report(tmp_path, _items(), cells.result(0.9), "run").read_text(encoding="utf-8"))
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    sources = [attrs.get("src") or "" for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1])))
    assert np.array_equal(np.asarray(shown), IMAGE)


def test_no_text_can_inject_markup(tmp_path: Path, cells: ModuleType) -> None:
    clean = _Page(write_report(tmp_path, _evil_items("x"), _evil_result(cells, "x"), "x").read_text(encoding="utf-8"))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": EVIL, "step": 1, f"{EVIL}_loss": 2.0}) + "\n")
    (tmp_path / "config.yaml").write_text(json.dumps({"seed": EVIL}))
    text = write_report(tmp_path, _evil_items(EVIL), _evil_result(cells, EVIL), EVIL).read_text(encoding="utf-8")
    dirty = _Page(text)
    assert "<script" not in text and "onerror" not in {name for _, attrs in dirty.tags for name in attrs}
    assert dirty.count("img") == clean.count("img") == 1
    assert [text for _, text in dirty.answers] == [EVIL] * 2


def _evil_items(text: str) -> list[ReportItem]:
    rows = [Row(name, text, 0, text, text, text, (text, text)) for name in ("tales", "quiz")]
    return [ReportItem(IMAGE, text, rows, rows)]


def _evil_result(cells: ModuleType, text: str) -> dict[str, object]:
    result: dict[str, object] = cells.result(0.5)
    return result | {
        "overrides": [f"name={text}"],
        "metrics": {f"{text}/{text}": 1.0, "tales/cider_d": 1.0},
        "cost": {text: 1.0},
    }


def test_report_of_nothing(tmp_path: Path) -> None:
    assert "No metrics." in write_report(tmp_path, [], {}, "empty").read_text(encoding="utf-8")


def test_png_of_a_view_that_is_not_contiguous() -> None:
    shown = Image.open(io.BytesIO(base64.b64decode(png_base64(IMAGE[::2, ::-1]))))
    assert np.array_equal(np.asarray(shown), IMAGE[::2, ::-1])


def test_read_curves() -> None:
    rows = [
        {"stage": "a", "step": 1, "loss": 2.0, "loss/lm": 2.0, "lr": 0.1, "labelled_fraction": 0.5},
        {"stage": "a", "step": 2, "loss": float("nan"), "val_loss": 1.0},
        {"stage": "b", "step": 1, "train/loss": 3},
        {"loss": 9.0},
        {"stage": "b", "step": 2, "loss": "high"},
        {"stage": "c", "step": 1, "loss": 3.0, "loss/lm": 2.0, "loss/siglip": 1.0},
    ]
    assert [(curve.stage, curve.lines) for curve in read_curves(rows)] == [
        ("a", {"loss": [(1.0, 2.0)], "val_loss": [(2.0, 1.0)]}),
        ("b", {"train/loss": [(1.0, 3.0)]}),
        ("c", {"loss": [(1.0, 3.0)], "loss/lm": [(1.0, 2.0)], "loss/siglip": [(1.0, 1.0)]}),
    ]


def test_read_slices() -> None:
    row = {"slice/a/vqa_accuracy": 0.5, "slice/a/vqa_accuracy/shuffled": 0.25, "slice/a/vqa_accuracy/kind/x": 1.0}
    rows = [{"stage": "s", "step": 0, "loss": 1.0, **row}, {"stage": "s", "step": 4, "slice/a/vqa_accuracy/count": 8}]
    (chart,) = read_slices([*rows, {"stage": "s", "step": 8, **row, "slice/a/vqa_accuracy": "nan"}])
    assert chart.stage == "s: a"
    assert chart.lines == {"vqa_accuracy": [(0.0, 0.5)], "shuffled": [(0.0, 0.25), (8.0, 0.25)]}


def test_chart_fits_and_falls() -> None:
    chart = draw_chart(Curves("align", {"loss": [(float(step), 1000.0 - step) for step in range(1000)]}))
    ((name, _, points),) = chart.lines
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert (name, chart.last_step) == ("loss", "999")
    assert 200 < len(places) <= 300
    assert all(0 <= x <= 310 and 0 <= y <= 170 for x, y in places)
    assert places[0][1] < places[-1][1]  # pixels count downwards


def test_thinning_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(900)]
    assert sum(y for _, y in thinned(points)) * 3 == pytest.approx(sum(y for _, y in points))
    assert thinned(points[:5]) == points[:5]
