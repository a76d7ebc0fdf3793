"""``overuse``: no word of a lexical pair is active for everything (LexVLA, arXiv 2407.17827)."""

from __future__ import annotations

from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative
from vlmlab.objective.base import gathered


class Overuse:
    """Sum over words of the squared mean of their weights over the batch, of images and of texts.

    Weights are those that are compared, of unit length. That words with a high mean are penalised is the paper's; this
    form of it is our reading.

    Args:
        weight: factor of this objective in the total loss.
    """

    per_micro_batch = True
    pairs = True
    of_embeddings = True

    def __init__(self, weight: NotNegative = 1.0) -> None:
        self.weight = weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"overuse": (this rank's share of images x the penalty, images)}.

        Raises:
            UserError: the stage makes no pairs.
        """
        pairing = outputs.pairing
        if pairing is None:
            raise UserError("objective=overuse needs a stage of PairModule; use objective=lm otherwise.")
        rows = len(pairing.image)
        total = 0.0 * (pairing.bias + pairing.log_scale)
        for side in (pairing.image, pairing.text):
            everywhere, _ = gathered(side.float())  # (P, V) over all ranks; others' rows are constants
            penalty = everywhere.mean(0).square().sum()
            # the value is this rank's share, the gradient that of the whole penalty in its own rows
            total = total + rows * penalty.detach() + len(everywhere) * (penalty - penalty.detach())
        return {"overuse": (total, total.new_tensor(float(rows)))}
