"""Evaluation of a model on benchmarks: what is asked, what is written, what is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tests import tiny
from tests.evaluate.toy import toy_config

from vlmlab.contracts.errors import Unscored, UserError
from vlmlab.contracts.sample import SampleSource
from vlmlab.data.questions import split_questions
from vlmlab.evaluate.baselines import NoImage
from vlmlab.evaluate.gallery import side_by_side, write_gallery
from vlmlab.evaluate.lookup import Lookup
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.evaluate.metrics.vqa import VqaAccuracy
from vlmlab.evaluate.rescore import rescored
from vlmlab.evaluate.run import evaluate_model, held_out_losses, mean_loss
from vlmlab.evaluate.slices import Slice
from vlmlab.mask.prefix_lm import PrefixLM
from vlmlab.mask.visual_rows_open import VisualRowsOpen
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM


class Source(list):  # type: ignore[type-arg]
    """Some samples as a data set that a configuration can name."""

    def __init__(self, count: int) -> None:
        super().__init__([s for s in tiny.SAMPLES if s.images][:count])


class Together(list):  # type: ignore[type-arg]
    """Questions of two image groups, each asked alone, as a benchmark has them."""

    def __init__(self) -> None:
        named = replace(tiny.QUESTIONS, image_ids=("a",)), replace(tiny.TAGGED, image_ids=("b", "c"))
        apart = [one for sample in named for one in split_questions(sample)]
        super().__init__(replace(one, id=f"{one.id}/{k}") for k, one in enumerate(apart))


def config() -> DictConfig:
    source = {"_target_": "tests.evaluate.test_run.Source", "count": 4}
    return toy_config(source, source)


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny.vlm().eval()


def test_scores_predictions_and_held_out_loss(model: VLM, tmp_path: Path) -> None:
    said: list[str] = []
    scores = evaluate_model(model, config(), tmp_path, said.append)
    assert scores["toy/vqa_accuracy/count"] == 4
    for suffix in ("", "/shuffled", "/no_image"):
        assert 0 <= scores[f"toy/vqa_accuracy{suffix}"] <= 1
        assert scores[f"val/captions/loss{suffix}"] > 0
    assert not any("instruct" in key for key in scores)
    folder = tmp_path / "predictions"
    rows = {name: read_rows(folder / f"toy{name}.jsonl") for name in ("", ".shuffled", ".no_image")}
    assert len({tuple(row.id for row in some) for some in rows.values()}) == 1
    assert all(a.image_ids != b.image_ids for a, b in zip(rows[""], rows[".shuffled"], strict=True) if a.image_ids)
    assert all(row.image_ids == () for row in rows[".no_image"])
    assert len(said) == 6


def with_lookup(cfg: DictConfig, **source: object) -> DictConfig:
    """The configuration with a stage that is taught the benchmark's own questions."""
    stage = {"module": "a.Module", "train": {"lm": 1e-3}, "data": "taught", "batch_size": 4, "objective": {"lm": 1}}
    cfg.data.train = {"taught": source or {"_target_": "tests.evaluate.test_run.Source", "count": 4}}
    return OmegaConf.merge(cfg, {"recipe": {"stages": {"ask": {**stage, "steps": 2}}}, "seed": 0,
                                 "evaluation": {"lookup_samples": 100}})  # fmt: skip


def test_the_lookup_stands_beside_every_score_without_a_forward_pass(model: VLM, tmp_path: Path) -> None:
    said: list[str] = []
    cfg = with_lookup(config())
    scores = evaluate_model(model, cfg, tmp_path, said.append)
    plain = evaluate_model(model, config(), tmp_path / "plain", print)
    assert len(said) == 6 and {key for key in scores if key.endswith("/lookup")} >= {"toy/vqa_accuracy/lookup"}
    rows, looked = (read_rows(tmp_path / "predictions" / f"toy{name}.jsonl") for name in ("", ".lookup"))
    table = Lookup(turn for sample in Source(4) for turn in sample.turns)
    assert [row.prediction for row in looked] == [table.answer(row.prompt, row.kind) for row in rows]
    assert scores["toy/vqa_accuracy/lookup"] > 0 and {row.image_ids for row in looked} == {()}
    assert all(scores[key] == value for key, value in plain.items() if not key.startswith(("toy/floor", "toy/norm")))


