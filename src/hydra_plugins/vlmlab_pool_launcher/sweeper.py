"""The sweeper that ``conf/train.yaml`` uses: Hydra's own, which leaves composing the cells to a launcher that does.

Hydra runs this file without entering it into ``sys.modules``: a dataclass here cannot have postponed annotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore


@dataclass
class CellsSweeperConf(BasicSweeperConf):
    """Keys below ``hydra.sweeper``, as Hydra's own has them."""

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.sweeper.CellsSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="cells", node=CellsSweeperConf, provider="vlmlab")


class CellsSweeper(BasicSweeper):
    """All combinations of the swept values."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every cell, for a launcher that composes each only when it starts; ours compose all before."""
        if not getattr(self.launcher, "composes_first", False):
            super().validate_batch_is_legal(batch)
