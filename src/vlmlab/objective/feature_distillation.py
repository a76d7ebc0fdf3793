"""``dc_clip``: a small pair of towers learns the embeddings of a large one (DC-CLIP, stage 1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative
from vlmlab.objective.teacher import FrozenTeacher, Teacher, check_widths, no_gradient_of, student_of


class FeatureDistillation:
    """The distance of the student's unit embeddings from the teacher's, of images and of texts.

    The paper matches features and does not say more that is public; squared distance or 1 - cosine is a choice here,
    and on unit vectors the first is twice the second. Temperature and bias are not read: they belong to the second
    stage, which contrasts.

    Args:
        teacher: a trained pair of towers, frozen.
        distance: "squared" or "cosine".
        image, text: factors of the two sides.
        weight: factor of this objective in the total loss.
    """

    per_micro_batch = True
    pairs = True

    def __init__(
        self,
        teacher: Teacher,
        distance: Literal["squared", "cosine"] = "squared",
        image: NotNegative = 1.0,
        text: NotNegative = 1.0,
        weight: NotNegative = 1.0,
    ) -> None:
        self.teacher = FrozenTeacher(teacher)
        self.distance, self.image, self.text, self.weight = distance, image, text, weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"image_distance": (sum, images), "text_distance": (sum, texts)}.

        Raises:
            UserError: no pairs, or embeddings of another width than the teacher's.
        """
        mine = student_of(outputs, batch, "dc_clip")
        theirs = self.teacher.of(batch.pixels, batch.texts)
        check_widths(mine.image, theirs.image, "dc_clip")
        count = torch.tensor(float(len(mine.image)), device=mine.image.device)
        image = self.image * self._distance(mine.image, theirs.image) + no_gradient_of(mine)
        text = self.text * self._distance(mine.text, theirs.text)
        return {"image_distance": (image, count), "text_distance": (text, count)}

    def _distance(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """The sum over rows (B, E)."""
        if self.distance == "cosine":
            return (1 - (mine * theirs).sum(-1)).sum()
        return (mine - theirs).square().sum()
