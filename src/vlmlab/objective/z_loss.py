"""``z_loss``: keeps the softmax's normaliser near 1 (PaLM, arXiv 2204.02311 section 5; IDEFICS's training memo)."""

from __future__ import annotations

from torch import Tensor

from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative


class ZLoss:
    """coefficient x sum over supervised tokens of (log sum exp of the logits)^2, and their number; an extra term.

    Args:
        weight: factor of this objective in the total loss.
        coefficient: the papers' small factor, 1e-4 to 1e-3.
    """

    per_micro_batch = False

    def __init__(self, weight: NotNegative = 1.0, coefficient: NotNegative = 1e-4) -> None:
        self.weight = weight
        self.coefficient = coefficient

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"z_loss": (sum, tokens)}."""
        total = self.coefficient * outputs.logits.float().logsumexp(-1).square().sum()
        return {"z_loss": (total, total.new_tensor(outputs.targets.numel()))}
