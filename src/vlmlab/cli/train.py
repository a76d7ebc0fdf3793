"""The train command: rules, run folder, training, result. ``python -m vlmlab.cli.train`` is ``python train.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from vlmlab.analyse.table import final_table
from vlmlab.cli import rules
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.data import check_same, check_sources
from vlmlab.cli.entry import ConfigError, guard, one_line, remove_empty, run_command
from vlmlab.contracts.errors import (
    DataError,
    MachineError,
    OutOfMemory,
    Unscored,
    UserError,
    reason,
    unbuildable,
    user_error_in,
)
from vlmlab.contracts.faults import machine_error
from vlmlab.contracts.terminal import tell
from vlmlab.data.skipped import TooManyBad, note
from vlmlab.runs import places as places  # registers the resolvers that conf/train.yaml uses
from vlmlab.runs.data import note_changed
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.origin import check_origin
from vlmlab.runs.watchdog import die_with_parent, is_further_rank
from vlmlab.runs.withheld import stored

OF_THE_MACHINE = (MachineError, OutOfMemory)
"""What the same command may come through another time, so that the run says how it ended."""


BEGINNING = {"config.yaml", "env.json", "state.json", "metrics.jsonl", "lock", "origin.json", "initial.safetensors"} | {
    "logged.json",
    "wandb.json",
}
"""Files of a run before its first step that can be removed."""


REPORT = "report.html"


def train_command(cfg: DictConfig) -> None:
    """Train the composed configuration in Hydra's output folder, or print what is already there.

    Raises:
        ConfigError: the composition breaks a rule.
        UserError: the folder is in use or belongs to another configuration; or training says so.
    """
    die_with_parent()
    config, folder = admit(cfg)
    if is_further_rank():  # of a run that rank zero has opened
        _train(cfg, folder)
        return
    _look_at_data(cfg, config, folder)
    with RunFolder(folder) as run:
        written = stored(cfg, config)
        try:
            result = run.open(config, list(HydraConfig.get().overrides.task), fresh=bool(cfg.fresh), written=written)
        except OSError:  # a disk that has not even room for that
            if not _learnt(folder):
                _forget(folder)
            raise
        if result is not None:
            told = _told_apart(run, config, cfg)
            tell(f"{folder} is finished{told}; fresh=true trains again\n\n{final_table(result, folder)}")
            if not (folder / REPORT).is_file():  # its process ended between the two
                tell(_report(cfg, folder, result))
            return
        tell(f"run folder: {folder}")
        result = train_in(run, cfg)
        if result is not None:
            tell(f"\n{final_table(result, folder)}\n{_report(cfg, folder, result)}")


def admit(cfg: DictConfig) -> tuple[dict[str, Any], Path]:
    """The resolved configuration and the run's folder, which Hydra has made and which a refused command leaves not.

    Raises:
        ConfigError: the composition breaks a rule.
    """
    hydra_cfg = HydraConfig.get()
    folder = _short(Path(hydra_cfg.runtime.output_dir))
    try:
        config = rules.admitted(cfg, hydra_cfg)
    except ConfigError:
        remove_empty(folder)
        remove_empty(Path(str(hydra_cfg.run.dir)))
        raise
    return config, folder


def _told_apart(run: RunFolder, config: Mapping[str, Any], cfg: DictConfig) -> str:
    """What of a finished run is not as it would be if it were made now."""
    told = [", made by other code of this package"] if run.by_other_code() else []
    if data := note_changed(run, cfg):
        told.append(f", {data}")
    if machine := run.differs(config).execution:
        told.append(f", run with other settings of the machine ({'; '.join(machine)})")
    return "".join(told)


def _look_at_data(cfg: DictConfig, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse missing or broken data before anything trains, leaving no folder but for a long list of bad rows."""
    held = not cfg.fresh and RunFolder(folder).holds(config)
    try:
        check_origin(folder, cfg.init_from, fresh=bool(cfg.fresh))
        if held:
            return
        for line in check_sources(cfg):
            tell(f"note: {line}")
    except (UserError, InstantiationException) as error:
        mistake = error if isinstance(error, UserError) else user_error_in(error)
        if isinstance(mistake, TooManyBad) and mistake.listed:
            note(folder, "data", mistake.skipped)
        remove_empty(folder)
        if isinstance(error, DataError) or isinstance(mistake, DataError):
            raise
        raise ConfigError(_said(error)) from error


def train_in(run: RunFolder, cfg: DictConfig) -> dict[str, Any] | None:
    """Train, and leave in ``state.json`` how it ended; one that is refused before its first step leaves no folder.

    Raises:
        ConfigError: it cannot be built, which was found before anything was learnt.
    """
    try:
        check_same(run, cfg)
        return _train(cfg, run.path)
    except Exception as error:
        if isinstance(error, Unscored) and error.scores:
            tell(f"\n{final_table(run.result() or {}, run.path)}\n")
        refused = None if isinstance(error, UserError) else machine_error(error, run.path)
        run.end("failed", _said(refused or error))
        if refused is not None:
            raise refused from error
        known = isinstance(error, InstantiationException | UserError) and not isinstance(error, OF_THE_MACHINE)
        if not known or _learnt(run.path):
            raise
        _forget(run.path)
        if any(isinstance(one, DataError | Unscored) for one in (error, user_error_in(error))):
            raise
        raise ConfigError(_said(error)) from error
    except BaseException:  # a signal; what was learnt is saved
        run.end("interrupted")
        tell("interrupted; the same command goes on from here", sys.stderr)
        raise


def _learnt(folder: Path) -> bool:
    """Whether a run has come through its first step or further."""
    return any(row.get("step") for row in RunFolder(folder).metrics()) or any(folder.glob("stages/*/*"))


def _forget(folder: Path) -> None:
    """Remove a run folder in which nothing is but how the run began."""
    found = [path for path in folder.rglob("*") if not path.is_dir()]
    if {path.name for path in found} <= BEGINNING:
        for path in found:
            path.unlink()
        for place in sorted(folder.rglob("*"), reverse=True):
            place.rmdir()
        remove_empty(folder)


def _said(error: Exception) -> str:
    """Why a run failed, in one line where that is known."""
    if isinstance(error, InstantiationException):
        return unbuildable(error)
    return one_line(str(error)) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _train(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    from vlmlab.train.run import train  # from here on torch

    try:
        return train(cfg, folder)
    except OutOfMemory as error:
        from vlmlab.plan.remedies import remedies

        raise MachineError(f"{error}; {remedies(cfg, error)}") from error
    except Exception as error:
        lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
        if lightning is None or not isinstance(error, lightning.MisconfigurationException):
            raise
        settings = ", ".join(f"trainer.{key}={cfg.trainer[key]}" for key in ("accelerator", "devices", "strategy"))
        raise UserError(
            f"{settings} cannot work here ({reason(error)}); use trainer.accelerator=auto trainer.devices=1"
        ) from error


def _report(cfg: DictConfig, folder: Path, result: dict[str, Any]) -> Path:
    from vlmlab.evaluate.gallery import write_gallery

    return write_gallery(cfg, folder, result, title=f"Run {folder.name}")


def _short(folder: Path) -> Path:
    """The folder relative to the working directory, if it is below."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="train", version_base="1.3")(guard(train_command))
    sys.exit(run_command(main, conf, "train"))
