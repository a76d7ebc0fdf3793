"""The inspect command: ``vlmlab inspect data=...`` shows what a stage's model will see; nothing is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules import admitted
from vlmlab.cli.rules.schema import Inspect
from vlmlab.cli.verb import run_verb
from vlmlab.contracts.errors import listed
from vlmlab.contracts.terminal import tell
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs.files import check_place


def inspect_command(cfg: DictConfig) -> None:
    """Write the page, and say the same in the terminal.

    Raises:
        ConfigError: the composition breaks a rule, there is no such stage, or a key has a value it cannot have.
        UserError: training would refuse the data; the page says so too.
    """
    admitted(cfg, HydraConfig.get(), Inspect)
    stage, page = chosen_stage(cfg), Path(str(cfg.out))
    check_place(page, "out")
    from vlmlab.inspect.inspection import inspect_stage, print_report, write_page  # from here on torch

    found = inspect_stage(cfg, stage, cfg.n, cfg.check)
    print_report(found)
    tell(f"\n{write_page(found, page)}")
    if found.refused is not None:
        raise found.refused


def chosen_stage(cfg: DictConfig) -> Stage:
    """The stage that ``stage`` names, or the last one.

    Raises:
        ConfigError: the recipe has no such stage.
    """
    stages = parse(cfg)
    if cfg.stage is None:
        return stages[-1]
    found = next((stage for stage in stages if stage.name == str(cfg.stage)), None)
    if found is None:
        known = listed(stage.name for stage in stages)
        raise ConfigError(f"stage={cfg.stage} is not a stage of this recipe; choose one of {known}")
    return found


if __name__ == "__main__":
    sys.exit(run_verb("inspect", inspect_command))
