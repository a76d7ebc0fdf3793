"""``text_contrast``: texts that say something else keep their distance (FG-CLIP 2's textual intra-modal contrast)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import Count, NotNegative


class TextContrast:
    """Of every text log sum exp over the cosines of the `nearest` other texts of the micro-batch.

    A text itself, and texts so similar that they say the same, are left out first.

    Args:
        nearest: how many others count (10 in FG-CLIP 2's code).
        same: cosines above this are of texts that say the same (0.95 there).
        weight: factor of this objective in the total loss (0.1 there).
    """

    per_micro_batch = True
    pairs = True
    of_embeddings = True

    def __init__(self, nearest: Count = 10, same: float = 0.95, weight: NotNegative = 0.1) -> None:
        self.nearest, self.same, self.weight = nearest, same, weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"text_contrast": (sum, texts that have another)}.

        Raises:
            UserError: the stage makes no pairs.
        """
        pairing = outputs.pairing
        if pairing is None:
            raise UserError("objective=text_contrast needs a stage of PairModule; use objective=lm otherwise.")
        text = pairing.text.float()
        cosines = text @ text.T  # (B, B)
        itself = torch.eye(len(text), dtype=torch.bool, device=text.device)
        other = ~itself & (cosines <= self.same)
        near = cosines.masked_fill(~other, -torch.inf).topk(min(self.nearest, len(text)), dim=1).values
        has = other.any(1)
        total = near[has].logsumexp(1).sum() + 0.0 * (
            pairing.bias + pairing.log_scale + pairing.image.sum() + text.sum()
        )
        return {"text_contrast": (total, total.new_tensor(float(has.sum())))}
