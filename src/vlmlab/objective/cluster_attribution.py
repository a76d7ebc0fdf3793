"""``cluster_attribution``: an image is nearest to the texts of its class, and a text to its images (PriorCLIP)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import Drop, Names, NotNegative, Positive


class ClusterAttribution:
    """Cross-entropy of every row over the classes' centres in the other tower's embeddings, both ways, halved.

    A centre is the mean of the embeddings of the micro-batch's rows of a class, not brought to unit length. A row's
    class is the entry of `classes` that is in its text, the first of several; rows of none have no part in it.

    Args:
        classes: words or phrases.
        temperature: similarities are divided by it.
        softness: share of the target that all classes of the micro-batch have evenly.
        weight: factor of this objective in the total loss.
    """

    per_micro_batch = True
    pairs = True

    def __init__(
        self, classes: Names, temperature: Positive = 0.07, softness: Drop = 0.0, weight: NotNegative = 1.0
    ) -> None:
        self.classes = list(classes)
        self.temperature, self.softness, self.weight = temperature, softness, weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"cluster_attribution": (sum in nats, rows of a class)}.

        Raises:
            UserError: the stage makes no pairs from words.
        """
        pairing = outputs.pairing
        if pairing is None or len(batch.texts) != len(pairing.image):
            raise UserError(
                "objective=cluster_attribution needs a stage of PairModule, with a text beside every image."
            )
        classes = [self._class_of(text) for text in batch.texts]
        rows = torch.tensor([row for row, own in enumerate(classes) if own is not None], device=pairing.image.device)
        none = 0.0 * (pairing.bias + pairing.log_scale + pairing.image.sum() + pairing.text.sum())
        if not len(rows):
            return {"cluster_attribution": (none, none.new_tensor(0.0))}
        present = sorted({own for own in classes if own is not None})
        target = torch.tensor([present.index(own) for own in classes if own is not None], device=rows.device)
        image, text = pairing.image[rows].float(), pairing.text[rows].float()
        total = (self._over(image, text, target) + self._over(text, image, target)) / 2 + none
        return {"cluster_attribution": (total, total.new_tensor(float(len(rows))))}

    def _class_of(self, text: str) -> int | None:
        words = f" {text.lower().replace('.', ' ').replace(',', ' ')} "
        return next((k for k, name in enumerate(self.classes) if f" {name.lower()} " in words), None)

    def _over(self, rows: Tensor, others: Tensor, target: Tensor) -> Tensor:
        """The sum over rows (R, E) of their cross-entropy over the centres of the other side."""
        member = F.one_hot(target).to(others.dtype)  # (R, K)
        centres = member.T @ others / member.sum(0)[:, None]  # (K, E)
        scores = rows @ centres.T / self.temperature
        return F.cross_entropy(scores, target, reduction="sum", label_smoothing=self.softness)
