"""Accuracy of boxes: how many answers overlap the right box by at least half (RefCOCO's measure)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Annotated

from annotated_types import Interval

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.values import Count
from vlmlab.data.boxes import Boxes, box_text, overlap
from vlmlab.evaluate.metrics.floors import above
from vlmlab.evaluate.metrics.rows import Row

ACCURACY = "iou_accuracy"


class BoxAccuracy:
    """Intersection over union of the answered and the right box, both read from text.

    ``compute`` gives ``iou_accuracy`` (share of answers whose box overlaps a reference's by ``threshold`` or more),
    ``iou`` (the mean overlap), ``readable`` (share of answers in which a box can be read; the others overlap nothing),
    ``iou_accuracy/count``, and where known ``chance``, ``floor/<its name>`` and ``normalised`` as ``VqaAccuracy`` has
    them.

    Args:
        boxes: the convention in which boxes are written, that of the data.
        bins: its steps of a side; null: as its paper has.
        threshold: least overlap of a right box, 0..1.

    Raises:
        UserError: an unknown convention or a threshold outside 0..1.
    """

    of_answers = ACCURACY

    def __init__(
        self,
        boxes: Boxes = "qwen_vl",
        bins: Count | None = None,
        threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"BoxAccuracy: threshold is {threshold} and overlap goes from 0 to 1; the norm is 0.5.")
        self.boxes, self.threshold = boxes, threshold
        self._text = box_text(boxes, bins)
        self._overlaps: list[float] = []
        self._readable: list[bool] = []
        self._chance: list[float | None] = []

    def score(self, prediction: Row) -> float:
        """1.0 for a right box, else 0.0."""
        return float(self._overlap(prediction) >= self.threshold)

    def update(self, prediction: Row) -> None:
        """Add one answer."""
        self._overlaps.append(self._overlap(prediction))
        self._readable.append(self._text.read(prediction.prediction) is not None)
        self._chance.append(prediction.chance)

    def predicted(self) -> dict[str, float]:
        """The three shares; UserError if there was no question."""
        if not self._overlaps:
            raise UserError("BoxAccuracy has no question to score; raise budget.eval_limit or check the benchmark.")
        right = fmean(overlap >= self.threshold for overlap in self._overlaps)
        return {ACCURACY: right, "iou": fmean(self._overlaps), "readable": fmean(self._readable)}

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the number of questions, chance, and the share above the highest floor."""
        result = self.predicted() | {f"{ACCURACY}/count": float(len(self._overlaps))}
        chances = [chance for chance in self._chance if chance is not None]
        known = {name: scores[ACCURACY] for name, scores in (floors or {}).items() if ACCURACY in scores}
        if len(chances) == len(self._overlaps):
            result["chance"] = fmean(chances)
            known = {"chance": result["chance"], **known}
        return result | above(result[ACCURACY], known)

    def _overlap(self, row: Row) -> float:
        """With the nearest of the references; 0 without a box."""
        right = [self._text.read(text) for text in row.references]
        boxes = [box for box in right if box is not None]
        if not boxes:
            raise UserError(
                f"Question {row.id} of {row.benchmark} has no reference with a box as boxes={self.boxes} writes it; "
                "give data and metric the same convention."
            )
        said = self._text.read(row.prediction)
        return 0.0 if said is None else max(overlap(said, box) for box in boxes)
