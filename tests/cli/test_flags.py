"""Words that are refused before anything is composed."""

from __future__ import annotations

import pytest

from vlmlab.cli.flags import other_kind, overrides_of, package_of, wrong_word

WRONG = {
    "--nope": "--nope is not an option",
    "--cfg x": "argument --cfg/-c: invalid choice: 'x'",
    "seed=1 --cfg job mask=causal": "mask=causal comes after an option that has keys before it",
    "-- seed=1": "-- is not an option",
    "--experimental-rerun x": "--experimental-rerun=x has no effect here",
    "--cfg job --info": "--cfg and --info cannot be asked together",
    "--package seed": "--package seed is about what --cfg prints",
    "--resolve": "--resolve is about what --cfg prints",
    "=1": "'=1' has no key",
    "~": "'~' has no key",
    "hydra.verbose=x": "hydra.verbose=x would have no effect",
    "+hydra.x=1": "+hydra.x=1 would have no effect",
    "~hydra.run.dir": "~hydra.run.dir would have no effect",
    "hydra@connector=none": "hydra@connector=none would have no effect",
    "hydra.run.dir=": "hydra.run.dir= is not a folder",
    "hydra.run.dir=[1]": "hydra.run.dir=[1] is not a folder",
    "hydra.searchpath=[nowhere]": "hydra.searchpath has nowhere, which is not a folder",
    "-m hydra.launcher.slots=0": "hydra.launcher.slots=0 is not possible; give a whole number of at least 1, or null",
    "-m hydra.launcher.retries=-1": "hydra.launcher.retries=-1 is not possible; give a whole number of at least 0",
    "-m sweep=pool hydra.launcher.partition=gpu": "hydra.launcher.partition=gpu would have no effect",
    "-m hydra.launcher.timeout=x": "hydra.launcher.timeout=x is not possible; give a number above 0, or null",
    "hydra/launcher=pool hydra.launcher.n_jobs=2": "hydra.launcher.n_jobs=2 would have no effect",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_words(line: str) -> None:
    said = str(wrong_word(line.split(" "), trains=True))
    assert said.startswith(WRONG[line]) and len(said) <= 300


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-h",
        "--cfg job --package connector --resolve seed=1",
        "-m seed=0,1 hydra.launcher.slots=2 hydra.sweep.dir=x",
        "+experiment=mask_stages hydra.launcher.record=null +hydra.sweeper.params.seed=range(2)",
        "hydra/launcher=joblib hydra.launcher.n_jobs=2",
        "-m sweep=slurm hydra.launcher.partition=gpu hydra.launcher.minutes=90 seed=0,1",
        "-m sweep=optuna hydra.sweeper.trials=3 hydra.launcher.retries=1 mask=bidir,causal",
        "hydra.run.dir=${name} hydra.mode=RUN",
        "hydra.searchpath=[.,pkg://mine.conf]",
    ],
)
def test_right_words(line: str) -> None:
    assert wrong_word(line.split(" ") if line else [], trains=True) is None


def test_commands_that_look_at_one_composition() -> None:
    for line in ("-m seed=0,1", "hydra.mode=MULTIRUN"):
        assert str(wrong_word(line.split(" "), trains=False)).startswith("-m is for several trainings")
    assert "would have no effect" in str(wrong_word(["hydra.run.dir=x"], trains=False))


def test_keys_of_a_sweep_and_of_a_single_run() -> None:
    assert other_kind(["hydra.sweep.dir=x"], several=True) is other_kind(["hydra.run.dir=x"], several=False) is None
    assert str(other_kind(["hydra.launcher.slots=2"], several=False)).startswith("hydra.launcher.slots=2 is of a sweep")
    assert str(other_kind(["seed=1", "sweep=slurm"], several=False)).startswith("sweep=slurm is of a sweep; add -m")
    assert str(other_kind(["hydra.run.dir=x"], several=True)).startswith("hydra.run.dir=x is of a single run")


def test_what_is_an_option_and_what_a_key() -> None:
    words = ["--config-dir", "d", "a=1", "b=2", "-p", "lm", "--cfg", "job"]
    assert overrides_of(words) == ["a=1", "b=2"] and package_of(words) == "lm"
