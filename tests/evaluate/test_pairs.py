"""Retrieval and zero-shot labels by plain loops, with ties, several captions an image and the reverse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tests.test_conf import composed
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Image, Sample, Turn
from vlmlab.data.readers.coco_captions import CocoCaptions
from vlmlab.data.world.labels import WorldLabels
from vlmlab.evaluate import retrieval
from vlmlab.evaluate.baselines import Limited, Shuffled
from vlmlab.evaluate.pairs import check_pairs, pair_parts
from vlmlab.evaluate.retrieval import Retrieval, hit, placed, rank
from vlmlab.evaluate.run import score_each
from vlmlab.evaluate.zero_shot import ZeroShot, credits


def image(number: int) -> Image:
    return np.full((2, 2, 3), number, np.uint8)


class Table:
    """Towers whose embeddings are looked up: of an image by its pixels, of a text by itself."""

    def __init__(self, images: dict[int, Tensor], texts: dict[str, Tensor]) -> None:
        self.images, self.texts = images, texts

    def embed_images(self, images: Sequence[Image]) -> Tensor:
        return torch.stack([self.images[int(one[0, 0, 0])] for one in images])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.texts[one] for one in texts])


def world(seed: int = 0, coarse: bool = False) -> tuple[list[Sample], Table]:
    """Five images with one to three texts, one of which is said of two images; `coarse`: many equal similarities."""
    said = [["a", "b", "c"], ["d"], ["e", "shared"], ["shared", "f"], ["g", "h"]]
    samples = [
        Sample(f"s{i}", (image(i),), (Turn("", own[0], references=tuple(own)),), image_ids=(f"i{i}",))
        for i, own in enumerate(said)
    ]
    generator = torch.Generator().manual_seed(seed)
    texts = sorted({text for own in said for text in own})

    def draw() -> Tensor:
        if coarse:
            return F.one_hot(torch.randint(3, (), generator=generator), 3).float()
        return F.normalize(torch.randn(4, generator=generator), dim=-1)

    return samples, Table({i: draw() for i in range(5)}, {text: draw() for text in texts})


def by_loop(samples: list[Sample], table: Table, k: int, way: str) -> float:
    """R@k by every order of equal candidates."""
    texts = list(dict.fromkeys(t for s in samples for t in s.turns[0].references))
    own = {(i, t) for i, s in enumerate(samples) for t in s.turns[0].references}
    queries: list[Any] = list(range(len(samples))) if way == "image_to_text" else list(texts)
    hits = []
    for query in queries:
        ranked = []
        for other in texts if way == "image_to_text" else range(len(samples)):
            i, t = (query, other) if way == "image_to_text" else (other, query)
            ranked.append((float(table.images[i].double() @ table.texts[t].double()), (i, t) in own))
        groups = [[right for score, right in ranked if score == value] for value in sorted({s for s, _ in ranked})][
            ::-1
        ]
        orders = [[x for group in order for x in group] for order in itertools.product(*map(_orders, groups))]
        hits.append(fmean(any(order[:k]) for order in orders))
    return fmean(hits)


def _orders(group: list[bool]) -> list[tuple[bool, ...]]:
    return list(set(itertools.permutations(group)))  # equally often each, as positions of the right ones


@pytest.mark.parametrize("coarse", [False, True])
def test_recall_is_the_loop(coarse: bool) -> None:
    for seed in range(3):
        samples, table = world(seed, coarse)
        found = Retrieval(samples, at=(1, 2, 5))(table, samples, "b", 2)  # type: ignore[arg-type]
        for way in ("image_to_text", "text_to_image"):
            for k in (1, 2, 5):
                want = by_loop(samples, table, k, way)
                assert found.scores[f"{way}_r{k}"] == pytest.approx(want, abs=1e-12), (seed, way, k)
        assert found.levels == {"chance": pytest.approx(10 / (5 * 9)), "count": 5.0}


def test_the_rank_is_the_mean_over_orders() -> None:
    for above, wrong, same in itertools.product(range(3), range(4), range(1, 4)):
        orders = set(itertools.permutations([False] * wrong + [True] * same))
        assert rank(above, wrong, same) == pytest.approx(fmean(above + o.index(True) + 1 for o in orders))
        for k in range(1, 9):
            want = fmean(k > above and any(o[: k - above]) for o in orders)
            assert hit(above, wrong, same, k) == pytest.approx(want)


def test_identity_is_whole_and_a_constant_is_chance() -> None:
    samples = [Sample(f"s{i}", (image(i),), (Turn("", f"t{i}"),), image_ids=(f"i{i}",)) for i in range(20)]
    eye = torch.eye(20)
    right = Table(dict(enumerate(eye)), {f"t{i}": eye[i] for i in range(20)})
    found = Retrieval(samples)(right, samples, "b", 7).scores  # type: ignore[arg-type]
    assert {found[f"{way}_r{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} == {1.0}
    assert found["text_to_image_median_rank"] == 1.0
    same = Table({i: eye[0] for i in range(20)}, {f"t{i}": eye[0] for i in range(20)})
    found = Retrieval(samples)(same, samples, "b", 7).scores  # type: ignore[arg-type]
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx(k / 20)
    assert found["image_to_text_median_rank"] == pytest.approx(10.5)
    half = Table({i: eye[i % 2] for i in range(20)}, {f"t{i}": eye[i] for i in range(20)})
    found = Retrieval(samples)(half, samples, "b", 7).scores  # type: ignore[arg-type]
    # beside the first two, one wrong text is nearer than the right one and 18 are as near
    ranks = [rank(1 if i > 1 else 0, 18 if i > 1 else 0, 1) for i in range(20)]
    assert found["image_to_text_median_rank"] == median(ranks)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (30, 40))
    right = torch.rand(30, 40, generator=generator) < 0.1
    right[:, 0] = True
    whole = placed(a, b, right)
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    assert placed(a, b, right) == whole


def test_the_same_image_of_several_samples_is_one_candidate_with_all_its_texts() -> None:
    samples, table = world()
    apart = [
        replace(sample, id=f"{sample.id}.{n}", turns=(Turn("", text),))
        for sample in samples
        for n, text in enumerate(sample.turns[0].references)
    ]
    one, other = (Retrieval(s)(table, s, "b", 3) for s in (samples, apart))  # type: ignore[arg-type]
    assert one.scores == other.scores and one.levels == other.levels


def test_what_is_no_retrieval_is_refused() -> None:
    samples, table = world()
    two = [replace(samples[0], images=samples[0].images * 2)]
    with pytest.raises(DataError, match="s0 has 2 images"):
        Retrieval(two)(table, two, "b", 2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 images and 3 texts"):
        Retrieval(samples)(table, samples[:1], "b", 2)  # type: ignore[arg-type]


# -- zero-shot ---------------------------------------------------------------------------------------------------------

CLASSES = ["cat", "dog", "cow"]
TEMPLATES = ["a {}.", "the {} {}", "{}"]


def labelled(seed: int = 0) -> tuple[list[Sample], Table]:
    generator = torch.Generator().manual_seed(seed)
    samples = [Sample(f"s{i}", (image(i),), (Turn("", CLASSES[i % 3]),), image_ids=(f"i{i}",)) for i in range(9)]
    texts = [template.replace("{}", label) for template in TEMPLATES for label in CLASSES]
    unit = F.normalize(torch.randn(9 + len(texts), 4, generator=generator), dim=-1)
    return samples, Table(dict(enumerate(unit[:9])), dict(zip(texts, unit[9:], strict=True)))


def test_a_class_is_the_mean_of_its_prompts() -> None:
    samples, table = labelled()
    found = ZeroShot(samples, TEMPLATES, CLASSES)(table, samples, "b", 4)  # type: ignore[arg-type]
    right, alone, per_class = [], [], {label: [] for label in CLASSES}  # type: ignore[var-annotated]
    for i, sample in enumerate(samples):
        label = sample.turns[0].answer

        def similar(name: str, templates: list[str], i: int = i) -> float:
            mean = [fmean(float(table.texts[t.replace("{}", name)][d]) for t in templates) for d in range(4)]
            length = math.sqrt(sum(x * x for x in mean))
            return sum(float(table.images[i][d]) * x / length for d, x in enumerate(mean))

        right.append(max(CLASSES, key=lambda c: similar(c, TEMPLATES)) == label)
        per_class[label].append(right[-1])
        alone += [max(CLASSES, key=lambda c: similar(c, [t])) == label for t in TEMPLATES]
    assert found.scores["accuracy"] == pytest.approx(fmean(right))
    assert found.scores["single_prompt"] == pytest.approx(fmean(alone))
    assert found.scores["mean_per_class"] == pytest.approx(fmean(fmean(v) for v in per_class.values() if v))
    assert found.levels == {"chance": pytest.approx(1 / 3), "count": 9.0}
    assert [row.prediction in row.references for row in found.rows] == right


def test_equal_classes_share_the_credit() -> None:
    right = torch.tensor([[True, False, False], [False, True, False], [False, True, True]])
    similar = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.2, 0.1], [2.0, 2.0, 2.0]])
    assert credits(similar, right) == pytest.approx([1 / 2, 0.0, 2 / 3])


def test_what_is_no_class_is_refused() -> None:
    samples, table = labelled()
    with pytest.raises(UserError, match="'a picture' has no place for the class"):
        ZeroShot(samples, ["a picture"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="sample s0 has the class 'cat'"):
        ZeroShot(samples, TEMPLATES, ["dog", "cow"])(table, samples, "b", 4)  # type: ignore[arg-type]
    assert ZeroShot(samples, TEMPLATES)._names() == sorted(CLASSES)  # type: ignore[arg-type]


def test_the_worlds_classes_are_those_that_a_split_shows() -> None:
    source = WorldLabels("test", 60)
    assert len(source.classes) == 8 * 6 - 6 and {source[i].turns[0].answer for i in range(60)} <= {*source.classes}
    held = WorldLabels("compositional", 20)
    assert len(held.classes) == 6 and not {*held.classes} & {*source.classes}
    assert {source[i].turns[0].answer for i in range(20)} <= {*held.classes, *source.classes}
    shapes, colours = WorldLabels("val", 4, "shape"), WorldLabels("val", 4, "color")
    assert (len(shapes.classes), len(colours.classes)) == (6, 8)
    assert " ".join([colours[0].turns[0].answer, shapes[0].turns[0].answer]) == WorldLabels("val", 4)[0].turns[0].answer


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_each_benchmark_has_its_shuffled_score_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, table = world()
    cfg = OmegaConf.create(
        {
            "data": {"pairs": {"some": {"_target_": f"{__name__}.made"}}, "benchmarks": {"asked": 1}},
            "evaluation": {"baselines": ["shuffled", "no_image"], "batch_size": 2},
            "budget": {"eval_limit": 4},
        }
    )
    monkeypatch.setattr("vlmlab.evaluate.pairs.instantiate", lambda _: Retrieval(samples))  # type: ignore[arg-type]
    said: list[str] = []
    scores = score_each(pair_parts(table, cfg, tmp_path, said.append), said.append)
    four = Limited(samples, 4)  # type: ignore[arg-type]
    want = Retrieval(samples)(table, Shuffled(four), "some", 2).scores  # type: ignore[arg-type]
    assert {k: v for k, v in scores.items() if k.endswith("shuffled")} == {
        f"some/{k}/shuffled": v for k, v in want.items()
    }
    assert scores["some/count"] == 4 and any("no_image is left out" in line for line in said)
    assert any("asked ask a language model" in line for line in said)
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"some.jsonl", "some.shuffled.jsonl"}


def test_a_benchmark_of_one_sample_is_found_before_the_first_step() -> None:
    cfg = composed("recipe=contrastive", "budget.eval_limit=1")
    with pytest.raises(DataError, match=r"data\.pairs\.world_retrieval has 1 samples"):
        check_pairs(cfg)
    check_pairs(composed("recipe=contrastive", "budget=test"))


def test_photographs_with_five_captions_each(shared_data: Path) -> None:
    home = shared_data / "coco_captions_mini"
    node = composed("recipe=contrastive", "data=coco_captions", f"data.path={home / 'captions.json'}",
                    f"data.images={home / 'images'}").data.pairs.coco_retrieval  # fmt: skip
    source = CocoCaptions(str(home / "captions.json"), str(home / "images"), split="test", all_references=True)
    assert node.source.split == "test" and len(source) > 5

    class Grey:
        def embed_images(self, images: Sequence[Image]) -> Tensor:
            return torch.ones(len(images), 1)

        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            return torch.ones(len(texts), 1)

    found = Retrieval(source, node.at)(Grey(), source, "coco", 8)
    images, texts = len(source), len({t for i in range(len(source)) for t in source[i].turns[0].references})
    assert found.levels["count"] == images and texts >= 5 * images - 3
    assert found.scores["text_to_image_r5"] == pytest.approx(5 / images)
    assert found.scores["image_to_text_r1"] == pytest.approx(found.levels["chance"])
