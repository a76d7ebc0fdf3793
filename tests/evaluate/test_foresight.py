"""What would end an evaluation is found before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from omegaconf import DictConfig
from tests import tiny
from tests.evaluate.toy import VQA, toy_config

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.evaluate.foresight import check_evaluation
from vlmlab.model.vlm import VLM

OPTIONS = "vlmlab.evaluate.metrics.options.OptionAccuracy"
CAPTIONS = "vlmlab.evaluate.metrics.captions.CaptionScores"


class Records:
    """`count` questions about `images` pictures; `long` of them, the last, have so many words, and `forged` an end."""

    turns_in_memory = True

    def __init__(self, count: int = 4, images: int = 4, long: int = 0, words: int = 300, forged: int = 0) -> None:
        self.count, self.images, self.long, self.words, self.forged = count, images, long, words, forged
        self.decoded = 0

    def __len__(self) -> int:
        return self.count

    def turns(self, index: int) -> Sequence[Turn]:
        words = self.words + index if index >= self.count - self.long else 1
        end = "<|im_end|>" if index >= self.count - self.forged else ""
        return (Turn("is it red ? " * words + end, "red"),)

    def label(self, index: int) -> str:
        return f"q{index}"

    def __getitem__(self, index: int) -> Sample:
        self.decoded += 1
        assert self.decoded < 20, "looking through decodes a few images only"
        shown = f"i{index % self.images}"
        return Sample(self.label(index), (tiny.picture(index),), tuple(self.turns(index)), image_ids=(shown,))


class Loaded(Records):
    """The same without the words apart."""

    turns_in_memory = False
    turns = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> Sample:
        shown = f"i{index % self.images}"
        turns = tuple(Records.turns(self, index))
        return Sample(self.label(index), (tiny.picture(index),), turns, image_ids=(shown,))


def config(benchmark: dict[str, Any], held_out: dict[str, Any], metric: str = VQA, kind: str = "Records") -> DictConfig:
    source = {"_target_": f"{__name__}.{kind}"}
    cfg = toy_config(source | benchmark, source | held_out, metric)
    cfg.data.val_fraction = 0.05
    return cfg


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny.vlm().eval()


@pytest.mark.parametrize("kind", ["Records", "Loaded"])
def test_what_can_be_scored_is_let_through(model: VLM, kind: str) -> None:
    check_evaluation(config({"count": 1000 if kind == "Records" else 9}, {}, kind=kind), model)
    check_evaluation(config({}, {}, CAPTIONS, kind), model)


@pytest.mark.parametrize("kind", ["Records", "Loaded"])
@pytest.mark.parametrize(
    ("benchmark", "held_out", "metric", "words"),
    [
        ({"long": 1}, {}, VQA, r"benchmarks\.toy: one row is longer than collate\.max_length=512: sample q3 has \d+"),
        ({"long": 2}, {}, VQA, r"benchmarks\.toy: 2 rows are longer .* sample q3 has (\d+) tokens; .*max_length=\1,"),
        ({}, {"long": 2}, VQA, r"data\.val\.captions: 2 rows are longer than collate\.max_length=512"),
        (
            {"forged": 1},
            {},
            VQA,
            r"benchmarks\.toy: Sample q3 contains the control token <\|im_end\|>.*control_tokens=text",
        ),
        ({"forged": 3}, {}, VQA, r"benchmarks\.toy: 3 rows, as Sample q1 contains the control token"),
        ({}, {"forged": 1}, VQA, r"data\.val\.captions: Sample q3 contains the control token"),
        ({"images": 1}, {}, VQA, r"benchmarks\.toy shows one image only.*evaluation\.baselines=\[no_image\]"),
        ({}, {"images": 1}, VQA, r"data\.val\.captions shows one image only.*raise data\.val_fraction, or"),
        ({}, {"count": 1}, VQA, r"data\.val\.captions shows one image only"),
        ({"count": 1}, {}, CAPTIONS, r"benchmarks\.toy has 1 samples and CaptionScores needs 2"),
        ({"count": 0}, {}, VQA, r"benchmarks\.toy has 0 samples"),
        ({}, {"count": 0}, VQA, r"data\.val\.captions has no samples"),
    ],
)
def test_what_could_not_be_scored_is_refused_by_its_key(
    model: VLM, kind: str, benchmark: dict[str, Any], held_out: dict[str, Any], metric: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        check_evaluation(config(benchmark, held_out, metric, kind), model)
    assert len(str(caught.value)) <= 300


def test_the_remedies_do(model: VLM) -> None:
    cfg = config({"images": 1, "long": 1, "forged": 1}, {"count": 1})
    cfg.collate.control_tokens = "text"
    cfg.evaluation.baselines, cfg.collate.max_length = ["no_image"], 4096
    check_evaluation(cfg, model)


def test_only_what_will_be_asked_is_looked_at(model: VLM) -> None:
    cfg = config({"count": 4, "images": 2, "long": 2}, {"long": 1})
    cfg.budget.eval_limit = 2
    check_evaluation(cfg, model)
    cfg.budget.eval_limit, cfg.evaluation.held_out = None, []
    with pytest.raises(DataError, match="toy"):
        check_evaluation(cfg, model)


def test_where_rows_may_be_replaced_long_ones_of_a_held_out_set_are(model: VLM) -> None:
    cfg = config({}, {"long": 1})
    cfg.data.max_bad_fraction = 0.1
    check_evaluation(cfg, model)


def test_a_metric_that_cannot_be_built_is_found(model: VLM) -> None:
    cfg = config({}, {}, CAPTIONS)
    cfg.data.benchmarks.toy.metrics[0].references_by = "birds"
    with pytest.raises(Exception, match="references_by=birds") as caught:
        check_evaluation(cfg, model)
    assert isinstance(caught.value, UserError) or isinstance(caught.value.__cause__, UserError)


class Lettered(Records):
    """Questions with letters to choose from."""

    def turns(self, index: int) -> Sequence[Turn]:
        return tuple(replace(turn, answer="B", options=("A", "B")) for turn in Records.turns(self, index))


def test_options_are_asked_for_before_training(model: VLM) -> None:
    cfg = config({}, {}, OPTIONS)
    cfg.data.benchmarks.toy.scoring = "likelihood"
    with pytest.raises(UserError, match=r"toy\.scoring=likelihood chooses from options, and sample q0 has none"):
        check_evaluation(cfg, model)
    cfg.data.benchmarks.toy.source = {"_target_": f"{__name__}.Lettered"}
    check_evaluation(cfg, model)


@pytest.mark.parametrize("metric", [VQA, "vlmlab.evaluate.metrics.token_f1.TokenF1"])
def test_letters_are_no_answers_for_the_vqa_evaluator(model: VLM, metric: str) -> None:
    cfg = config({}, {}, metric)
    cfg.data.benchmarks.toy.source = {"_target_": f"{__name__}.Lettered"}
    with pytest.raises(UserError, match=r"toy\.metrics has \w+, which leaves nothing of the option 'A' \(it drops"):
        check_evaluation(cfg, model)
