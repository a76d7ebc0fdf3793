"""A finished run beside its data as they are now. Free of torch."""

from __future__ import annotations

from omegaconf import DictConfig

from vlmlab.data.provenance import changed_since
from vlmlab.runs.folder import RunFolder

CHANGED = "data_changed"
"""Key of ``env.json``: how the data differed when the run's command was last given, for tables."""


def note_changed(run: RunFolder, config: DictConfig) -> str:
    """What of a finished run's data has changed since, in words, noted in its folder; empty: nothing."""
    changed = changed_since(run.env(), config)
    if changed != run.env().get(CHANGED, ""):
        run.update_env(**{CHANGED: changed})
    return changed
