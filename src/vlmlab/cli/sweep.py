"""``vlmlab sweep show | table | report <sweep>``: what is in a sweep's folder. Nothing is trained and nothing loaded.

``vlmlab sweep compare`` is ``vlmlab compare``, and ``vlmlab sweep key=value ...`` trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.compare import spelled
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own, trusted
from vlmlab.cli.rules.schema import Look
from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.terminal import tell

SHOWN_CELLS = 6


def show_command(cfg: DictConfig) -> None:
    """Print the state of every cell.

    Raises:
        ConfigError: the sweep is missing or no folder.
    """
    sweep = _sweep(cfg, "show")
    from vlmlab.analyse.progress import show_sweep  # numpy

    tell(show_sweep(sweep))


def table_command(cfg: DictConfig) -> None:
    """Write ``table.csv``, ``table.md`` and the figure, and print the table in the form that is asked for.

    Raises:
        ConfigError: the sweep is missing or no folder.
    """
    sweep = _sweep(cfg, "table")
    from vlmlab.analyse.sweep import write_table  # numpy and scipy

    text = write_table(sweep)
    file = {"csv": "table.csv", "markdown": "table.md"}.get(cfg.form)
    there = file is not None and (sweep / file).is_file()
    tell((sweep / str(file)).read_text(encoding="utf-8").rstrip("\n") if there else text)


def report_command(cfg: DictConfig) -> None:
    """Write ``report.html`` into the sweep's folder.

    Raises:
        ConfigError: the sweep is missing or no folder, or ``cells`` are none of its.
        UserError: no finished cell has the metric or cost.
    """
    sweep = _sweep(cfg, "report")
    cells = None if cfg.cells is None else [str(cell) for cell in cfg.cells]
    for cell in cells or ():
        if not (sweep / cell / "config.yaml").is_file():
            known = sorted(path.parent.name for path in sweep.glob("*/config.yaml"))
            raise ConfigError(f"cells: {cell} is not a cell of {sweep}; choose two of {listed(known[:SHOWN_CELLS])}")
    from vlmlab.evaluate.gallery import write_sweep_gallery  # numpy and scipy

    texts = {key: None if cfg[key] is None else str(cfg[key]) for key in ("metric", "cost")}
    tell(write_sweep_gallery(sweep, cells, trusted(cfg), **texts))


COMMANDS: dict[str, Callable[[DictConfig], None]] = {
    "show": show_command,
    "table": table_command,
    "report": report_command,
}


def _sweep(cfg: DictConfig, verb: str) -> Path:
    check_own(cfg, Look)
    example = f"vlmlab sweep {verb} sweeps/<name>"
    if OmegaConf.is_missing(cfg, "folder"):
        raise ConfigError(f"which sweep? write its folder, as in: {example}")
    sweep = Path(str(cfg.folder))
    if not sweep.is_dir():
        raise ConfigError(f"sweep={sweep} is not a folder; give an existing one, as in: {example}")
    if not any(sweep.iterdir()):
        raise UserError(f"{sweep} is empty; give the folder that a sweep has printed")
    from vlmlab.analyse.results import cell_folders  # numpy

    if not cell_folders(sweep):
        raise UserError(f"{sweep} holds no cell; give the folder that a sweep has printed")
    return sweep


def run(words: Sequence[str]) -> int:
    """The exit code of one of the commands; its name is the first word."""
    conf, verb = conf_folder(), words[0]
    sys.argv[1:] = spelled(words[1:])
    main = hydra.main(config_path=str(conf), config_name="look", version_base="1.3")(guard(COMMANDS[verb]))
    return run_command(main, conf, "look")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
