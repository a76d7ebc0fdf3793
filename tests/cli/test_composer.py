"""Cells of large sweeps: composed as Hydra composes them, and the wrong one among them found early."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.vlmlab_pool_launcher import _cells
from hydra_plugins.vlmlab_pool_launcher._composer import Composer
from hydra_plugins.vlmlab_pool_launcher.launcher import PoolLauncher
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import UserError

SWEPT = ["connector.hidden=8,16", "seed=1,2"]


@pytest.fixture(scope="module")
def hydra() -> Iterator[Hydra]:
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        found = GlobalHydra.instance().hydra
        assert found is not None
        yield found


@pytest.fixture(scope="module")
def sweep(hydra: Hydra) -> DictConfig:
    cfg = hydra.compose_config("train", SWEPT, run_mode=RunMode.MULTIRUN)
    HydraConfig.instance().set_config(cfg)
    return cfg


def test_a_copy_with_other_values_is_what_hydra_composes(hydra: Hydra, sweep: DictConfig) -> None:
    composer = Composer(sweep, hydra.config_loader)
    cells = (
        ["connector.hidden=8", "seed=1"],
        ["connector.hidden=null", "seed=2"],
        ["connector=qformer", "evaluation.held_out=[]"],
        ["connector=qformer", "evaluation.held_out=[short]"],
        ["+data.extra=1", "seed=${trainer.threads}"],
        ["+data.extra=2", "seed=3"],
    )
    for words in cells:
        whole = hydra.config_loader.load_sweep_config(sweep, words)
        assert OmegaConf.to_container(composer.composed(words)) == OmegaConf.to_container(whole), words


def test_every_value_is_looked_at_before_their_combinations(
    hydra: Hydra, sweep: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, real = [], _cells.rules.admitted
    monkeypatch.setattr(_cells.rules, "admitted", lambda cfg, *own: looked.append(cfg.seed) or real(cfg, *own))
    jobs = [[f"connector.hidden={hidden}", f"seed={seed}"] for hidden in (8, 16) for seed in (0, 1, -1)]
    with pytest.raises(ConfigError, match=r"^seed=-1 is not possible"):
        _cells.plan(sweep, hydra.config_loader, jobs, 0, tmp_path)
    assert looked == [0, 1, -1]
    del looked[:]
    jobs = [[f"connector.hidden={hidden}", f"seed={seed}"] for hidden in (8, 16, -5) for seed in (0, 1, 2)]
    with pytest.raises(ConfigError, match=r"^connector.hidden=-5 is not possible"):
        _cells.plan(sweep, hydra.config_loader, jobs, 0, tmp_path)
    assert looked == [0, 1, 2, 0, 0]
    cells = _cells.plan(sweep, hydra.config_loader, jobs[:5], 4, tmp_path)
    assert [cell.cfg.hydra.job.num for cell in cells] == [4, 5, 6, 7, 8]


def test_hydras_own_file_is_not_written_through_a_link(hydra: Hydra, sweep: DictConfig, tmp_path: Path) -> None:
    config = copy.deepcopy(sweep)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.sweep.dir = str(tmp_path)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    file = tmp_path / "multirun.yaml"

    def begin() -> None:
        PoolLauncher().setup(hydra_context=context, task_function=lambda cfg: None, config=config)

    begin()
    file.touch()
    begin()
    for plant in (lambda: file.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(file)):
        file.unlink()
        plant()
        with pytest.raises(
            UserError, match=r"multirun\.yaml is a link or not a file, and is not written into; remove it"
        ):
            begin()
    assert not (tmp_path / "elsewhere").exists()
