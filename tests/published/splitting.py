"""A published model as a run, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.test_conf import composed

from vlmlab.published.model import find
from vlmlab.published.split import split_model


def imported(folder: Path, to: Path, *words: str, **options: Any) -> Path:
    """The run's folder.

    Args:
        folder: the published model's.
        to: where the run goes.
        words: further overrides.
        options: of ``find``.
    """
    found = find(str(folder), **options)
    every = [*found.words(to), *words]
    split_model(found, composed(*every), to, every)
    return to
