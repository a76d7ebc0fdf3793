"""``patch_text_contrast``: visual tokens and words of a pair are alike on average (CG-VLM, arXiv 2311.17945)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative, Positive
from vlmlab.objective.base import gathered, symmetric


class PatchTextContrast:
    """Symmetric cross-entropy over S / temperature, S(a, b) = mean over visual tokens of a and words of b of cosines.

    Visual tokens are taken after the connector, words are the LM's input embeddings; both as they are in the LM's
    sequence. The mean of cosines is the product of the means of unit vectors, which are not normalised again. A pair is
    a sample's images and its answers, without the end token of each answer. Samples without either are left out.

    Args:
        weight: factor of this objective in the total loss.
        temperature: what the similarities are divided by.
    """

    per_micro_batch = True
    reads_sequence = True
    reaches_lm = False

    def __init__(self, weight: NotNegative = 1.0, temperature: Positive = 0.07) -> None:
        self.weight = weight
        self.temperature = temperature

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"patch_text_contrast": (sum in nats, pairs)}.

        Raises:
            UserError: images have no place in the LM's sequence.
        """
        if outputs.embeds is None or (outputs.seen.tokens is not None and not bool(batch.layout.visual.any())):
            raise UserError(
                "objective=patch_text_contrast compares visual tokens with words in the LM's sequence and this "
                "composition puts none there; use fusion=concat, or leave the objective out."
            )
        image, text = pairs(outputs.embeds, batch)  # (P, D) both
        images, own = gathered(image)
        texts, _ = gathered(text)
        scores = images @ texts.T  # (P, P) over all ranks
        total = symmetric(scores, scores.T, self.temperature, own)
        return {"patch_text_contrast": (total, total.new_tensor(len(image)))}


def pairs(embeds: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean unit vector of every sample's visual tokens and of its answers' words, (P, D) both."""
    layout, answer = batch.layout, batch.labels != -100
    words = answer & F.pad(answer[:, 1:], (0, 1))  # the last token of an answer is its end token
    segments = int(layout.segment.max()) + 1
    rows = torch.arange(len(answer), device=answer.device)[:, None]
    sample = rows * segments + layout.segment  # (B, S) number of the packed sample, over all rows
    unit = F.normalize(embeds.float(), dim=-1)  # (B, S, D)
    found = []
    for mask in (layout.visual, words):
        sums = unit.new_zeros(len(answer) * segments, unit.shape[-1]).index_add(0, sample[mask], unit[mask])
        found.append((sums, sample[mask].bincount(minlength=len(sums))))
    keep = (found[0][1] > 0) & (found[1][1] > 0)
    image, text = (sums[keep] / count[keep, None] for sums, count in found)
    return image, text
