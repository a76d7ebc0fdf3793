"""The promises of the README: the demo learns to look, real input is learnt, a sweep ends in its table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.slow.runs import command, trained
from vlmlab.data.world.questions import KINDS

pytestmark = pytest.mark.slow


def test_demo_learns_to_look_and_can_be_scored_again(tmp_path: Path) -> None:
    metrics = trained(cwd=tmp_path)["metrics"]
    assert metrics["world_test/vqa_accuracy/count"] >= 2000
    assert metrics["world_test/vqa_accuracy"] >= 0.80
    for kind in KINDS:
        assert metrics[f"world_test/normalised/kind/{kind}"] >= 0.5, kind
    assert metrics["world_test/vqa_accuracy/shuffled"] <= metrics["world_test/chance"] + 0.05
    assert metrics["world_captions/cider_d"] >= 0.6 * metrics["world_captions/human/cider_d"]
    assert metrics["world_captions/cider_d"] >= 3 * metrics["world_captions/cider_d/shuffled"]
    assert "world_compositional/vqa_accuracy" in metrics
    page = (tmp_path / "outputs" / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 12

    again = command("evaluate.py", "run=outputs/run", cwd=tmp_path)
    assert again.returncode == 0 and "numbers equal those of result.json" in again.stdout
    assert json.loads((tmp_path / "outputs" / "run" / "evaluate" / "metrics.json").read_text()) == metrics


def test_easy_vqa_is_learnt(tmp_path: Path, shared_data: Path) -> None:
    data = shared_data / "easy_vqa_mini"
    arguments = (f"data.path={data}/train.json", f"data.test_path={data}/test.json", f"data.images={data}")
    metrics = trained("data=vqa", *arguments, "recipe=real_vqa", cwd=tmp_path)["metrics"]
    assert metrics["vqa_test/vqa_accuracy"] >= 0.90
    assert metrics["vqa_test/vqa_accuracy/kind/other"] >= 0.85
    assert metrics["vqa_test/vqa_accuracy/shuffled"] < 0.75


def test_coco_captions_run_through_all_stages(tmp_path: Path, shared_data: Path) -> None:
    data = shared_data / "coco_captions_mini"
    arguments = (f"data.path={data}/captions.json", f"data.images={data}/images", "budget=short")
    metrics = trained("data=coco_captions", *arguments, cwd=tmp_path)["metrics"]
    for baseline in ("", "/shuffled", "/no_image"):
        assert metrics[f"val/captions/loss{baseline}"] > 0


def test_four_cell_sweep_ends_in_its_table(tmp_path: Path) -> None:
    cells = ("connector=mlp,qformer", "mask=bidir,causal")
    done = command("train.py", "-m", "name=grid", *cells, "budget=short", cwd=tmp_path)
    assert done.returncode == 0
    rows = list(csv.DictReader((tmp_path / "sweeps" / "grid" / "table.csv").open()))
    assert {(row["connector"], row["mask"]) for row in rows} == {
        (connector, mask) for connector in ("mlp", "qformer") for mask in ("bidir", "causal")
    }
    assert (tmp_path / "sweeps" / "grid" / "figure.png").stat().st_size > 5000
    assert "vqa_accuracy" in done.stdout