def test_a_run_is_scored_where_its_training_files_are_not(model: VLM, tmp_path: Path) -> None:
    said: list[str] = []
    gone = {"_target_": "vlmlab.data.readers.vqa.VqaJson", "path": str(tmp_path / "gone.json"), "images": str(tmp_path)}
    scores = evaluate_model(model, with_lookup(config(), **gone), tmp_path, said.append)
    assert "toy/vqa_accuracy" in scores and "toy/vqa_accuracy/lookup" not in scores
    assert said[0].startswith("no lookup: Data file") and "gone.json does not exist" in said[0]


def test_evaluating_twice_gives_the_same_numbers(model: VLM, tmp_path: Path) -> None:
    first, second = (evaluate_model(model, config(), tmp_path / name, print) for name in "ab")
    assert first == second


def test_batch_size_does_not_change_an_answer(model: VLM, tmp_path: Path) -> None:
    one, many = config(), config()
    one.evaluation.batch_size = 1
    evaluate_model(model, one, tmp_path / "one", print)
    evaluate_model(model, many, tmp_path / "many", print)
    answers = [[r.prediction for r in read_rows(tmp_path / n / "predictions" / "toy.jsonl")] for n in ("one", "many")]
    assert answers[0] == answers[1]


def loss(model: VLM, cfg: DictConfig, source: SampleSource) -> float:
    return mean_loss(build_collator(cfg, model, "chat"), model, source, cfg.evaluation.batch_size)


def test_mean_loss_is_per_token_over_the_whole_set(model: VLM) -> None:
    cfg = config()
    source = Source(4)
    collator = build_collator(cfg, model, "chat")
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in source:
            outputs = model(collator([sample]))
            chosen = outputs.logits.log_softmax(-1).gather(1, outputs.targets[:, None])
            total, count = total - float(chosen.sum()), count + len(chosen)
    assert loss(model, cfg, source) == pytest.approx(total / count, rel=1e-5)


