"""Folders are named by what a command says of its training, and the folders it made before are still its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from tests.test_conf import CONF, composed

from vlmlab.runs.names import run_name
from vlmlab.runs.places import folder_of, sweep_folder_of, training_words

VQA = ("data=vqa", "data.path=train.json", "data.images=img")


@pytest.fixture(scope="module")
def vqa() -> DictConfig:
    return composed(*VQA)


def words(*overrides: str) -> set[str]:
    return set(training_words(overrides, composed(*overrides)))


@pytest.mark.parametrize(
    "more",
    [
        ("evaluation.batch_size=3", "evaluation.every=50", "budget.eval_limit=10"),
        ("evaluation={batch_size: 3}",),
        ("data.screen=0", "data.benchmarks.vqa_test.max_new_tokens=4", "data.val.short.size=9"),
        ("~data.benchmarks.vqa_test",),
        ("trainer.threads=2", "trainer.devices=2", "trainer.compile=true"),
        ("logger=wandb", "fresh=true", "trainer.workers=2"),
    ],
)
def test_what_scores_or_runs_a_training_names_no_folder(vqa: DictConfig, more: tuple[str, ...]) -> None:
    assert set(training_words((*VQA, *more), vqa)) == set(VQA)


@pytest.mark.parametrize(
    "word",
    ["data.suffix=Briefly.", "data.test_fraction=0.2", "data.train.short.size=9", "collate.max_length=512", "seed=1"],
)
def test_what_is_learnt_names_the_folder(vqa: DictConfig, word: str) -> None:
    assert set(training_words((*VQA, word), vqa)) == {*VQA, word}


def test_of_a_test_file_a_training_knows_whether_there_is_one() -> None:
    one, other, none = (words(*VQA, f"data.test_path={path}") for path in ("a.json", "b.json", "null"))
    assert one == other == {*VQA, "data.test_path=given"} and none == {*VQA, "data.test_path=null"}


def test_a_key_that_training_refers_to_counts() -> None:
    borrowed = ("evaluation.batch_size=5", "collate.pack_length=${evaluation.batch_size}")
    assert words(*borrowed) == set(borrowed)


def test_all_counts_where_the_composition_is_unknown() -> None:
    assert words("data=vqa", "evaluation.batch_size=3") == {"data=vqa", "evaluation.batch_size=3"}  # no data.path
    swept = ["data=vqa,llava", "data.screen=3", "evaluation.batch_size=1,2", "evaluation.every=5"]
    assert set(training_words(swept, composed())) == {*swept[:3]}


def test_a_folder_of_before_is_its_commands(tmp_path: Path) -> None:
    overrides, training = ["mask=causal", "evaluation.batch_size=3"], ["mask=causal"]
    new = str(tmp_path / run_name(None, training))
    assert folder_of(str(tmp_path), None, overrides, training) == new
    before = tmp_path / run_name(None, overrides)
    before.mkdir()
    assert folder_of(str(tmp_path), None, overrides, training) == new  # nothing has begun in it
    (before / "mask-causal").mkdir()
    for file in (before / "config.yaml", before / "mask-causal" / "config.yaml"):  # of a run, of a sweep's cell
        file.touch()
        assert folder_of(str(tmp_path), None, overrides, training) == str(before)
        file.unlink()
    assert folder_of(str(tmp_path), "mine", overrides, training) == str(tmp_path / "mine")


def folders(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True).hydra


def test_the_configuration_asks_for_these_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, scored = folders("mask=causal"), folders("mask=causal", "evaluation.every=5")
    assert plain.run.dir == scored.run.dir == f"outputs/{run_name(None, ['mask=causal'])}"
    assert plain.sweep.dir == scored.sweep.dir == f"sweeps/{run_name(None, ['mask=causal'])}"
    assert folders("name=mine", "evaluation.every=5").run.dir == "outputs/mine"
    assert folders("evaluation.every=5").run.dir == "outputs/default"


def test_a_sweep_is_named_by_its_keys_so_that_it_grows() -> None:
    def name(*words: str, given: str | None = None) -> str:
        return Path(sweep_folder_of("sweeps", given, words, words)).name

    first = name("connector=mlp,qformer", "mask=bidir,causal", "budget=short")
    assert first.startswith("budget-short_connector_mask-")
    more = ["connector=mlp,qformer,pool", "mask=choice(bidir,causal)", "budget=short", "seed=0,1,2"]
    assert name(*more) == name(*more[:3], "seed=5") == first
    assert name("connector=mlp,qformer", "mask=bidir", "budget=short") != first
    assert name("connector=mlp,qformer", "mask=bidir,causal", "budget=test") != first
    assert name(*more, given="mine") == "mine" and name("seed=0,1") == "default"
