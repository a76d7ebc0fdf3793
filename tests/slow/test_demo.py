"""The promises of the README: the demo learns to look, real input is learnt, a sweep ends in its table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.slow.runs import command, trained
from vlmlab.data.world.questions import GROUPS, KINDS

pytestmark = pytest.mark.slow


def test_demo_learns_to_look_and_can_be_scored_again(tmp_path: Path) -> None:
    """With 0.4 of the steps it passes the demo's bars; the README has what all of them reach."""
    metrics = trained("budget.steps_scale=0.4", cwd=tmp_path)["metrics"]
    assert metrics["world_test/vqa_accuracy/count"] >= 2000
    assert metrics["world_test/vqa_accuracy"] >= 0.8
    for kind in KINDS:
        assert metrics[f"world_test/normalised/kind/{kind}"] >= 0.5, kind
    assert metrics["world_test/vqa_accuracy/shuffled"] <= metrics["world_test/chance"] + 0.05
    assert metrics["world_test/vqa_accuracy/lookup"] <= metrics["world_test/chance"] + 0.05
    assert metrics["world_captions/cider_d/leave_one_out"] >= 0.6 * metrics["world_captions/grammar/cider_d"]
    assert metrics["world_captions/cider_d"] >= 3 * metrics["world_captions/cider_d/shuffled"]
    assert {f"world_compositional/vqa_accuracy/{group}/count" for group in GROUPS} <= metrics.keys()
    page = (tmp_path / "outputs" / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 12

    again = command("evaluate.py", "run=outputs/run", "benchmarks=[world_captions]", cwd=tmp_path)
    assert again.returncode == 0 and "numbers equal those of result.json" in again.stdout
    scored = json.loads((tmp_path / "outputs" / "run" / "evaluate" / "metrics.json").read_text())
    assert {key: metrics[key] for key in scored} == scored and "world_captions/cider_d" in scored


def test_easy_vqa_is_learnt_from_its_images(tmp_path: Path, shared_data: Path) -> None:
    """Real files through instruction tuning, the encoder learning too: 0.4 of the steps, and most of the accuracy."""
    data = shared_data / "easy_vqa_mini"
    arguments = (f"data.path={data}/train.json", f"data.test_path={data}/test.json", f"data.images={data}")
    arguments += ("budget.steps_scale=0.4", "recipe.stages.instruction_tune.train.encoder=5e-4")
    metrics = trained("data=vqa", "data.captions=world", *arguments, cwd=tmp_path)["metrics"]
    assert metrics["vqa_test/vqa_accuracy/count"] == 2900
    assert metrics["vqa_test/vqa_accuracy"] >= 0.8 and metrics["vqa_test/vqa_accuracy/kind/other"] >= 0.85
    assert metrics["vqa_test/vqa_accuracy/kind/other/shuffled"] <= 0.3


def test_coco_captions_run_through_all_stages(tmp_path: Path, shared_data: Path) -> None:
    data = shared_data / "coco_captions_mini"
    arguments = (f"data.path={data}/captions.json", f"data.images={data}/images", "budget=short")
    metrics = trained("data=coco_captions", *arguments, cwd=tmp_path)["metrics"]
    for baseline in ("", "/shuffled", "/no_image"):
        assert metrics[f"val/captions/loss{baseline}"] > 0


@pytest.mark.parametrize("name", ["vqa_rad", "slake"])
def test_radiology_runs_through_all_stages(name: str, tmp_path: Path, shared_data: Path) -> None:
    """Closed and open questions beside wrong images and none, at twice the tower's own resolution."""
    data = shared_data / name
    arguments = (f"data={name}", f"data.path={data}/vqa.json", f"data.images={data}", "encoder.image_size=128")
    result = trained(*arguments, "data.captions=world", "budget=test", "budget.eval_limit=40", cwd=tmp_path)
    assert result["metrics"][f"{name}_test/vqa_accuracy/count"] == 40 and result["cost"]["visual_tokens"] == 64
    for kind in ("closed", "open"):
        for baseline in ("", "/shuffled", "/no_image"):
            assert 0 <= result["metrics"][f"{name}_test/vqa_accuracy/kind/{kind}{baseline}"] <= 1
    assert not (tmp_path / "outputs" / "run" / "skipped.jsonl").exists()


def test_questions_in_parquet_run_through_all_stages(tmp_path: Path, shared_data: Path) -> None:
    """The form of PathVQA: shards that name their split, no kinds of questions but those that the answers tell."""
    from tests.data.readers.test_parquet import VQA, write

    root = shared_data / "vqa_rad"
    rows = json.loads((root / "vqa.json").read_text(encoding="utf-8"))
    for split, shard in (("train", "train-00000-of-00001"), ("test", "test-00000-of-00001")):
        chosen = [row for row in rows if row["official_split"] == split][:200]
        picture = {row["image"]: {"bytes": (root / row["image"]).read_bytes(), "path": row["image"]} for row in chosen}
        texts = [{"question": row["question"], "answer": str(row["answer"])} for row in chosen]
        shown = [{**text, "image": picture[row["image"]]} for text, row in zip(texts, chosen, strict=True)]
        write(tmp_path / f"{shard}.parquet", shown, VQA)
    arguments = ("data=path_vqa", f"data.path={tmp_path}", "data.captions=world", "budget=test")
    metrics = trained(*arguments, cwd=tmp_path)["metrics"]
    for kind in ("yes_no", "other"):
        for baseline in ("", "/shuffled", "/no_image"):
            assert f"path_vqa_test/vqa_accuracy/kind/{kind}{baseline}" in metrics


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