def test_questions_share_their_images(model: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers to right, wrong and no images, and fewer images read."""
    cfg, found, read = config(), {}, {}
    cfg.data.benchmarks.toy.source = {"_target_": f"{__name__}.Together"}
    cfg.data.val, cfg.evaluation.batch_size = {}, 5
    for share in (False, True):
        pixels: list[int] = []
        monkeypatch.setattr(model, "cache", lambda encoder, p, pixels=pixels: pixels.append(len(p)) or encoder(p))
        cfg.evaluation.share_images = share
        evaluate_model(model, cfg, tmp_path / str(share), print)
        read[share] = pixels
        folder = tmp_path / str(share) / "predictions"
        found[share] = [read_rows(folder / f"toy{name}.jsonl") for name in ("", ".shuffled", ".no_image")]
    assert found[False] == found[True]
    assert read == {False: [3 + 2 * 2, 3 + 2 * 2], True: [1 + 2, 1 + 2]}, "none is read without an image"


def test_where_images_cannot_be_shared_it_is_said(tmp_path: Path) -> None:
    cfg = config()
    cfg.data.val, cfg.evaluation.baselines, cfg.evaluation.share_images = {}, [], True
    said: list[str] = []
    evaluate_model(tiny.vlm(mask=PrefixLM()), cfg, tmp_path, said.append)
    why = "PrefixLM lets what comes before the question see some of it"
    assert said[0] == f"note: evaluation.share_images=true: each question reads its images itself, since {why}"
    assert len(said) == 2


def test_the_held_out_loss_is_of_the_questions_as_they_are_trained(model: VLM) -> None:
    losses = {}
    for questions in ("conversation", "rows", "tree"):
        cfg = config()
        cfg.collate.questions = questions
        losses[questions] = loss(model, cfg, [tiny.QUESTIONS, tiny.TEXT_ONLY])
    assert losses["tree"] == pytest.approx(losses["rows"], rel=1e-6)
    assert abs(losses["conversation"] - losses["rows"]) > 1e-3


class Dialogues(list):  # type: ignore[type-arg]
    """Several questions an image."""

    def __init__(self) -> None:
        super().__init__([tiny.QUESTIONS, tiny.TAGGED])


@pytest.mark.parametrize("questions", ["rows", "tree"])
def test_without_images_too_each_question_is_asked_alone(model: VLM, questions: str) -> None:
    cfg = config()
    cfg.data.val.captions = {"_target_": f"{__name__}.Dialogues"}
    cfg.evaluation.baselines, cfg.collate.questions = ["no_image"], questions
    losses = held_out_losses(model, cfg, lambda line: None)
    alone = [NoImage([one])[0] for sample in Dialogues() for one in split_questions(sample)]
    assert losses["val/captions/loss/no_image"] == pytest.approx(loss(model, cfg, alone), rel=1e-6)
    together = loss(model, config(), [NoImage([sample])[0] for sample in Dialogues()])
    assert abs(losses["val/captions/loss/no_image"] - together) > 1e-3


class Broken(VqaAccuracy):
    """A metric that counts nothing, or does not know its rows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        if self.how == "crash":
            raise KeyError("row")
        return {"score": {"nan": float("nan"), "inf": float("inf")}.get(self.how, 0.5)}


def with_broken(how: str) -> DictConfig:
    """The toy benchmark after one whose metric fails, with held-out losses."""
    cfg, name = config(), f"{__name__}.Broken"
    broken = OmegaConf.merge(cfg.data.benchmarks.toy, {"metrics": [{"_target_": name, "how": how}]})
    if how == "empty":
        broken = OmegaConf.merge(cfg.data.benchmarks.toy, {"source": {"count": 0}})
    cfg.data.benchmarks = {"broken": broken, "toy": cfg.data.benchmarks.toy}
    cfg.evaluation.baselines = []
    return cfg


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("nan", "broken/score is nan"),
        ("inf", "broken/score is inf"),
        ("crash", "KeyError: 'row'"),
        ("empty", "no samples"),
    ],
)
def test_a_benchmark_that_fails_leaves_the_others_and_is_tried_again_alone(
    model: VLM, tmp_path: Path, how: str, why: str
) -> None:
    with pytest.raises(Unscored, match=f"^broken could not be scored .*{why}") as caught:
        evaluate_model(model, with_broken(how), tmp_path, print)
    error = caught.value
    assert len(str(error)) <= 300 and list(error.failed) == ["broken"] and why in error.failed["broken"]
    assert "toy/vqa_accuracy" in error.scores and "val/captions/loss" in error.scores
    assert not any(key.startswith("broken") for key in error.scores)
    before = {"metrics": {**error.scores, "toy/vqa_accuracy": 0.123}, "failed": error.failed}
    said: list[str] = []
    now = evaluate_model(model, with_broken("mended"), tmp_path, said.append, before)
    assert now == {**before["metrics"], "broken/score": 0.5, **{k: v for k, v in now.items() if k.startswith("broken")}}
    assert {line.split()[0].rstrip(":") for line in said} == {"broken"}


def test_a_held_out_set_that_fails_leaves_the_benchmarks(model: VLM, tmp_path: Path) -> None:
    cfg = config()
    cfg.data.val.captions.count = 1
    with pytest.raises(Unscored, match=r"val/captions could not be scored .*two different images") as caught:
        evaluate_model(model, cfg, tmp_path, print)
    assert list(caught.value.failed) == ["val/captions"] and "toy/vqa_accuracy" in caught.value.scores


def test_weights_that_give_no_number_give_no_score(tmp_path: Path) -> None:
    broken = tiny.vlm().eval()
    broken.lm.model.get_input_embeddings().weight.data[:] = float("nan")
    cfg = config()
    cfg.data.benchmarks = {}
    with pytest.raises(Unscored, match="val/captions/loss is nan"):
        evaluate_model(broken, cfg, tmp_path, print)


def test_an_empty_benchmark_is_refused(model: VLM, tmp_path: Path) -> None:
    cfg = config()
    cfg.budget.eval_limit = 0
    with pytest.raises(UserError, match="no samples"):
        evaluate_model(model, cfg, tmp_path, print)


