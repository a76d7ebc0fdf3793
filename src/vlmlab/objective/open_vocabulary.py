"""``ood_vlm_distill``: an image tower learns classes and a teacher's space, to know classes it has not seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import Count, Names, NotNegative, Positive, Text
from vlmlab.objective.base import gathered, symmetric
from vlmlab.objective.teacher import FrozenTeacher, Teacher, check_widths, no_gradient_of, softened, student_of


class OpenVocabularyDistillation:
    """Cross-entropy over classes, contrast with the teacher's images, and its opinion of its likeliest classes.

    classes: s(i, c) = t <student's image i, teacher's text of class c>, cross-entropy with the row's class.
    images: cross-entropy of each student's image over the batch's images as the teacher sees them, and the reverse.
    top: KL(teacher || student) over the k classes that the teacher finds likeliest for an image, both renormalised.

    The three terms are those of arXiv 2307.03135; factors, temperatures and k are keys.

    Args:
        teacher: a trained pair of towers, frozen; its texts are the classes.
        classes: their names, as the data's answers have them.
        prompts: by a class's name what the teacher reads for it (a description); null: the name itself.
        classify, images, top: factors of the terms; 0 leaves one out.
        k: how many classes `top` compares.
        temperature: of the contrast of images.
        softness: scores of `top` are divided by it.
        weight: factor of this objective in the total loss.

    Raises:
        UserError: a prompt of no class.
    """

    per_micro_batch = True
    pairs = True
    reaches_lm = False

    def __init__(
        self,
        teacher: Teacher,
        classes: Names,
        prompts: Mapping[str, Text] | None = None,
        classify: NotNegative = 1.0,
        images: NotNegative = 1.0,
        top: NotNegative = 1.0,
        k: Count = 5,
        temperature: Positive = 0.07,
        softness: Positive = 1.0,
        weight: NotNegative = 1.0,
    ) -> None:
        self.teacher = FrozenTeacher(teacher)
        self.classes = list(classes)
        told = dict(prompts or {})
        if wrong := [name for name in told if name not in self.classes]:
            raise UserError(f"objective.prompts.{wrong[0]} is none of objective.classes; remove it, or add the class.")
        self.prompts = [told.get(name, name) for name in self.classes]
        self.factors = {"classes": classify, "images": images, "top_classes": top}
        self.k, self.temperature, self.softness, self.weight = k, temperature, softness, weight

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"classes": (sum in nats, images), "images": ..., "top_classes": ...}.

        Raises:
            UserError: no pairs, a row of no class, or embeddings of another width than the teacher's.
        """
        mine = student_of(outputs, batch, "ood_vlm_distill")
        theirs = self.teacher.of(batch.pixels, self.prompts)
        check_widths(mine.image, theirs.image, "ood_vlm_distill")
        right = self._classes_of(batch).to(mine.image.device)
        student = mine.log_scale.exp() * mine.image @ theirs.text.T  # (B, C)
        teacher = theirs.log_scale.exp() * theirs.image @ theirs.text.T
        count = student.new_tensor(float(len(student)))
        terms = {
            "classes": F.cross_entropy(student, right, reduction="sum") + no_gradient_of(mine),
            "images": self._images(mine.image, theirs.image),
            "top_classes": self._top(student, teacher),
        }
        return {name: (self.factors[name] * value, count) for name, value in terms.items() if self.factors[name]}

    def _classes_of(self, batch: Batch) -> Tensor:
        """(B,) the class of every row."""
        for text, ids in zip(batch.texts, batch.sample_ids, strict=True):
            if text not in self.classes:
                raise UserError(f"objective.classes lacks {text!r}, the class of sample {ids[0]}; add it.")
        return torch.tensor([self.classes.index(text) for text in batch.texts])

    def _images(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """The contrast of the student's images with the teacher's, over all ranks."""
        students, own = gathered(mine)
        teachers, _ = gathered(theirs)
        scores = students @ teachers.T  # (P, P)
        return symmetric(scores, scores.T, self.temperature, own)

    def _top(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The sum over images of KL over the teacher's k likeliest classes."""
        chosen = teacher.topk(min(self.k, teacher.shape[1]), dim=1).indices  # (B, k)
        said, told = (softened(scores.gather(1, chosen), self.softness) for scores in (student, teacher))
        return F.kl_div(said, told, reduction="sum", log_target=True)
