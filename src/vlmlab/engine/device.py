"""The device that a command or a caller names."""

from __future__ import annotations

import torch

from vlmlab.contracts.errors import UserError


def device_of(name: str) -> torch.device:
    """A torch device by its name; ``auto``: a GPU where there is one.

    Raises:
        UserError: torch does not know it, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is unknown; choose one of auto, cpu, cuda.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} is not there ({torch.cuda.device_count()} GPUs); choose device=cpu or auto.")
    return device