def test_gallery_shows_images_and_answers(model: VLM, tmp_path: Path) -> None:
    cfg = config()
    metrics = evaluate_model(model, cfg, tmp_path, print)
    page = write_gallery(cfg, tmp_path, {"metrics": metrics, "cost": {}, "seed": 0, "overrides": []}, "toy", 3)
    text = page.read_text()
    assert text.count("data:image/png;base64") >= 3
    assert "what colour is it" in text


def test_several_images_stand_side_by_side() -> None:
    joined = side_by_side((tiny.picture(1, (8, 6)), tiny.picture(2, (4, 5))))
    assert joined.shape == (8, 6 + 4 + 5, 3)
    assert (joined[:8, :6] == tiny.picture(1, (8, 6))).all() and (joined[:4, 10:] == tiny.picture(2, (4, 5))).all()


# -- options -----------------------------------------------------------------------------------------------------------


class Choosing(list):  # type: ignore[type-arg]
    """Questions with options, one with two images and one without an image."""

    def __init__(self) -> None:
        options = ("two green squares", "no red", "green", "two red things are there", "big blue")
        kept = [s for s in tiny.SAMPLES if s.turns[-1].answer in options]
        super().__init__(replace(s, turns=(*s.turns[:-1], replace(s.turns[-1], options=options))) for s in kept)


def by_likelihood() -> DictConfig:
    cfg = toy_config({"_target_": f"{__name__}.Choosing"}, {}, "vlmlab.evaluate.metrics.options.OptionAccuracy")
    cfg.data.val, cfg.data.benchmarks.toy.scoring = {}, "likelihood"
    return cfg


def test_options_are_chosen_alike_at_every_batch_size_and_as_rows(model: VLM, tmp_path: Path) -> None:
    """Also with wrong images and with none; what is kept is enough to score again."""
    cfg, found = by_likelihood(), {}
    for way in (1, 2, 8, "rows"):
        said: list[str] = []
        cfg.evaluation.batch_size = 3 if way == "rows" else way
        asked = tiny.vlm(mask=VisualRowsOpen()) if way == "rows" else model
        scores = evaluate_model(asked, cfg, tmp_path / str(way), said.append)
        files = [tmp_path / str(way) / "predictions" / f"toy{name}.jsonl" for name in ("", ".shuffled", ".no_image")]
        found[way] = scores, [read_rows(file) for file in files]
        assert said[0].startswith("note: scoring=likelihood: each option has a row of its own") is (way == "rows")
    scores, sets = found[8]
    for way in (1, 2):
        assert found[way][0] == scores
        for rows, others in zip(sets, found[way][1], strict=True):
            assert [row.prediction for row in rows] == [row.prediction for row in others]
            for row, other in zip(rows, others, strict=True):
                assert row.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
    assert all(row.prediction == row.options[max(range(5), key=lambda k: row.log_likelihoods[k])] for row in sets[0])
    right, wrong, blind = ([row.log_likelihoods for row in rows] for rows in sets)
    assert right[0] != wrong[0] and right[0] != blind[0]
    assert {"toy/option_accuracy/shuffled", "toy/option_accuracy_norm/no_image", "toy/chance"} <= {*scores}
    assert rescored(tmp_path / "8", cfg, None, None, trust=False) == scores


def test_slices_and_the_lookup_choose_too(model: VLM, tmp_path: Path) -> None:
    cfg = with_lookup(by_likelihood(), _target_=f"{__name__}.Choosing")
    cfg.evaluation.slice_samples = 3
    taken = Slice(cfg, "toy").scores(model)
    assert {"slice/toy/option_accuracy", "slice/toy/option_accuracy_norm/shuffled"} <= {*taken}
    scores = evaluate_model(model, cfg, tmp_path, print)
    looked = read_rows(tmp_path / "predictions" / "toy.lookup.jsonl")
    assert {row.log_likelihoods for row in looked} == {()} and scores["toy/option_accuracy/lookup"] > 0


def test_without_options_nothing_is_chosen(model: VLM, tmp_path: Path) -> None:
    cfg = config()
    cfg.data.val, cfg.data.benchmarks.toy.scoring = {}, "likelihood"
    with pytest.raises(Unscored) as caught:
        evaluate_model(model, cfg, tmp_path, print)
    assert "has no options, and scoring=likelihood chooses from some" in caught.value.failed["toy"]
