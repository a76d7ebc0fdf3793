"""``hard_negatives``: an image prefers its own text to those that differ from it in one thing (FG-CLIP 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative


class HardNegatives:
    """Cross-entropy of every image over the texts of its own sample, and a hinge on the nearest of them.

    The rows of a sample of several images are each other's hard negatives: in the paper a caption and its edits, in
    ``WorldContrasts`` scenes that differ in one thing. With s(i, j) = t <x_i, y_j> the loss of image i is
    - log softmax_j s(i, j) at j = i, and `hinge` x max(0, margin - <x_i, y_i> + max over other j <x_i, y_j>). That a
    margin is in the loss is known, its form here is our reading. Samples of one image have no part in it.

    Args:
        hinge: factor of the hinge; 0 leaves it out.
        margin: by which a cosine is to be larger.
        weight: factor of this objective in the total loss (0.5 in FG-CLIP 2).
    """

    per_micro_batch = True
    pairs = True

    def __init__(self, hinge: NotNegative = 1.0, margin: NotNegative = 0.2, weight: NotNegative = 0.5) -> None:
        self.hinge, self.margin, self.weight = hinge, margin, weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"hard_negatives": (sum, images that have one)}.

        Raises:
            UserError: the stage makes no pairs.
        """
        pairing = outputs.pairing
        if pairing is None:
            raise UserError("objective=hard_negatives needs a stage of PairModule; use objective=lm otherwise.")
        names = [ids[0] for ids in batch.sample_ids]
        device = pairing.image.device
        same = torch.tensor([[a == b for b in names] for a in names], device=device)  # (B, B)
        has = same.sum(1) > 1
        cosines = pairing.image.float() @ pairing.text.float().T
        own = torch.arange(len(names), device=device)
        scores = (pairing.log_scale.exp() * cosines).masked_fill(~same, -torch.inf)
        loss = F.cross_entropy(scores, own, reduction="none")
        others = cosines.masked_fill(~same | torch.eye(len(names), dtype=torch.bool, device=device), -torch.inf)
        loss = loss + self.hinge * (self.margin - cosines.diagonal() + others.amax(1)).clamp(min=0)
        total = loss[has].sum() + 0.0 * (pairing.bias + cosines.sum())
        return {"hard_negatives": (total, total.new_tensor(float(has.sum())))}
