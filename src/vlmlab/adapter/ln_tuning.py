"""``ln_tuning``: only the norms of a tower train (arXiv 2312.11420), by peft."""

from __future__ import annotations

from peft import LNTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vlmlab.adapter.base import check_name, inject
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import Names, NotNegative, Text, Wrapped


class LnTuningAdapter(Adapter):
    """A trained copy of every norm of the tower is used instead of it; the original stays.

    Args:
        parts: what to wrap, of ``lm``, ``encoder``, ``connector`` and ``fusion``.
        targets: ends of the names of the norms; null is every norm.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        name: of the adapter, where several share one tower.
    """

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        targets: Names | None = None,
        lr: NotNegative | None = None,
        name: Text = "default",
    ) -> None:
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.targets = targets

    def wrap(self, part: nn.Module) -> nn.Module:
        """The tower with its norms wrapped in place; equal to the tower before the first update."""
        targets = norms(part) if self.targets is None else list(self.targets)
        return inject(LNTuningConfig(target_modules=targets), part, self.name)


def norms(part: nn.Module) -> list[str]:
    """Paths of every module whose own weight is a vector: LayerNorm and each family's RMSNorm."""
    found: list[str] = []
    for path, module in part.named_modules():
        if found and path.startswith(f"{found[-1]}."):  # inside an adapter that is there already
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not list(base.children()):
            found.append(path)
    return found
