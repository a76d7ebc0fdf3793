"""What fusions share: refusals that name the key."""

from __future__ import annotations

from vlmlab.contracts.errors import UserError


def check_counts(**counts: int | None) -> None:
    """Keys that must be whole numbers of at least 1; null has a meaning of its own.

    Raises:
        UserError: one of them is not.
    """
    for key, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"fusion.{key}={value} is not possible; give a whole number of at least 1.")
