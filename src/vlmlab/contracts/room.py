"""Whether a part's weights fit this machine, counted before the first of them is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vlmlab.contracts.errors import UserError


def check_room(group: str, sizes: Mapping[str, Any], make: Callable[[], nn.Module]) -> None:
    """Count the weights of a part that is made from sizes; does nothing where it is made without weights anyway.

    Args:
        group: its group in the configuration.
        sizes: what it is made from; its largest whole numbers are named.
        make: makes it, here on the meta device.

    Raises:
        UserError: its weights alone are more than the machine's memory.
    """
    if torch.empty(0).device.type == "meta":
        return
    with torch.device("meta"):
        part = make()
    need = sum(tensor.numel() * tensor.element_size() for tensor in [*part.parameters(), *part.buffers()])
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        numbers = {key: size for key, size in sizes.items() if isinstance(size, int) and not isinstance(size, bool)}
        largest = sorted(numbers, key=lambda key: -numbers[key])[:3]
        named = ", ".join(f"{group}.{key}={numbers[key]}" for key in largest)
        raise UserError(
            f"{named} would be {need / 1e9:,.0f} GB of weights and this machine has {have / 1e9:,.0f} GB of "
            "memory; give smaller sizes"
        )
