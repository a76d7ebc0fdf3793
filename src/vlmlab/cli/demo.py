"""The demo command: ``vlmlab demo run=a,b`` shows one or two finished runs in a browser."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own, finished_folder, named_run, trusted
from vlmlab.cli.generate import quoted, settings_of
from vlmlab.cli.rules.schema import Demo
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.terminal import tell
from vlmlab.runs.trust import saved_config

EXAMPLE = "vlmlab demo run=outputs/default"
MOST = 2
"""Runs that a page has room for."""

HERE = ("127.0.0.1", "localhost", "::1")


def demo_command(cfg: DictConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: ``run`` is missing, names more than two, or no folder of a run.
        CheckpointError: a run is not finished, or its files do not fit.
        UserError: gradio is not installed, a run cannot be loaded, or the address cannot be had.
    """
    check_own(cfg, Demo)
    folders = folders_of(cfg)
    check_installed()
    try:
        _serve(cfg, folders)
    except KeyboardInterrupt:  # while it loads
        tell("demo ended")


def folders_of(cfg: DictConfig) -> list[Path]:
    """The folders of the runs, each looked at before torch is imported."""
    given = named_run(cfg, EXAMPLE)
    named = list(given) if OmegaConf.is_list(given) else [given]
    if not 1 <= len(named) <= MOST:
        raise ConfigError(f"run names {len(named)} runs and the page has room for {MOST}; give one or two")
    folders = [finished_folder(name) for name in named]
    if not trusted(cfg):
        for folder in folders:
            saved_config(folder)
    return folders


def check_installed() -> None:
    """Refuse to begin without the extra.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError('vlmlab demo needs gradio; install it: pip install "vlmlab[demo]"')


def _serve(cfg: DictConfig, folders: Sequence[Path]) -> None:
    from vlmlab.demo.page import Demo as Page
    from vlmlab.demo.runs import examples, open_runs
    from vlmlab.demo.serve import serve

    runs = open_runs(folders, cfg.device, cfg.trust)
    tests, why_none = examples(runs[0].model.config, cfg.samples)
    if cfg.host not in HERE:
        tell(f"host={cfg.host}: every machine that reaches this one can ask the model and upload files")
    serve(Page(runs, tests, settings_of(cfg), cfg.seed, why_none), cfg.host, cfg.port)


def with_list(words: Sequence[str]) -> list[str]:
    """The command line with ``run=a,b`` as the list that it means; Hydra would make two commands of it."""
    return [_listed(word) if re.match(r"run=[^\['\"].*,", word) else word for word in words]


def _listed(word: str) -> str:
    names = [quoted(name) for name in word.partition("=")[2].split(",") if name]
    return f"run=[{','.join(names)}]"


if __name__ == "__main__":
    conf = conf_folder()
    sys.argv[1:] = with_list(sys.argv[1:])
    main = hydra.main(config_path=str(conf), config_name="demo", version_base="1.3")(guard(demo_command))
    sys.exit(run_command(main, conf, "demo"))
