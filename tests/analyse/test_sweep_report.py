"""The page of a sweep, its figures of two factors and of cost, and its cells as they are."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlmlab.analyse.combination import combinations
from vlmlab.analyse.factors import best, by_factors, cost_axis, points, two_factors
from vlmlab.analyse.progress import show_sweep
from vlmlab.analyse.results import read_sweep
from vlmlab.analyse.sweep_report import telling_cells, write_sweep_report
from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.gallery import paired_answers
from vlmlab.runs.folder import RunFolder

METRIC = "quiz/vqa_accuracy"
SCORES = {("mlp", "bidir"): 0.7, ("mlp", "causal"): 0.5, ("qformer", "bidir"): 0.6, ("qformer", "causal"): 0.4}
FLOPS = {"mlp": 100, "qformer": 40}


class Drawings:
    """A benchmark of grey squares."""

    def __init__(self, size: int = 8) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> object:
        from vlmlab.contracts.sample import Sample, Turn

        image = np.full((24, 24, 3), 20 * index, np.uint8)
        return Sample(f"q{index}", (image,), (Turn("?", "yes"),))


@pytest.fixture
def sweep(tmp_path: Path, cells: ModuleType) -> Path:
    for (connector, mask), score in SCORES.items():
        for seed in range(2):
            result = cells.result(score + 0.02 * seed)
            result["cost"]["flops_sample"] = FLOPS[connector]
            folder = cells.write_cell(tmp_path, f"connector={connector}", f"mask={mask}", f"seed={seed}", result=result)
            rows = [{"stage": "one", "step": k, "loss": 2.0 - k / 10 + seed / 50} for k in range(4)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_two_factors_and_the_front(sweep: Path) -> None:
    rows = combinations(read_sweep(sweep))
    keys = two_factors(rows)
    assert keys == ("connector", "mask")
    first, second, found = by_factors(rows, keys, METRIC)
    assert (first, second) == (["mlp", "qformer"], ["bidir", "causal"])
    assert {place: interval.mean for place, interval in found.items()} == pytest.approx(
        {place: score + 0.01 for place, score in SCORES.items()}
    )
    assert cost_axis(rows) == "flops_sample" and cost_axis(rows, "params") == "params" and cost_axis(rows, "x") is None
    assert best(points(rows, METRIC, "flops_sample")) == ["qformer, bidir", "mlp, bidir"]


def test_the_page_is_one_file_with_every_figure(sweep: Path, cells: ModuleType) -> None:
    records = read_sweep(sweep)
    names = telling_cells(records)
    assert names == ["connector-mlp_mask-bidir_seed-0", "connector-qformer_mask-bidir_seed-0"]
    for name, right in zip(names, ([True] * 8, [True, False] * 4), strict=True):
        cells.write_answers(sweep / name, right, each=1)
    (sweep / names[0] / "predictions" / "quiz.jsonl").open("a").write("")
    benchmarks = {"quiz": __import__("omegaconf").OmegaConf.create({"source": {"_target_": f"{__name__}.Drawings"}})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra.utils.instantiate", lambda node: Drawings())
        pairs = paired_answers(sweep / names[0], sweep / names[1], benchmarks, count=3)
    assert [pair.image_id for pair in pairs] == ["image1", "image3", "image5"]  # those that are answered otherwise
    assert [int(pair.image[0, 0, 0]) for pair in pairs] == [20, 60, 100]
    page = write_sweep_report(sweep, records, (names[0], names[1]), pairs).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Table", "Scores", "While they trained: loss", "Two factors", "Score against cost",
        "Answers of two cells about the same pictures",
    ]  # fmt: skip
    assert "<script" not in page and not re.search(r"(src|href)=\"(?!data:)", page)
    for png in re.findall(r"base64,([^\"]+)", page):
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).std() >= 0
    assert page.count('class="answer right">yes') == 3 and page.count('class="answer wrong">no') == 3
    assert "as high as: qformer, bidir, then mlp, bidir" in page
    with pytest.raises(UserError, match="cost=x is not of every finished cell"):
        write_sweep_report(sweep, records, cost="x")
    with pytest.raises(UserError, match="no finished cell has metric=a/b"):
        write_sweep_report(sweep, records, metric="a/b")


def test_cells_are_shown_as_they_are(sweep: Path, cells: ModuleType) -> None:
    folder = cells.write_cell(sweep, "connector=mlp", "mask=open", "seed=0")
    cells.write_cell(sweep, "connector=mlp", "mask=open", "seed=1", job={"scheduler": "slurm", "id": "7_1"})
    with RunFolder(folder) as run:
        run.open({"seed": 0})
        run.write_state("running", "align", 12, 30)
        run.log({"stage": "align", "step": 12, "loss": 1.25})
        now = (folder / "metrics.jsonl").stat().st_mtime
        text = show_sweep(sweep, now + 130)
    lines = text.splitlines()
    assert lines[0] == f"{sweep}: 10 cells: 1 running, 1 not started, 8 done" or "8 done" in lines[0]
    running = next(line.split("  ") for line in lines if line.startswith("connector-mlp_mask-open_seed-0"))
    assert [part.strip() for part in running if part] == [folder.name, "running", "align 12/30", "1.25", "2 min ago"]
    assert "slurm job 7_1" in text and "0.720" in text
    assert show_sweep(folder) == f"{folder} holds no cell"
