"""``Retrieval``: how often an image finds one of its texts among all, and a text its image (R@k, median rank)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

import torch
from torch import Tensor

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import SampleSource, references
from vlmlab.contracts.values import Count, Names
from vlmlab.evaluate.baselines import image_names
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.pairs import Found, Towers, embedded_images, embedded_texts

CHUNK = 1024
"""Queries that are compared with all candidates at once."""


class Retrieval:
    """R@k and the median rank of the first right candidate, from images to texts and from texts to images.

    Images are told apart by their names and texts by their words. An image may have several texts and a text several
    images (the same words said of both); a query is right at k if any of its own is among the first k. Candidates of
    equal similarity are in every order equally often, and the score is the mean over these orders: a model that says
    the same of everything scores as chance does.

    Args:
        source: samples of one image; the texts are the references of all turns.
        at: the values of k.
    """

    def __init__(self, source: SampleSource, at: Names | Sequence[Count] = (1, 5, 10)) -> None:
        self.source = source
        self.at = tuple(int(k) for k in at)

    def __call__(self, towers: Towers, source: SampleSource, name: str, batch_size: int) -> Found:
        """Scores of all samples of `source`, which is the own one or the same with other images.

        Raises:
            DataError: a sample has other than one image, or there are fewer than two images or texts.
        """
        images, texts, pairs, embedded = _read(towers, source, name, batch_size)
        right = torch.zeros(len(images), len(texts), dtype=torch.bool)
        right[[i for i, _ in pairs], [j for _, j in pairs]] = True
        of_texts = embedded_texts(towers, texts, batch_size)
        scores: dict[str, float] = {}
        rows: list[Row] = []
        ways = {
            "image_to_text": (embedded, of_texts, right, images, texts),
            "text_to_image": (of_texts, embedded, right.T, texts, images),
        }
        for way, (queries, candidates, own, asked, offered) in ways.items():
            places, first = placed(queries, candidates, own)
            scores |= {f"{way}_r{k}": fmean(hit(*place, k) for place in places) for k in self.at}
            scores[f"{way}_median_rank"] = median(rank(*place) for place in places)
            rows += _rows(name, way, asked, offered, own, first)
        chance = float(right.double().mean())
        return Found(scores, rows, {"chance": chance, "count": float(len(images))})


def placed(queries: Tensor, candidates: Tensor, right: Tensor) -> tuple[list[tuple[int, int, int]], list[int]]:
    """The rank of the best right candidate of every query, and the most similar candidate.

    Args:
        queries: (Q, E).
        candidates: (C, E).
        right: (Q, C) bool, at least one in every row.

    Returns:
        Of every query the wrong candidates that are more similar than its best right one, the wrong ones that are
        exactly as similar, and the right ones that are; and of every query the index of the most similar candidate.
    """
    places: list[tuple[int, int, int]] = []
    first: list[int] = []
    for start in range(0, len(queries), CHUNK):
        own = right[start : start + CHUNK].to(queries.device)
        similar = queries[start : start + CHUNK].double() @ candidates.double().T  # (q, C)
        best = similar.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        above = (~own & (similar > best)).sum(1)
        wrong, same = (~own & (similar == best)).sum(1), (own & (similar == best)).sum(1)
        places += list(zip(above.tolist(), wrong.tolist(), same.tolist(), strict=True))
        first += similar.argmax(1).tolist()
    return places, first


def hit(above: int, wrong: int, same: int, k: int) -> float:
    """Share of orders of `wrong` + `same` equal candidates after `above` others with a right one in the k first."""
    left = min(max(k - above, 0), wrong + same)
    miss = 1.0
    for drawn in range(left):
        miss *= max(wrong - drawn, 0) / (wrong + same - drawn)
    return 1.0 - miss


def rank(above: int, wrong: int, same: int) -> float:
    """Mean place, from 1, of the first right candidate over these orders."""
    return above + (wrong + same + 1) / (same + 1)


def _read(
    towers: Towers, source: SampleSource, name: str, batch_size: int
) -> tuple[list[str], list[str], list[tuple[int, int]], Tensor]:
    """Names of the images, the texts, which belong together, and the images' embeddings (I, E)."""
    images: dict[str, int] = {}
    texts: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    shown: list[int] = []  # the sample that shows each image first
    for index in range(len(source)):
        sample = source[index]
        if len(sample.images) != 1:
            raise DataError(f"{name}: sample {sample.id} has {len(sample.images)} images; retrieval wants one of each.")
        own = image_names(sample)[0]
        if own not in images:
            images[own] = len(images)
            shown.append(index)
        for text in (text for turn in sample.turns for text in references(turn)):
            pairs.append((images[own], texts.setdefault(text, len(texts))))
    if len(images) < 2 or len(texts) < 2:
        raise DataError(f"{name} has {len(images)} images and {len(texts)} texts; retrieval needs two of each.")
    return list(images), list(texts), pairs, embedded_images(towers, source, shown, batch_size)


def _rows(
    name: str, way: str, asked: Sequence[str], offered: Sequence[str], right: Tensor, first: Sequence[int]
) -> list[Row]:
    """What was found for every query, to be read by people."""
    return [
        Row(name, f"{way}/{q}", 0, way, query, offered[found], tuple(offered[j] for j in own.nonzero()[:, 0].tolist()))
        for q, (query, found, own) in enumerate(zip(asked, first, right, strict=True))
    ]
