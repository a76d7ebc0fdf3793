"""``siglip``: pairwise sigmoid loss between images and texts (arXiv 2303.15343, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative


class Siglip:
    """- sum over all image-text pairs of log sigmoid(z (t <x, y> + b)), z = 1 for the true pair and -1 otherwise.

    Divided by the number of images, as in the paper. Texts are gathered from all ranks with gradient.

    Args:
        weight: factor of this objective in the total loss.
    """

    per_micro_batch = True
    pairs = True
    of_embeddings = True

    def __init__(self, weight: NotNegative = 1.0) -> None:
        self.weight = weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"siglip": (sum in nats, images)}.

        Raises:
            UserError: the model has no pair of embeddings (``PairModule`` and ``ContrastiveModule`` give one).
        """
        pairing = outputs.pairing
        if pairing is None:
            raise UserError(
                "objective=siglip needs a stage of PairModule or ContrastiveModule; use objective=lm otherwise."
            )
        texts, first = _gathered(pairing.text)  # (B x ranks, E)
        scores = pairing.log_scale.exp() * pairing.image @ texts.T + pairing.bias  # (B, B x ranks)
        own = torch.arange(scores.shape[0], device=scores.device)
        signs = -torch.ones_like(scores)
        signs[own, first + own] = 1
        total = -F.logsigmoid(signs * scores).sum()
        return {"siglip": (total, total.new_tensor(scores.shape[0]))}


def _gathered(text: Tensor) -> tuple[Tensor, int]:
    """The texts of all ranks, and the row at which this rank's own begin."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return text, 0
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(text))), dist.get_rank() * text.shape[0]
