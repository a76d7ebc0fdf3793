"""``vlmlab wandb <sweep>``: a sweep's table and figure as an artifact of one W&B run, beside the runs of its cells.

The launcher does the same at the end of a sweep with ``logger=wandb``. Nothing of torch is loaded.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.compare import spelled
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own
from vlmlab.cli.rules.schema import Wandb
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.terminal import tell
from vlmlab.runs.tracking import Counted, begun

EXAMPLE = "vlmlab wandb sweeps/<name>"
TABLE, FIGURE = "table.csv", "figure.png"
FILES = (TABLE, "table.md", FIGURE, "report.html")
"""What of a sweep's folder is sent, where it is there."""


def wandb_command(cfg: DictConfig) -> None:
    """Send a sweep's table and figure.

    Raises:
        ConfigError: the sweep is missing or no folder.
        UserError: there is no table, or W&B refuses.
    """
    if OmegaConf.is_missing(cfg, "folder"):
        raise ConfigError(f"which sweep? write sweep=..., as in: {EXAMPLE}")
    check_own(cfg, Wandb)
    sweep = Path(str(cfg.folder))
    if not sweep.is_dir():
        raise ConfigError(f"sweep={sweep} is not a folder; give an existing one, as in: {EXAMPLE}")
    tell(log_sweep(sweep, {key: cfg[key] for key in ("project", "entity", "mode")}))


def log_sweep(sweep: Path, keys: Mapping[str, Any]) -> str:
    """Log a sweep's table, figure and files; again: the same W&B run with another version of the artifact.

    Args:
        sweep: the sweep's folder.
        keys: ``project``, ``entity``, ``mode``, as of ``logger=wandb``.

    Returns:
        One line about it.

    Raises:
        UserError: there is no table, or W&B refuses.
    """
    import wandb

    if not (sweep / TABLE).is_file():
        raise UserError(f"{sweep} has no {TABLE}, which a sweep leaves when it ends; give its command again.")
    rows, name = Counted(sweep), sweep.resolve().name
    settings = {
        "id": rows.id,
        "name": name,
        "group": name,
        "job_type": "sweep",
        "project": keys.get("project") or "vlmlab",
        "entity": keys.get("entity"),
        "dir": str(sweep.resolve()),
        "resume": "allow",
    }
    with begun(settings, str(keys.get("mode") or "auto")) as run:
        head, *body = csv.reader((sweep / TABLE).read_text(encoding="utf-8").splitlines())
        columns: list[str | int] = [*head]
        logged = {"table": wandb.Table(columns=columns, data=[row[: len(head)] for row in body])}
        run.log(logged | _figure(sweep), step=rows.next())
        artifact = wandb.Artifact(f"sweep-{rows.id}", type="sweep", metadata={"sweep": name})
        for file in FILES:
            if (sweep / file).is_file():
                artifact.add_file(str(sweep / file), name=file)
        run.log_artifact(artifact)
    return f"W&B: {sweep / TABLE} and its figure are an artifact of the run {name}, in the group of its cells"


def _figure(sweep: Path) -> dict[str, Any]:
    import wandb

    return {"figure": wandb.Image(str(sweep / FIGURE))} if (sweep / FIGURE).is_file() else {}


if __name__ == "__main__":
    conf = conf_folder()
    sys.argv[1:] = spelled(sys.argv[1:])
    main = hydra.main(config_path=str(conf), config_name="wandb", version_base="1.3")(guard(wandb_command))
    sys.exit(run_command(main, conf, "wandb"))
