"""How well captions fit their images, as a model finds: the score against single losses, and what is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from tests import tiny
from tests.evaluate.toy import toy_config

from vlmlab.contracts.errors import UserError
from vlmlab.data.filtered import Scored
from vlmlab.evaluate.baselines import Shuffled
from vlmlab.evaluate.curation import curate, losses_of, matching_scores, report
from vlmlab.evaluate.run import mean_loss
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM

CAPTIONS = {"_target_": "vlmlab.data.world.sources.WorldCaptions", "style": "short", "split": "train", "size": 9}
CONFIG = OmegaConf.merge(toy_config(CAPTIONS, CAPTIONS), {"data": {"train": {"short": CAPTIONS}}})


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny.vlm().eval()


def test_a_loss_of_each_is_that_of_each_alone(model: VLM) -> None:
    collate = build_collator(CONFIG, model, "chat")
    samples = [sample for sample in tiny.SAMPLES if sample.images]
    alone = [mean_loss(collate, model, [sample], 1) for sample in samples]
    assert losses_of(collate, model, samples) == pytest.approx(alone, rel=1e-5)


def test_a_score_is_the_best_of_other_images_against_its_own(model: VLM) -> None:
    collate = build_collator(CONFIG, model, "chat")
    own = [sample for sample in tiny.SAMPLES if len(sample.images) == 1]
    others = [[replace(a, images=b.images) for a, b in zip(own, [*own[k:], *own[:k]], strict=True)] for k in (1, 2)]
    wanted = [
        min(mean_loss(collate, model, [samples[i]], 1) for samples in others) - mean_loss(collate, model, [own[i]], 1)
        for i in range(len(own))
    ]
    assert matching_scores(collate, model, own, others) == pytest.approx(wanted, abs=1e-5)
    assert matching_scores(collate, model, own, [own]) == pytest.approx([0.0] * len(own), abs=1e-6)


def test_every_sample_is_scored_and_captioned(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = curate(model, CONFIG, "short", n=7, against=2, write=True)
    assert [row.index for row in rows] == list(range(7))
    assert rows[2].id == "world-v1/train/2/short" and all(isinstance(row.written, str) for row in rows)
    from vlmlab.data.world.sources import WorldCaptions

    source = WorldCaptions("short", "train", 7)
    collate = replace(build_collator(CONFIG, model, "chat"), pack_length=None)
    again = matching_scores(collate, model, list(source), [[Shuffled(source, k)[i] for i in range(7)] for k in (0, 1)])  # type: ignore[call-overload]
    assert [row.score for row in rows] == pytest.approx(again, abs=1e-5)
    plain = curate(model, CONFIG, "short", n=3, against=1, write=False)
    assert [row.written for row in plain] == [""] * 3 and len(plain) == 3


def test_what_is_no_source_of_captions_is_refused(model: VLM) -> None:
    with pytest.raises(UserError, match="source=long is not in"):
        curate(model, CONFIG, "long", 2, 1, False)
    talk = {"_target_": "vlmlab.data.world.sources.WorldQuestions", "split": "train", "size": 9, "multi_turn": True}
    cfg = OmegaConf.merge(CONFIG, {"data": {"train": {"talk": talk}}})
    with pytest.raises(UserError, match=r"turns a sample.*write=false"):
        curate(model, cfg, "talk", 2, 1, True)  # type: ignore[arg-type]
    assert len(curate(model, cfg, "talk", 2, 1, False)) == 2  # type: ignore[arg-type]


class Known:
    def matched(self, index: int) -> bool:
        return index < 4


def test_precision_and_recall_where_the_noise_is_known() -> None:
    """Of 8 texts 4 match; 5 are kept, 3 of them match."""
    scores = [1.0, 0.5, 0.1, -0.1, 0.3, 0.0, -1.0, -2.0]
    lines = report([Scored(i, str(i), score) for i, score in enumerate(scores)], Known())
    assert lines[0].startswith("5 of 8 given texts") and len(lines) == 2
    assert "0.500 of the texts match" in lines[1] and "0.600 do" in lines[1] and "0.750 of those" in lines[1]
    written = [Scored(0, "0", 1.0, "a dog", -1.0), Scored(1, "1", 1.0, "a cat", 2.0)]
    assert report(written, object())[1].startswith("1 of 2 written texts")
    assert torch.is_grad_enabled()
