"""TokenVariance between the steps of a stage: that they change nothing, and what is chosen by them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tower_lab
from omegaconf import DictConfig
from processes import run_and_die, run_ranks
from safetensors.torch import load_file
from tests.test_conf import composed
from torch import Tensor
from torch.nn import functional as F

from vlmlab.cli.rules.run import BEST, best_look, slices, watched
from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Visual
from vlmlab.engine.restore import load_trained
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.choice import Choice
from vlmlab.train.run import train
from vlmlab.train.validation import Validation

MONITOR = "held_out/loss"
STEPS = 3


class Dropped(MlpConnector):
    """With dropout, so that random states matter."""

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        return F.dropout(super().forward(visual, instruction), 0.5, self.training)


def config(every: int | None, steps: int = STEPS, **keys: Any) -> DictConfig:
    cfg = tower_lab.config(steps=steps)
    cfg.connector._target_ = f"{__name__}.Dropped"
    cfg.evaluation.update({"every": every, "held_out_samples": 6, "slice_samples": 4, "max_share": None, **keys})
    cfg.data.val.instruct = {"_target_": "tower_lab.Mixed", "images": 1}
    cfg.data.val.other = {"_target_": "tower_lab.Mixed", "images": 2}
    asked = {"_target_": "tower_lab.Mixed", "images": 1}
    metrics = [{"_target_": "vlmlab.evaluate.metrics.vqa.VqaAccuracy"}]
    cfg.data.benchmarks = {"words": {"source": asked, "metrics": metrics, "max_new_tokens": 3}}
    return cfg


def trained(folder: Path, cfg: DictConfig) -> dict[str, Tensor]:
    with RunFolder(folder) as run:
        run.open(plain(cfg))
        train(cfg, folder, lambda *args: {"accuracy": 0.5})
    (weights,) = folder.glob("stages/*/model.safetensors")
    return load_file(weights)


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in RunFolder(folder).metrics() if MONITOR in row]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("alone") / "run", config(None))


ALL = {"slices": ["words"], "watched": ["other", "instruct"], "save_best": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, trained(folder, config(1, **ALL))


def test_rows_beside_the_training_and_not_a_bit_of_it_changed(whole: Any, alone: dict[str, Tensor]) -> None:
    folder, weights = whole
    assert same(weights, alone)
    rows = looks(folder)
    assert [(row["stage"], row["step"]) for row in rows] == [("joint", step) for step in range(STEPS + 1)]
    assert all(row["held_out/loss"] != row["held_out/shuffled_loss"] for row in rows)
    assert rows[-1]["held_out/loss"] < rows[0]["held_out/loss"]
    assert all(row["held_out/instruct/loss"] == row["held_out/loss"] for row in rows), "the same samples"
    assert all(row["held_out/other/loss"] != row["held_out/other/shuffled_loss"] for row in rows)
    assert rows[-1]["held_out/other/loss"] != rows[0]["held_out/other/loss"] != rows[0]["held_out/loss"]
    asked = ("slice/words/vqa_accuracy", "slice/words/vqa_accuracy/shuffled")
    assert all(0 <= row[name] <= 1 and row["slice/words/vqa_accuracy/count"] == 4 for row in rows for name in asked)


def test_killed_and_resumed_it_ends_and_looks_the_same(tmp_path: Path, whole: Any, alone: dict[str, Tensor]) -> None:
    """In the middle of the step after a look and a checkpoint."""
    run_and_die(config(1, **ALL), tmp_path, 2)
    assert same(trained(tmp_path, config(1, **ALL)), alone)
    assert looks(tmp_path) == looks(whole[0])
    best = [load_file(next(folder.glob("stages/*/best.safetensors"))) for folder in (tmp_path, whole[0])]
    assert same(*best)


@pytest.mark.slow
def test_with_two_ranks_one_looks_and_both_end(tmp_path: Path) -> None:
    assert run_ranks(config(None, steps=2), tmp_path / "alone") == [0, 0]
    assert run_ranks(config(1, steps=2, slices=["words"], patience=2), tmp_path / "looks") == [0, 0]
    weights = [load_file(next((tmp_path / name).glob("stages/*/model.safetensors"))) for name in ("alone", "looks")]
    assert same(*weights) and [row["step"] for row in looks(tmp_path / "looks")] == [0, 1, 2]


def test_the_best_is_kept_beside_the_last_and_scored_if_a_key_says_so(tmp_path: Path) -> None:
    """By the largest loss: the look before the first step."""
    cfg = config(2, mode="max", save_best=True)
    last = trained(tmp_path, cfg)
    facts = json.loads(next(tmp_path.glob("stages/*/best.json")).read_text())
    assert facts["step"] == 0 and facts["value"] == max(row[MONITOR] for row in looks(tmp_path))
    kept = load_file(next(tmp_path.glob("stages/*/best.safetensors")))
    assert kept.keys() == last.keys() and not same(kept, last)
    assert same(tensors(load_trained(cfg, tmp_path), last), last)
    cfg.evaluation.load_best = True
    assert same(tensors(load_trained(cfg, tmp_path), kept), kept)
    assert same(trained(tmp_path, cfg), last), "nothing is trained again"
    (note,) = RunFolder(tmp_path).result()["notes"]  # type: ignore[index]
    assert "after step 0 of stage joint" in note
    cfg.evaluation.mode = "min"
    with pytest.raises(UserError, match=r"is the best by held_out/loss .max. and evaluation.monitor is"):
        trained(tmp_path, cfg)
    next(tmp_path.glob("stages/*/best.safetensors")).unlink()
    with pytest.raises(UserError, match="has kept none"):
        load_trained(cfg, tmp_path)


def tensors(model: torch.nn.Module, names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def test_a_stage_ends_after_looks_that_bring_nothing_better_also_when_it_was_killed(tmp_path: Path) -> None:
    keys = {"patience": 2, "mode": "max"}  # the loss falls
    ended = trained(tmp_path / "early", config(1, steps=6, **keys))
    assert [row["step"] for row in looks(tmp_path / "early")] == [0, 1, 2]
    facts = json.loads(next((tmp_path / "early").glob("stages/*/stage.json")).read_text())
    assert facts["steps"] == 2 and RunFolder(tmp_path / "early").result() is not None
    run_and_die(config(1, steps=6, **keys), tmp_path / "killed", 1)
    assert same(trained(tmp_path / "killed", config(1, steps=6, **keys)), ended)
    done = config(1, steps=6, **keys)
    done.evaluation.patience = 1
    with RunFolder(tmp_path / "killed") as run, pytest.raises(UserError, match=r"evaluation\.patience: 2 -> 1"):
        run.open(plain(done))


def test_a_score_that_no_slice_has_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.monitor=slice/words/f1 is not a validation score"):
        trained(tmp_path, config(2, slices=["words"], save_best=True, monitor="slice/words/f1"))
    assert not any(row.get("loss") for row in RunFolder(tmp_path).metrics())


@pytest.mark.parametrize(("share", "asked"), [(0.2, [0, 90]), (None, [0, 20, 90])])
def test_slices_take_their_share_of_the_time_and_no_more(
    monkeypatch: pytest.MonkeyPatch, share: float | None, asked: list[int]
) -> None:
    """Ten seconds each: the first at once, and again where they are a fifth of what has passed."""
    clock, found = [0.0], []

    class Slow:
        def scores(self, model: Any) -> dict[str, float]:
            found.append(clock[0])
            clock[0] += 10
            return {"slice/a/vqa_accuracy": 1.0}

    monkeypatch.setattr("vlmlab.train.validation.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    watch = Validation({}, lambda *args: 0.0, 1, lambda row: None, [Slow()], share)
    for clock[0] in (0, 20, 90):
        watch._slices(None)  # type: ignore[arg-type]
    assert found == asked


@pytest.mark.parametrize(
    ("mode", "values", "best", "ends"),
    [
        ("min", [3.0, 2.0, 2.5, 1.0], 3, False),
        ("min", [3.0, 2.0, 2.0, 2.0], 1, True),
        ("max", [0.1, 0.3, 0.35, 0.35], 2, True),  # by more than 0.1 only the first two
        ("min", [float("nan"), 2.0, float("nan"), float("nan")], 1, True),
    ],
)
def test_what_is_best_and_when_it_is_enough(mode: Any, values: list[float], best: int, ends: bool) -> None:
    choice = Choice(MONITOR, mode, patience=2, min_delta=0.1 if mode == "max" else 0.0)
    found = choice.best(enumerate(values))
    assert found is not None and found[0] == best and choice.ends(enumerate(values)) is ends
    assert choice.value({MONITOR: values[-1]}) is not None and choice.value({}) is None


def test_what_cannot_be_watched_is_refused() -> None:
    cfg: Any = composed("evaluation.every=5", "evaluation.watched=[short,dense]")
    assert watched(plain(cfg), {}) is None
    cfg.evaluation.watched = ["shrot"]
    assert "evaluation.watched=shrot is not in data.val" in str(watched(plain(cfg), {}))
    cfg.evaluation.watched, cfg.evaluation.every = ["short"], None
    assert "set evaluation.every=<steps>" in str(watched(plain(cfg), {}))


def test_what_cannot_be_asked_or_chosen_is_refused() -> None:
    cfg: Any = composed("evaluation.every=5", "evaluation.slices=[world_test]", "evaluation.patience=3")
    assert slices(plain(cfg), {}) is None and best_look(plain(cfg), {}) is None
    for monitor in ("held_out/gap", "slice/world_test/vqa_accuracy"):
        cfg.evaluation.monitor = monitor
        assert best_look(plain(cfg), {}) is None
    for monitor, said in {
        "loss": "is not a validation score",
        "held_out/dense/loss": "set evaluation.watched=[dense]",
        "slice/pope/f1": "set evaluation.slices=[pope]",
    }.items():
        cfg.evaluation.monitor = monitor
        assert said in str(best_look(plain(cfg), {}))
    cfg.evaluation.load_best = True
    assert "evaluation.save_best=true" in str(best_look(plain(cfg), {}))
    cfg.evaluation.every = None
    assert "needs validation" in str(best_look(plain(cfg), {})) and "between steps" in str(slices(plain(cfg), {}))
    assert {key: composed().evaluation[key] for key, _ in BEST} == dict(BEST)
    cfg.evaluation.load_best, cfg.evaluation.patience = False, None
    assert "evaluation.monitor=slice/pope/f1 says which validation is the best" in str(best_look(plain(cfg), {}))
    cfg.evaluation.slices = ["world_tset"]
    assert "evaluation.slices=world_tset is not in data.benchmarks" in str(slices(plain(cfg), {}))


def test_what_shards_cannot_do_is_refused() -> None:
    cfg: Any = composed("evaluation.every=5")
    assert watched(cfg, {}) is None
    cfg.trainer.strategy = "fsdp2"
    assert "evaluation.every" in str(watched(cfg, {}))
