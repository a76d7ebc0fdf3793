"""``siglip``: pairwise sigmoid loss between images and texts (arXiv 2303.15343, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Pairing
from vlmlab.contracts.values import NotNegative


class Siglip:
    """- sum over all image-text pairs of log sigmoid(z (t <x, y> + b)), z = 1 for the true pair and -1 otherwise.

    Divided by the number of images, as in the paper. Over several ranks texts go round in a ring (section 3.3): each
    rank compares its images with one rank's texts at a time, and gradients come back the other way round, so that no
    rank holds more than its own share of the scores.

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
        texts = pairing.text
        total = _losses(pairing, texts, true_pairs=True)
        for _ in range(_ranks() - 1):
            texts = _FromBefore.apply(texts)
            total = total + _losses(pairing, texts, true_pairs=False)
        return {"siglip": (total, total.new_tensor(len(pairing.image)))}


def _losses(pairing: Pairing, texts: Tensor, true_pairs: bool) -> Tensor:
    """The sum over own images (B, E) and one rank's texts (B', E); true pairs, if any, are the diagonal."""
    scores = pairing.log_scale.exp() * pairing.image @ texts.T + pairing.bias  # (B, B')
    signs = -torch.ones_like(scores)
    if true_pairs:
        signs.fill_diagonal_(1)
    return -F.logsigmoid(signs * scores).sum()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _FromBefore(torch.autograd.Function):
    """Rows (B, E) of the rank before this one, while its own go to the next; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _turned(rows, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _turned(grad, -1)


def _turned(rows: Tensor, by: int) -> Tensor:
    """What the rank `by` places before has; all ranks have as many rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, found = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
    sent = dist.P2POp(dist.isend, rows, (rank + by) % ranks)
    for work in dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, found, (rank - by) % ranks)]):
        work.wait()
    return found
