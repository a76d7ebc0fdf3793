"""One thread, no network, Ctrl-C as at a terminal, and where data of the outside lies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before torch or transformers are imported, here and in every process a test starts.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "AUTO",  # as vlmlab sets it, also where a test imports torch first
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
    "COLUMNS": "120",  # whatever terminal the tests are started in
}.items():
    os.environ[_name] = _value
for _name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "VLMLAB_LAUNCHER_PID", "VLMLAB_DEBUG"):
    os.environ.pop(_name, None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job, and all that it starts, ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # so does what nohup starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: ``$VLMLAB_SHARED``, or ``shared/data`` beside the checkout."""
    named = os.environ.get("VLMLAB_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set VLMLAB_SHARED to its folder")
    return folder
