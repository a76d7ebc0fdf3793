"""``ZeroShot``: which class an image is of, by prompts with classes' names (CLIP, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import SampleSource, references
from vlmlab.contracts.values import Names
from vlmlab.evaluate.baselines import image_names
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.pairs import Found, Towers, embedded_images, embedded_texts

PLACE = "{}"
"""Where a class's name is in a template."""


class ZeroShot:
    """Accuracy of the class whose prompts are the most similar to the image.

    A class is the mean of the unit embeddings of its name in all templates, brought to unit length again (section
    3.1.4). Where several classes are equally similar, the answer is any of them equally often.

    Args:
        source: samples of one image, whose last answer (or any of its references) is the name of its class.
        templates: sentences with ``{}`` in the place of the name.
        classes: names of all classes; null: those that the source says it has (``classes``), or all its answers.

    Raises:
        UserError: a template without ``{}``.
    """

    def __init__(self, source: SampleSource, templates: Names, classes: Names | None = None) -> None:
        if bad := [text for text in templates if PLACE not in text]:
            raise UserError(f"ZeroShot: the template {bad[0]!r} has no place for the class; write {PLACE} there.")
        self.source = source
        self.templates = list(templates)
        self.classes = None if classes is None else list(classes)

    def __call__(self, towers: Towers, source: SampleSource, name: str, batch_size: int) -> Found:
        """Scores of all samples of `source`, which is the own one or the same with other images.

        Raises:
            DataError: a sample has other than one image, or is of none of the classes.
        """
        classes = self._names()
        right, ids = _right(source, classes, name)  # (I, C)
        images = embedded_images(towers, source, list(range(len(source))), batch_size).double()
        texts = [template.replace(PLACE, label) for template in self.templates for label in classes]
        prompts = embedded_texts(towers, texts, batch_size).double().unflatten(0, (len(self.templates), len(classes)))
        alone = [fmean(credits(images @ each.T, right)) for each in prompts]
        similar = images @ F.normalize(prompts.mean(0), dim=-1).T  # (I, C)
        credit = credits(similar, right)
        by_class = defaultdict(list)
        for row, each in zip(right.tolist(), credit, strict=True):
            by_class[row.index(True)].append(each)
        scores = {
            "accuracy": fmean(credit),
            "mean_per_class": fmean(fmean(each) for each in by_class.values()),
            "single_prompt": fmean(alone),
        }
        found = similar.argmax(1).tolist()
        rows = [
            Row(name, ids[i], 0, "zero_shot", "", classes[found[i]], tuple(_of(classes, right[i])),
                1 / len(classes), image_names(source[i])) for i in range(len(ids))
        ]  # fmt: skip
        return Found(scores, rows, {"chance": float(right.double().mean()), "count": float(len(ids))})

    def _names(self) -> list[str]:
        if self.classes is not None:
            return self.classes
        own = getattr(self.source, "classes", None)
        if own is not None:
            return list(own)
        answers = {references(self.source[i].turns[-1])[0] for i in range(len(self.source))}
        return sorted(answers)


def credits(similar: Tensor, right: Tensor) -> list[float]:
    """Of every image the share of right classes among the most similar ones; (I, C) and (I, C) bool."""
    best = similar == similar.amax(1, keepdim=True)
    right = right.to(similar.device)
    return ((best & right).sum(1).double() / best.sum(1)).tolist()


def _right(source: SampleSource, classes: list[str], name: str) -> tuple[Tensor, list[str]]:
    """(I, C) bool: the classes that are right for each sample; and the samples' ids."""
    right, ids = torch.zeros(len(source), len(classes), dtype=torch.bool), []
    for index in range(len(source)):
        sample = source[index]
        own = [classes.index(text) for text in references(sample.turns[-1]) if text in classes]
        if len(sample.images) != 1 or not own:
            what = f"{len(sample.images)} images" if own else f"the class {references(sample.turns[-1])[0]!r}"
            raise DataError(f"{name}: sample {sample.id} has {what}; give one image of one of the classes in each.")
        right[index, own] = True
        ids.append(sample.id)
    return right, ids


def _of(classes: list[str], right: Tensor) -> list[str]:
    return [classes[c] for c in right.nonzero()[:, 0].tolist()]
