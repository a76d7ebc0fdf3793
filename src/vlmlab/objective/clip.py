"""``clip``: softmax contrast between images and texts (InfoNCE; CLIP, arXiv 2103.00020, figure 3)."""

from __future__ import annotations

import math

from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import Drop, NotNegative, Positive
from vlmlab.objective.base import gathered, symmetric


class Clip:
    """Mean of the cross-entropies of images over texts and of texts over images, s(i, j) = t <x_i, y_j>.

    Both sides are gathered from all ranks with gradient. t is the pair's learned factor, in the loss at most `largest`;
    the pair's bias cancels in a softmax and has a gradient of exactly zero.

    Args:
        weight: factor of this objective in the total loss.
        largest: most that similarities are multiplied by.
        smoothing: label smoothing.
    """

    per_micro_batch = True
    pairs = True
    of_embeddings = True

    def __init__(self, weight: NotNegative = 1.0, largest: Positive = 100.0, smoothing: Drop = 0.0) -> None:
        self.weight = weight
        self.largest = largest
        self.smoothing = smoothing

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"clip": (sum in nats, images)}.

        Raises:
            UserError: the model has no pair of embeddings (``PairModule`` and ``ContrastiveModule`` give one).
        """
        pairing = outputs.pairing
        if pairing is None:
            raise UserError(
                "objective=clip needs a stage of PairModule or ContrastiveModule; use objective=lm otherwise."
            )
        images, own = gathered(pairing.image.float())  # (B x ranks, E)
        texts, _ = gathered(pairing.text.float())
        scale = pairing.log_scale
        bounded = scale + (scale.clamp(max=math.log(self.largest)) - scale).detach()  # can come back from the bound
        scores = images @ texts.T  # (P, P) over all ranks
        total = symmetric(scores, scores.T, (-bounded).exp(), own, self.smoothing) + 0.0 * pairing.bias
        return {"clip": (total, total.new_tensor(len(pairing.image)))}
