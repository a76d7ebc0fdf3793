"""What a sweep that stops and grows is held to; cells are trained by a stand-in that only writes what a run writes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fake_app import lay_down
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.vlmlab_pool_launcher import _cells
from hydra_plugins.vlmlab_pool_launcher._cells import Cell, families, plan
from hydra_plugins.vlmlab_pool_launcher._pool import Pool
from vlmlab.analyse.sweep import write_table
from vlmlab.cli.entry import ConfigError
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder

STAND_IN = """
import json, sys, time
from pathlib import Path
from vlmlab.cli.entry import exit_code
from vlmlab.contracts.errors import UserError
from vlmlab.runs.folder import RunFolder
folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
try:
    with RunFolder(folder) as run:
        if run.open(config) is None:
            with (folder / "trained.txt").open("a") as file:
                file.write("once\\n")
            time.sleep(0.5)
            run.finish({"fake/vqa_accuracy": 0.1 * config["x"]}, {})
except UserError as error:
    sys.exit(exit_code(error))
"""


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConfigLoader]:
    lay_down(tmp_path)
    monkeypatch.setattr(_cells.rules, "admitted", lambda cfg, hydra_cfg, own=(): plain(cfg))  # its keys are not a run's
    monkeypatch.chdir(tmp_path)
    Plugins.instance()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def cells_of(loader: ConfigLoader, jobs: Sequence[Sequence[str]], given: Sequence[str] = ()) -> list[Cell]:
    """The cells of a sweep whose sweeper gives these overrides; `given` have one value on the command line."""
    config: DictConfig = compose("train", overrides=list(given), return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    HydraConfig.instance().set_config(config)
    return plan(config, loader, [[*job, *given] for job in jobs], 0, Path("sweeps/s"))


def train(cells: Sequence[Cell]) -> list[str]:
    """Train what is not finished; the names of what was."""
    left = [cell for cell in cells if not cell.settle_finished()]
    for cell in left:
        cell.announce()
        assert cell.config is not None
        with RunFolder(cell.folder) as run:
            assert run.open(cell.config, cell.overrides) is None
            run.finish({"fake/vqa_accuracy": 0.1 * cell.config["x"]}, {"params": 1})
    return [cell.name for cell in left]


def test_identity_a_cell_is_its_configuration_and_not_its_name(loader: ConfigLoader) -> None:
    assert train(cells_of(loader, [["x=1"], ["x=2"]], given=["seed=0"])) == ["x-1", "x-2"]
    grown = cells_of(loader, [["x=1", "seed=0"], ["x=1", "seed=1"], ["x=2", "seed=0"], ["x=2", "seed=1"]])
    assert [cell.folder.name for cell in grown] == ["x-1", "x-1_seed-1", "x-2", "x-2_seed-1"]
    assert train(grown) == ["x-1_seed-1", "x-2_seed-1"]
    assert families(grown) == {("1",): 2, ("2",): 2}
    assert train(cells_of(loader, [["x=1", "seed=0"], ["x=2", "seed=1"]])) == []
    assert json.loads((grown[0].folder / "overrides.json").read_text()) == ["x=1", "seed=0"]
    rows = [line.split()[:3] for line in write_table(Path("sweeps/s")).splitlines()]
    assert ["1", "2", "done"] in rows and ["2", "2", "done"] in rows  # two compositions of two seeds


def test_numbering_changes_nothing(loader: ConfigLoader) -> None:
    train(cells_of(loader, [["x=2"], ["x=3"]]))
    grown = cells_of(loader, [["x=1"], ["x=3"], ["x=4"], ["x=2"]])
    assert [cell.cfg.hydra.job.num for cell in grown] == [0, 1, 2, 3]
    assert train(grown) == ["x-1", "x-4"]


def test_states_include_cells_in_flight(loader: ConfigLoader) -> None:
    done, flying, dead, failed, waiting = cells_of(loader, [[f"seed={seed}"] for seed in range(5)])
    train([done])
    for cell in (flying, dead, failed, waiting):
        cell.announce()
    runs = [RunFolder(cell.folder) for cell in (flying, dead, failed)]
    for run, cell in zip(runs, (flying, dead, failed), strict=True):
        run.open(cell.config or {})
        run.write_state("running", "one", 1, 2)
    runs[2].end("failed", "no luck")
    for run in runs[1:]:
        run.close()
    try:
        text = write_table(Path("sweeps/s"))
        assert "5 cells: 1 done, 1 failed, 1 interrupted, 1 not started, 1 running" in text
        assert "running: seed=1: stage one step 1" in text and "failed: seed=3: no luck" in text
        assert "1 done, 1 failed" in Path("sweeps/s/table.csv").read_text()
    finally:
        runs[0].close()


def test_two_launchers_at_once_train_each_cell_once(loader: ConfigLoader) -> None:
    jobs = [[f"x={x}"] for x in range(1, 4)]
    launchers = [cells_of(loader, jobs), cells_of(loader, jobs)]

    def command(cell: Cell) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(cell.folder), json.dumps(cell.config)]

    pools = [Pool([""] * 2, command, None, lambda cells: None) for _ in launchers]
    threads = [threading.Thread(target=pool.run, args=(cells,)) for pool, cells in zip(pools, launchers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    states = [[(cell.state, cell.note) for cell in cells if cell.state != "done"] for cells in launchers]
    assert states == [[], []]
    assert [(cell.folder / "trained.txt").read_text() for cell in launchers[0]] == ["once\n"] * 3
    assert all(cell.run.state()["state"] == "done" for cell in launchers[0])


def test_another_configuration_is_refused_before_anything_begins(loader: ConfigLoader) -> None:
    train(cells_of(loader, [["x=1"], ["x=2"]]))
    with pytest.raises(ConfigError, match=r"s/x-2 holds a run of another configuration \(y: 1 -> 2\); choose another"):
        cells_of(loader, [["x=3"], ["x=2"]], given=["y=2"])
    assert not Path("sweeps/s/x-3").exists()
    fresh = cells_of(loader, [["x=3"], ["x=2"]], given=["y=2", "fresh=true"])
    assert [cell.state for cell in fresh] == ["waiting", "waiting"]
