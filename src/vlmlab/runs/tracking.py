"""Who a run is at Weights & Biases, and whether it is told at once; free of torch."""

from __future__ import annotations

import json
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from vlmlab.contracts.errors import UserError, reason
from vlmlab.contracts.terminal import tell
from vlmlab.runs.files import read_json, write_json
from vlmlab.runs.folder import CELL

KEPT = "wandb.json"
"""In the folder of a run or a sweep: how many rows its W&B run has, and of a sweep its id."""

HOST = "https://api.wandb.ai"

INIT_S = 30
"""Seconds to wait for the server before going on offline."""

FLUSH, FLUSH_S = "x_transaction_log_flush_interval", 1.0
"""A setting that not every version has: seconds until rows are in W&B's file, where a killed process loses none."""

DATA = "WANDB_DATA_DIR"
"""Where W&B puts the pictures of tables until it sends them: in the run folder, which can so be synced elsewhere."""


def mode_of(asked: str) -> str:
    """``online`` or ``offline`` (or what ``WANDB_MODE`` says instead): never online without a key, so never a prompt.

    Args:
        asked: auto (online where a key is), online or offline.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if asked == "auto" else asked)
    return "offline" if mode == "online" and not has_key() else mode


def begun(settings: Mapping[str, Any], asked: str) -> Any:
    """A W&B run; offline where the server cannot be reached, with a note.

    Args:
        settings: keywords of ``wandb.init``; ``dir`` is the folder of the run.
        asked: auto, online or offline.

    Raises:
        UserError: it cannot be begun at all.
    """
    import wandb

    os.environ.setdefault(DATA, str(Path(str(settings["dir"])) / "wandb"))
    mode: Any = mode_of(asked)
    if mode == "offline" and asked == "online":
        tell("note: logger.mode=online and there is no key (WANDB_API_KEY, wandb login): logged offline")
    own: dict[str, Any] = {"init_timeout": INIT_S, FLUSH: FLUSH_S}
    known = {key: value for key, value in own.items() if key in wandb.Settings.model_fields}
    try:
        return wandb.init(**settings, mode=mode, settings=wandb.Settings(**known))
    except wandb.errors.Error as error:
        if mode == "offline":
            raise UserError(f"W&B cannot begin a run ({reason(error)}); choose logger=jsonl.") from error
        tell(f"note: W&B cannot be reached ({reason(error)}): logged offline, `wandb sync` tells it later")
    return wandb.init(**settings, mode="offline", settings=wandb.Settings(**known))


def has_key() -> bool:
    """Whether a key is in the environment, or was kept by ``wandb login``."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or HOST).netloc
    for place in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if place and netrc.netrc(str(Path(place).expanduser())).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def group_of(folder: Path) -> str | None:
    """The sweep that a run is a cell of."""
    path = folder.resolve()
    return path.parent.name if (path / CELL).is_file() else None


def name_of(folder: Path) -> str:
    """A run's name; of a cell, those of its overrides in which the cells of its sweep differ."""
    path = folder.resolve()
    mine = _overrides(path)
    others = [_overrides(cell.parent) for cell in path.parent.glob(f"*/{CELL}")] if mine else []
    own = [word for word in mine if not all(word in other for other in others)]
    return " ".join(own) or path.name


def _overrides(cell: Path) -> Sequence[str]:
    try:
        found = json.loads((cell / CELL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [str(word) for word in found] if isinstance(found, list) else []


class Counted:
    """The number of rows that the W&B run of a folder has, over all processes that have written some.

    Args:
        folder: of a run or a sweep.
        run: the id of the W&B run; None: the one that is kept there, or a new one.
    """

    def __init__(self, folder: Path, run: str | None = None) -> None:
        self.file = folder / KEPT
        kept = read_json(self.file) or {}
        self.id = run or str(kept.get("id") or uuid.uuid4().hex[:16])
        rows = kept.get("rows")
        self._rows = rows if kept.get("id") == self.id and isinstance(rows, int) else 0

    def next(self) -> int:
        """The number of the next row; what is lost with a process is not counted again."""
        number, self._rows = self._rows, self._rows + 1
        write_json(self.file, {"id": self.id, "rows": self._rows})
        return number
