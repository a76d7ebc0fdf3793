"""Composing the cells of a sweep: those that choose the same files, and differ in values, are composed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf


class Composer:
    """Composes one cell after the other, as Hydra's loader would.

    Files are chosen first and values written over what they say, so that a cell with the files of an earlier one is
    that one's copy with its own values.

    Args:
        config: the sweep's configuration.
        loader: composes a cell from its files.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader
        self._parser = OverridesParser.create()
        self._known: dict[tuple[str, ...], DictConfig] = {}
        self._groups: dict[str, bool] = {}

    def composed(self, words: Sequence[str]) -> DictConfig:
        """The configuration of a cell.

        Args:
            words: its overrides.

        Raises:
            HydraException: they cannot be composed.
        """
        overrides = self._parser.parse_overrides(list(words))
        same = tuple(o.key_or_group if self._is_value(o) else str(o.input_line) for o in overrides)
        if same not in self._known:
            self._known[same] = self.loader.load_sweep_config(self.config, list(words))
            return copy.deepcopy(self._known[same])
        cfg = copy.deepcopy(self._known[same])
        for override in filter(self._is_value, overrides):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        task = [o for o in overrides if not o.is_hydra_override()]
        cfg.hydra.overrides.task = [str(o.input_line) for o in task]
        naming = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(
            overrides=task, kv_sep=naming.kv_sep, item_sep=naming.item_sep, exclude_keys=naming.exclude_keys
        )
        return cfg

    def _is_value(self, override: Override) -> bool:
        """Whether it replaces a value: it is not a choice of a file, adds and removes no key, and merges nothing."""
        key = override.key_or_group
        if override.type != OverrideType.CHANGE or override.package is not None or override.is_hydra_override():
            return False
        if key not in self._groups:
            self._groups[key] = bool(self.loader.get_group_options(key))
        return not self._groups[key] and not isinstance(override.value(), dict)
