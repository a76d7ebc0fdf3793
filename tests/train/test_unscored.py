"""A run whose training is done and whose evaluation is not: finished by ``evaluate``, or by the same command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tower_lab
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.evaluate import evaluate_command
from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.evaluate.metrics.vqa import VqaAccuracy
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train


class Moody(VqaAccuracy):
    """Fails as long as there is a file of that name."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        if Path(self.file).exists():
            raise UserError("no mood today")
        return super().compute(floors)


def config(file: Path) -> DictConfig:
    cfg = tower_lab.config(
        "evaluation.held_out=[]", "evaluation.baselines=[]", "evaluation.lookup_samples=null", steps=1
    )
    toy = {
        "source": {"_target_": "tower_lab.Mixed", "size": 4},
        "metrics": [{"_target_": "vlmlab.evaluate.metrics.vqa.VqaAccuracy"}],
        "max_new_tokens": 2,
    }
    moody = toy | {"metrics": [{"_target_": f"{__name__}.Moody", "file": str(file)}]}
    cfg.data.benchmarks = {"moody": moody, "toy": toy}
    return cfg


def start(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    with RunFolder(folder) as run:
        return run.open(plain(cfg), ["a=b"]) or train(cfg, folder)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run one of whose two benchmarks failed."""
    place = tmp_path_factory.mktemp("left")
    (place / "bad").touch()
    with pytest.raises(UserError, match=r"moody could not be scored .no mood today.; the model is trained"):
        start(place / "run", config(place / "bad"))
    (place / "bad").unlink()
    return place / "run"


@pytest.fixture
def copied(left: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(left, tmp_path / "run"))


def asked(folder: Path, **keys: Any) -> DictConfig:
    none = dict.fromkeys(("benchmarks", "limit", "batch_size", "share_images"))
    return OmegaConf.create({"run": str(folder), **none, "device": "cpu", "trust": True, **keys})


def weights(folder: Path) -> bytes:
    return (folder / "stages" / "0_joint" / "model.safetensors").read_bytes()


def test_the_others_scores_stand(left: Path) -> None:
    result = json.loads((left / "result.json").read_text())
    assert result["failed"] == {"moody": "no mood today"} and result["metrics"]["toy/vqa_accuracy/count"] == 4
    assert not any(key.startswith("moody") for key in result["metrics"]) and result["cost"]["params"]


@pytest.mark.parametrize("how", ["evaluate", "train"])
def test_only_what_failed_is_tried_again(copied: Path, left: Path, how: str, capsys: pytest.CaptureFixture) -> None:
    if how == "evaluate":
        evaluate_command(asked(copied))
    else:
        start(copied, config(left.parent / "bad"))
    said = capsys.readouterr().out
    result = RunFolder(copied).result()
    assert result is not None and "failed" not in result and result["overrides"] == ["a=b"]
    assert {"moody/vqa_accuracy", "toy/vqa_accuracy"} <= result["metrics"].keys()
    assert "moody: 4 answers" in said and "toy: 4 answers" not in said and weights(copied) == weights(left)


@pytest.mark.parametrize("keys", [{}, {"limit": 2}, {"benchmarks": ["toy"], "batch_size": 1}], ids=str)
def test_evaluate_finishes_a_trained_folder_without_a_result(copied: Path, left: Path, keys: dict[str, Any]) -> None:
    (copied / "result.json").unlink()
    evaluate_command(asked(copied, **keys))
    run = RunFolder(copied)
    result = run.result()
    assert result is not None and result["metrics"]["toy/vqa_accuracy/count"] == keys.get("limit", 4)
    assert ("moody/vqa_accuracy" in result["metrics"]) == ("benchmarks" not in keys)
    assert run.state()["state"] == "done" and weights(copied) == weights(left)
    evaluate_command(asked(copied, **keys))  # from now on as any finished run
    assert (copied / "evaluate" / "metrics.json").is_file()


def test_evaluate_of_a_training_that_is_not_over_says_so(copied: Path) -> None:
    (copied / "result.json").unlink()
    (copied / "stages" / "0_joint" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is not finished \(no result.json\)"):
        evaluate_command(asked(copied))


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation.batch_size": 2},
        {"budget.eval_limit": 3},
        {"collate.max_length": 2048},
    ],
    ids=str,
)
def test_another_evaluation_is_made_in_the_same_folder(copied: Path, left: Path, change: dict[str, Any]) -> None:
    cfg = config(left.parent / "bad")
    start(copied, cfg)
    before, rows = RunFolder(copied).result(), len(RunFolder(copied).metrics())
    for key, value in change.items():
        OmegaConf.update(cfg, key, value)
    after = start(copied, cfg)
    assert after is not None and after["config_hash"] != (before or {})["config_hash"]
    assert json.loads((copied / "result.old-1.json").read_text()) == before
    assert weights(copied) == weights(left) and len(RunFolder(copied).metrics()) == rows
    assert after["metrics"]["toy/vqa_accuracy/count"] == change.get("budget.eval_limit", 4)


def test_a_damaged_file_ends_evaluate_in_one_sentence(copied: Path) -> None:
    for name in ("config.yaml", "env.json", "stages/0_joint/model.safetensors"):
        whole = (copied / name).read_bytes()
        for damage in (b"", b"[1, 2]", whole[: len(whole) // 2]):
            (copied / name).write_bytes(damage)
            with pytest.raises(UserError, match=name) as found:
                evaluate_command(asked(copied))
            assert len(str(found.value)) <= 300 and "\n" not in str(found.value)
        (copied / name).write_bytes(whole)
