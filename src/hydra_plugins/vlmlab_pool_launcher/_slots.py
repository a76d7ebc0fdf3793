"""How many cells run at a time: a slot per visible GPU, or per two cores."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from vlmlab.cli.entry import ConfigError

CORES_PER_SLOT = 2


def visible_gpus() -> list[str]:
    """The GPUs a process started from here would see, as values for ``CUDA_VISIBLE_DEVICES``; torch is not asked."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    if listed.returncode != 0:
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_slots(cells: Sequence[Cell], wanted: int | None) -> list[str]:
    """One entry per slot: the GPU it stands for, or an empty string on CPU.

    Args:
        cells: of the sweep; ``trainer.accelerator=cpu`` in all of them leaves the GPUs alone.
        wanted: ``hydra.launcher.slots``; several slots share a GPU if there are more slots than GPUs.

    Raises:
        ConfigError: no cell, or fewer slots than a cell needs.
    """
    if wanted is not None and wanted < 1:
        raise ConfigError(f"hydra.launcher.slots={wanted} runs nothing; give at least 1, or null for one per device")
    gpus = [] if all(cell.accelerator == "cpu" for cell in cells) else visible_gpus()
    count = wanted or (len(gpus) if gpus else max(1, cores() // CORES_PER_SLOT))
    slots = [gpus[i % len(gpus)] if gpus else "" for i in range(count)]
    for cell in cells:
        if cell.devices == -1:
            cell.devices = len(slots)
        cell.devices = max(1, cell.devices)
        if cell.devices > len(slots):
            raise ConfigError(
                f"cell {cell.name} has trainer.devices={cell.devices} and there are {len(slots)} slots; "
                f"set hydra.launcher.slots={cell.devices} or fewer devices"
            )
    return slots
