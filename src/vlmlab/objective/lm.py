"""``lm``: next-token cross-entropy on the supervised tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import Drop, NotNegative


class LanguageModelling:
    """- sum over supervised tokens of log p(token | everything before it, the images), and their number.

    Args:
        weight: factor of this objective in the total loss.
        label_smoothing: share of the target's probability spread over the vocabulary.
    """

    per_micro_batch = False

    def __init__(self, weight: NotNegative = 1.0, label_smoothing: Drop = 0.0) -> None:
        self.weight = weight
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum in nats, tokens)}."""
        total = F.cross_entropy(
            outputs.logits.float(), outputs.targets, reduction="sum", label_smoothing=self.label_smoothing
        )
        return {"lm": (total, total.new_tensor(outputs.targets.numel()))}
