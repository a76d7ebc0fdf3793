"""What objectives that learn from a trained pair of towers share: the teacher, frozen and no part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Pairing


class Teacher(Protocol):
    """A trained pair of towers (``vlmlab.model.pair.PairedTowers``)."""

    def judge(self, pixels: Tensor, texts: Sequence[str]) -> Pairing:
        """Unit vectors of another model's pixels and of texts, without gradient."""
        ...


class FrozenTeacher:
    """Holds a teacher where no stage finds it: it has no learning rate, no file and no gradient.

    Args:
        teacher: the pair.
    """

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher.requires_grad_(False).eval()

    def of(self, pixels: Tensor, texts: Sequence[str]) -> Pairing:
        """What the teacher says, on the pixels' device."""
        return self._teacher.to(pixels.device).judge(pixels, texts)  # type: ignore[no-any-return]


def student_of(outputs: Outputs, batch: Batch, name: str) -> Pairing:
    """The pair's embeddings of a batch with its words.

    Raises:
        UserError: the stage makes no pairs, or not from words.
    """
    if outputs.pairing is None or len(batch.texts) != len(outputs.pairing.image):
        raise UserError(f"objective={name} needs a stage of PairModule, whose batches have a text beside every image.")
    return outputs.pairing


def check_widths(student: Tensor, teacher: Tensor, name: str) -> None:
    """Refuse embeddings that cannot be compared.

    Raises:
        UserError: naming the key that says how wide the student's are.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"objective={name}: the student's embeddings have width {student.shape[-1]} and the teacher's "
            f"{teacher.shape[-1]}; set dual_encoder.width={teacher.shape[-1]}, or choose towers of that width."
        )


def no_gradient_of(pairing: Pairing) -> Tensor:
    """Zero, by which temperature and bias have a gradient where a loss does not read them."""
    return 0.0 * (pairing.bias + pairing.log_scale)


def softened(scores: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature."""
    return torch.log_softmax(scores / temperature, dim=-1)
