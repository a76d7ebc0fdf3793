"""A search by Optuna: its values, no waiting for the slowest, going on after an interruption, its front, giving up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_loader import ConfigLoader
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pretend import Life, Pretend, loaded, sweep_config

pytest.importorskip("optuna", reason="optuna is not installed")

from hydra_plugins.vlmlab_pool_launcher import _search
from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from hydra_plugins.vlmlab_pool_launcher._search import Goals, Search, run_search
from hydra_plugins.vlmlab_pool_launcher._space import space_of, words_of
from hydra_plugins.vlmlab_pool_launcher._sweep import Options, SweepError
from hydra_plugins.vlmlab_pool_launcher.sweeper import MEDIAN, TPE, OptunaSweeperConf
from vlmlab.analyse.results import read_sweep
from vlmlab.cli.entry import ConfigError
from vlmlab.runs.folder import RunFolder

CONF = """
defaults: [_self_, override hydra/job_logging: none, override hydra/hydra_logging: none]
seed: 0
x: 1
y: 1.0
data: {train: {short: {size: 1}}}
recipe: {stages: {one: {module: some.Module, train: {lm: 1.0e-3}, data: short, steps: 2}}}
hydra: {output_subdir: null}
"""


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConfigLoader]:
    with loaded(tmp_path, CONF, monkeypatch) as found:
        yield found


def score(cell: Cell) -> dict[str, float]:
    config = cell.config or {}
    return {"quiz/vqa_accuracy": 1 - (config["y"] - 0.3) ** 2 + 0.01 * config["x"]}


def finish(cell: Cell, tick: int) -> int | None:
    """Trains for as many looks as x says."""
    config = cell.config or {}
    if tick == 1:
        with (cell.folder / "trained.txt").open("a") as file:
            file.write("once\n")
    if tick <= config["x"]:
        return None
    with RunFolder(cell.folder) as run:
        if run.open(config, cell.overrides) is None:
            run.finish(score(cell), {"flops_sample": float(config["x"])})
    return 0


def search(words: Sequence[str], trials: int, **more: Any) -> Search:
    goals = more.pop("goals", Goals.of(None, None))
    return Search(list(words), trials, goals, more.pop("sampler", TPE), more.pop("pruner", MEDIAN), **more)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tables, with their figures, are made where a test looks at them."""
    if "capsys" not in request.fixturenames:
        monkeypatch.setattr(_search, "settle", lambda *_: True)


def run(loader: ConfigLoader, wanted: Search, life: Life = finish, slots: int = 2) -> Pretend:
    site = Pretend(life)
    run_search(sweep_config(), loader, wanted, Options(slots=slots, site=lambda sweep: site))
    return site


WORDS = ("x=1,2,3,8", "y=interval(0.0,1.0)")


def test_values_are_those_of_the_grammar() -> None:
    space, fixed = space_of(
        ["a=1e-3", "b=mlp,qformer", "c=choice(1,2)", "d=range(1,6,2)", "e=int(interval(1,8))",
         "f=tag(log,interval(1e-5,1e-2))", "+g=interval(0.5,2)", "h=range(0.1,0.5,0.2)"]
    )  # fmt: skip
    assert fixed == ["a=0.001"]
    assert space["b"].choices == ("mlp", "qformer") and space["c"].choices == ("1", "2")
    assert (space["d"].low, space["d"].high, space["d"].step) == (1, 5, 2)  # as -m: 1, 3, 5
    assert (space["e"].low, space["e"].high, type(space["e"]).__name__) == (1, 8, "IntDistribution")
    assert (space["f"].low, space["f"].high, space["f"].log) == (1e-5, 1e-2, True) and "+g" in space
    assert (space["h"].low, space["h"].high, type(space["+g"]).__name__) == (0.1, 0.3, "FloatDistribution")
    assert words_of({"a": 1e-05, "+b": "mlp", "c": 3}) == ["a=1e-05", "+b=mlp", "c=3"]


def test_keys_of_the_sweeper_are_those_of_a_search() -> None:
    keys = OmegaConf.structured(OptunaSweeperConf(trials=3, minimize=["cost/flops_sample"]))
    given = dict(instantiate(keys).given)
    given.pop("params")
    goals = Goals.of(given.pop("maximize"), given.pop("minimize"))
    made = Search(words=["x=1,2"], goals=goals, **given)
    assert (made.trials, made.sampler["_target_"], made.goals.directions) == (3, TPE["_target_"], ["minimize"])


