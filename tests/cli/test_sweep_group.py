"""The group ``sweep`` chooses launcher and sweeper, and is not part of a cell."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from vlmlab.cli.conf import conf_folder
from vlmlab.runs.config import plain
from vlmlab.runs.names import cell_name, result_overrides, run_name

CHOSEN = {
    "pool": ("PoolLauncher", "CellsSweeper"),
    "slurm": ("SlurmLauncher", "CellsSweeper"),
    "ray": ("RayLauncher", "CellsSweeper"),
    "optuna": ("PoolLauncher", "OptunaSweeper"),
}


@pytest.mark.parametrize("choice", sorted(CHOSEN))
def test_a_choice_sets_launcher_and_sweeper_and_nothing_else(choice: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", overrides=[f"sweep={choice}", "hydra.launcher.slots=3"], return_hydra_config=True)
        targets = tuple(cfg.hydra[key]._target_.rpartition(".")[2] for key in ("launcher", "sweeper"))
        assert targets == CHOSEN[choice] and cfg.hydra.launcher.slots == 3
        assert plain(compose("train", overrides=[f"sweep={choice}"])) == plain(compose("train"))


def test_it_names_no_folder() -> None:
    assert result_overrides(["sweep=slurm", "mask=causal"]) == ["mask=causal"]
    assert run_name(None, ["sweep=slurm"]) == "default" and cell_name(["mask=causal"]) == "mask-causal"