@pytest.mark.parametrize(
    ("words", "more", "sentence"),
    [
        (["x=1"], {}, "sweep=optuna has nothing to choose"),
        (["x=1,2", "seed=0,1"], {}, "seed=0,1 is nothing to search"),
        (["y=interval(2,1)"], {}, r"y=interval\(2,1\) is not an interval"),
        (["x=1,2"], {"prune": "loss", "goals": Goals.of(["a/b"], ["cost/c"])}, "prune gives cells up by one number"),
        (["x=1,2"], {"prune": "loss", "prune_direction": "up"}, "prune_direction=up is none"),
    ],
)
def test_what_is_no_search(loader: ConfigLoader, words: list[str], more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(loader, search(words, 2, **more))
    assert not Path("sweeps").exists()


def test_cells_begin_when_a_slot_is_free_and_the_best_is_named(
    loader: ConfigLoader, capsys: pytest.CaptureFixture[str]
) -> None:
    site = run(loader, search(WORDS, 8))
    assert site.closed and len(site.begun) == 8 and any(len(one) == 1 for one in site.together)
    assert len(site.together) > 4  # no batches of two
    out = capsys.readouterr().out
    best = max(read_sweep(Path("sweeps/s")), key=lambda record: record.metrics["quiz/vqa_accuracy"])
    words = json.loads((best.folder / "overrides.json").read_text())
    assert f"best cell:\n  {' '.join(words)}: score {best.metrics['quiz/vqa_accuracy']:.6g}\n" in out
    assert Path("sweeps/s/table.csv").is_file() and "8 done" in out


def test_a_search_that_is_over_grows(loader: ConfigLoader) -> None:
    assert len(run(loader, search(WORDS, 3)).begun) == 3
    assert run(loader, search(WORDS, 3)).begun == []
    assert len(run(loader, search(WORDS, 4)).begun) == 1
    with pytest.raises(SweepError, match="is of a search for the score; give name=<another>, or the same goals"):
        run(loader, search(WORDS, 4, goals=Goals.of(None, "quiz/vqa_accuracy")))
    with pytest.raises(SweepError, match="has no quiz/cider; search by one of quiz/vqa_accuracy, cost/flops_sample"):
        Goals.of("quiz/cider", None).values(next(Path("sweeps/s").glob("x-*")))


def test_the_same_values_are_trained_once(loader: ConfigLoader) -> None:
    site = run(loader, search(["x=1,2,3"], 9))
    assert len(site.begun) == len(set(site.begun)) <= 3


def test_an_interrupted_search_goes_on_with_its_cells(loader: ConfigLoader) -> None:
    ticks = [0]

    def stopped(cell: Cell, tick: int) -> int | None:
        ticks[0] += 1
        if ticks[0] > 12:
            raise KeyboardInterrupt
        return finish(cell, tick)

    with pytest.raises(KeyboardInterrupt):
        run(loader, search(WORDS, 8), stopped)
    begun = {path.parent.name for path in Path("sweeps/s").glob("*/overrides.json")}
    done = {path.parent.name for path in Path("sweeps/s").glob("*/result.json")}
    assert 0 < len(begun) < 8 and done < begun
    site = run(loader, search(WORDS, 8))
    every = {path.parent.name for path in Path("sweeps/s").glob("*/result.json")}
    assert len(every) == 8 and begun < every and set(site.begun) == every - done


def test_failed_cells_count_and_are_tried_again(loader: ConfigLoader) -> None:
    def unlucky(cell: Cell, tick: int) -> int | None:
        return 1 if (cell.config or {})["x"] == 3 else finish(cell, tick)

    sampler = {"_target_": "optuna.samplers.RandomSampler"}
    with pytest.raises(SweepError, match=r"\d cells of the search failed: .*x-3"):
        run(loader, search(WORDS, 6, sampler=sampler), unlucky)
    failed = [record.folder.name for record in read_sweep(Path("sweeps/s")) if not record.done]
    site = run(loader, search(WORDS, 6, sampler=sampler))
    assert set(site.begun) == set(failed) and all(record.done for record in read_sweep(Path("sweeps/s")))


def test_several_goals_have_a_front(loader: ConfigLoader, capsys: pytest.CaptureFixture[str]) -> None:
    goals = Goals.of("quiz/vqa_accuracy", "cost/flops_sample")
    run(loader, search(WORDS, 5, goals=goals))
    out = capsys.readouterr().out
    cells = [(r.metrics["quiz/vqa_accuracy"], r.cost["flops_sample"]) for r in read_sweep(Path("sweeps/s"))]
    front = {one for one in cells if not any(a >= one[0] and c <= one[1] and (a, c) != one for a, c in cells)}
    assert f"Pareto front, {len(front)} of 5 cells:" in out
    assert all(f"quiz/vqa_accuracy {a:.6g}, cost/flops_sample {c:.6g}" in out for a, c in front)


def test_a_cell_is_given_up_where_others_were_better(loader: ConfigLoader) -> None:
    """Each look is worse than all before it, so that none after the first four is let to its end."""
    looks = [0.0]

    def worse(cell: Cell, tick: int) -> int | None:
        with RunFolder(cell.folder) as run_folder:
            run_folder.open(cell.config or {}, cell.overrides)
            if tick <= 3:
                looks[0] += 1
                run_folder.log({"stage": "one", "step": tick, "held_out/loss": looks[0]})
                return None
        return finish(cell, 9)

    wanted = search(["y=interval(0.0,1.0)"], 7, prune="held_out/loss")
    run(loader, wanted, worse, slots=1)
    records = read_sweep(Path("sweeps/s"))
    assert [record.state for record in records].count("done") == 4
    reasons = {record.reason for record in records if not record.done}
    assert reasons == {"given up by hydra.sweeper.prune=held_out/loss at step 1"}
    assert run(loader, wanted, worse, slots=1).begun == []  # and not tried again
