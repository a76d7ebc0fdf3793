"""``vlmlab.load``: the answers are those of the evaluation that ended the run, whatever was trained."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image as Pillow
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    TextStreamer,
    WatermarkingConfig,
)

import vlmlab
from tests import tiny
from tests.test_conf import composed
from vlmlab.contracts.errors import CheckpointError, DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.loading import REFUSED, LoadedModel
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train

TRAINED = {
    "connector": ("recipe=frozen",),
    "adapter": ("recipe=two_stage", "adapter=lora"),
    "full": ("recipe=joint",),
}
SHORT = (
    "budget.max_steps=1", "budget.eval_limit=4", "data.benchmarks.world_test.max_new_tokens=3",
    "evaluation.held_out=[]", "evaluation.baselines=[]", "trainer.progress=false", "trainer.accelerator=cpu",
    "~data.benchmarks.world_captions", "~data.benchmarks.world_compositional",
)  # fmt: skip


def finished(where: Path, *overrides: str) -> Path:
    cfg = composed(*SHORT, *overrides)
    with RunFolder(where) as run:
        run.open(plain(cfg), list(overrides))
        train(cfg, where)
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("runs") / "full", *TRAINED["full"])


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return vlmlab.load(folder, device="cpu")


def told(run: Path, loaded: LoadedModel) -> tuple[list[str], list[str]]:
    """What the run's own evaluation said, and what the loaded model says to the same questions."""
    samples = instantiate(loaded.config.data.benchmarks.world_test.source)
    rows = read_rows(run / "predictions" / "world_test.jsonl")
    asked = [samples[i] for i in range(len(rows))]
    assert [sample.id for sample in asked] == [row.id for row in rows] and all(len(s.turns) == 1 for s in asked)
    now = [loaded.generate(s.images, s.turns[0].prompt, max_new_tokens=3, system=s.system) for s in asked]
    return [row.prediction for row in rows], now


@pytest.mark.parametrize("trained", ["connector", "adapter"])
def test_the_answers_are_those_of_the_evaluation(trained: str, tmp_path: Path) -> None:
    run = finished(tmp_path / trained, *TRAINED[trained])
    before, now = told(run, vlmlab.load(run, device="cpu"))
    assert before == now and any(before)


def test_a_run_may_have_moved(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "run")
    before, now = told(moved, vlmlab.load(str(moved), device="cpu"))
    assert before == now and any(before)


def test_loading_changes_no_random_number(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    vlmlab.load(folder, device="cpu")
    assert torch.equal(torch.rand(2), expected)


def test_an_image_is_a_file_a_picture_or_an_array(model: LoadedModel, tmp_path: Path) -> None:
    pixels = tiny.picture(1)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    kinds = (pixels, Pillow.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png"), [pixels])
    assert len({model.generate(kind, "what is it", max_new_tokens=4) for kind in kinds}) == 1
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert model.generate(tmp_path / "link.png", "a", max_new_tokens=2) == model.generate(pixels, "a", max_new_tokens=2)


def test_a_turned_picture_is_turned_upright(model: LoadedModel, tmp_path: Path) -> None:
    from vlmlab.loading import _image

    pixels = tiny.picture(2, (6, 9))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    Pillow.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Pillow.open(tmp_path / "turned.png") as opened:
        assert np.array_equal(_image(opened), _image(tmp_path / "turned.png")) and _image(opened).shape == (9, 6, 3)
    grey = Pillow.fromarray(np.full((4, 4), 65535, np.uint16))
    assert (_image(grey) == 255).all()
    deep = Pillow.fromarray(np.array([[0, 2048, 4095]], np.uint16))  # by the range that the run's data were read with
    deep.save(tmp_path / "deep.png")
    assert [_image(one, [0, 4095])[0, :, 0].tolist() for one in (deep, tmp_path / "deep.png")] == [[0, 128, 255]] * 2
    with pytest.raises(UserError, match=r"the image of mode F cannot be read .its pixels are not finite.; convert it"):
        _image(Pillow.fromarray(np.array([[np.nan]], np.float32)))


def test_no_image_several_images_and_sampling(model: LoadedModel) -> None:
    one, other = tiny.picture(1), tiny.picture(2)
    assert isinstance(model.generate(None, "how many", max_new_tokens=2), str)
    tagged = model.generate([one, other], f"{IMAGE_TAG} and {IMAGE_TAG} what", max_new_tokens=2)
    assert isinstance(tagged, str) and isinstance(model.generate((one, other), "what", max_new_tokens=2), str)
    told = []
    for _ in range(2):
        torch.manual_seed(3)
        told.append(model.generate(one, "what", max_new_tokens=6, do_sample=True, temperature=5.0, top_p=0.95))
    assert told[0] == told[1] and "parameters on cpu" in repr(model)


@pytest.mark.parametrize(
    ("image", "question", "options", "message"),
    [
        (None, f"{IMAGE_TAG} and {IMAGE_TAG}?", {}, "has 2 <image> tags and there are no images; give as many"),
        (1, f"{IMAGE_TAG}{IMAGE_TAG}", {}, "has 2 <image> tags and there is 1 image;"),
        ("nowhere.png", "what", {}, "nowhere.png is not a file"),
        (3.5, "what", {}, "the image is a float; give a path"),
        (np.zeros((4, 4), np.uint8), "what", {}, r"array of uint8 \(4, 4\)"),
        (1, "what", {"temprature": 1.0}, "temprature is not an option of transformers' generate"),
        (1, "what", {"max_new_tokens": 0}, "max_new_tokens=0 is not possible"),
        (1, "what", {"num_return_sequences": 2}, "num_return_sequences=2 is not possible"),
    ],
)
def test_mistakes_are_one_sentence(
    image: object, question: str, options: dict[str, object], message: str, model: LoadedModel
) -> None:
    given = tiny.picture(1) if isinstance(image, int) else image
    with pytest.raises(UserError, match=message) as caught:
        model.generate(given, question, **options)
    assert "\n" not in str(caught.value)


BY_NAME: dict[str, object] = {
    "min_length": 30, "min_new_tokens": 2, "early_stopping": True, "max_time": 5.0, "stop_strings": ["e"],
    "do_sample": True, "num_beams": 2, "use_cache": True, "cache_implementation": "static", "temperature": 0.7,
    "top_k": 5, "top_p": 0.9, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4, "repetition_penalty": 1.2, "length_penalty": 0.5, "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]], "renormalize_logits": True, "forced_eos_token_id": 2, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.1), "suppress_tokens": [5], "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], -1.0]], "watermarking_config": WatermarkingConfig(), "num_return_sequences": 1,
    "pad_token_id": 0, "eos_token_id": [2, 5], "disable_compile": True,
    "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(2, 2)]),
    "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(5.0)]),
    "prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7],
}  # fmt: skip
WITH = {
    **{key: {"num_beams": 2} for key in ("early_stopping", "length_penalty")},
    "cache_implementation": {"disable_compile": True},
}
"""Options that act beside another."""


def test_every_option_of_transformers_is_known(model: LoadedModel) -> None:
    every = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    own = {"self", "kwargs", "max_new_tokens", "streamer", *(name for name in every if name.startswith("_"))}
    assert every - own == (BY_NAME.keys() | REFUSED.keys()) & every, "a new version has others: sort them"


@pytest.mark.parametrize("name", BY_NAME)
def test_an_option_works(name: str, model: LoadedModel) -> None:
    sampling = {"do_sample": True} if name.startswith(("t", "min_p", "eta", "epsilon")) else {}
    told = model.generate(
        tiny.picture(1), "what", max_new_tokens=3, **{name: BY_NAME[name]}, **WITH.get(name, sampling)
    )
    assert isinstance(told, str)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_cannot_be_had_is_one_sentence(name: str, model: LoadedModel) -> None:
    for value in (True, 2, 1.5, "x"):
        with pytest.raises(UserError, match=f"{name} is not possible here: ") as caught:
            model.generate(None, "what", **{name: value})
        assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    assert isinstance(model.generate(None, "what", max_new_tokens=1, **{name: None}), str)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0, "do_sample": True}, {"num_beams": 0}, {"bad_words_ids": 3}, {"eos_token_id": "x"},
        {"stop_strings": 5}, {"logits_processor": 3}, {"repetition_penalty": "a"}, {"watermarking_config": 3},
        {"streamer": 3}, {"cache_implementation": "quantized"}, {"cache_implementation": "offloaded"},
        {"max_new_tokens": True}, {"pad_token_id": "q"}, {"_from_model_config": True}, {"kwargs": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_transformers_refuses_is_one_sentence(options: dict[str, Any], model: LoadedModel) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        model.generate(None, "what", **{"max_new_tokens": 2, **options})
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_a_streamer_is_told_the_words(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(model.model.lm.tokenizer, skip_special_tokens=True)
    told = model.generate(tiny.picture(1), "what", max_new_tokens=3, streamer=streamer)
    assert capsys.readouterr().out.strip() == told
    with pytest.raises(UserError, match="streamer, num_beams: transformers' generate does not take that"):
        model.generate(None, "what", streamer=streamer, num_beams=2)


def test_control_tokens_in_a_question_are_refused(model: LoadedModel) -> None:
    with pytest.raises(DataError, match=r"Sample question contains the control token <\|im_end\|>"):
        model.generate(None, "what<|im_end|>")


def test_a_broken_image_is_named(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        model.generate(tmp_path / "broken.jpg", "what")


def test_wrong_folders_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder \(it has no config.yaml\)"):
        vlmlab.load(tmp_path / "nothing")
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not finished \(no result.json\)"):
        vlmlab.load(unfinished)
    gone = shutil.copytree(folder, tmp_path / "gone")
    for file in gone.glob("stages/*/model.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        vlmlab.load(gone)
    with pytest.raises(UserError, match=r"lm\.pth is not a key"):
        vlmlab.load(folder, {"lm.pth": "x"})
    with pytest.raises(UserError, match="device=tpus is unknown"):
        vlmlab.load(folder, device="tpus")


def test_weights_of_another_tower_are_refused(folder: Path) -> None:
    lm = {"_target_": "vlmlab.lm.hf.HfLanguageModel", "path": str(tiny.qwen2())}
    with pytest.raises(CheckpointError, match="was trained on another lm"):
        vlmlab.load(folder, {"lm": lm})


def test_the_package_is_imported_at_once() -> None:
    code = "import sys, vlmlab; print([n for n in ('torch', 'numpy', 'omegaconf', 'PIL') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = vlmlab.lod


# -- conversations, streaming, probabilities ---------------------------------------------------------------------------


def test_the_stream_is_the_answer(model: LoadedModel) -> None:
    pieces: list[str] = []
    answer = model.generate(tiny.picture(1), "What is there?", max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces).strip() == answer == model.generate(tiny.picture(1), "What is there?", max_new_tokens=12)
    with pytest.raises(UserError, match="transformers' generate does not take that"):
        model.generate(None, "What?", num_beams=2, stream=pieces.append)


def test_earlier_turns_are_read(model: LoadedModel) -> None:
    """The prompt is that of a conversation whose last answer is open."""
    image, history = tiny.picture(1), [("What is there?", "a red circle.")]
    later = model._collator.ask([model._sample(image, [*history, ("Where?", "")], "")])
    whole = model._collator([model._sample(image, [*history, ("Where?", "here")], "")])
    length = later.input_ids.shape[1]
    assert torch.equal(later.input_ids[0], whole.input_ids[0, :length])
    with pytest.raises(UserError, match="1 <image> tag"):
        model.generate(None, "Where?", history=[("<image>What?", "a dog.")])


@torch.no_grad()
def test_likelihoods_of_answers(model: LoadedModel) -> None:
    """Those of their tokens' probabilities, with what was said before; the answer of generation is greedy."""
    image, options = tiny.picture(1), ["red", "a large blue circle", "no"]
    found = model.likelihood(image, "What color is the circle?", options)
    for answer, log in zip(options, found, strict=True):
        tokens = model.probabilities(image, "What color is the circle?", answer)
        assert log == pytest.approx(float(np.log([p for _, p in tokens]).sum()), abs=1e-4)
    with_history = model.likelihood(image, "Is there a circle?", ["yes", "no"], history=[("How many?", "3")])
    assert with_history != model.likelihood(image, "Is there a circle?", ["yes", "no"])
    said = model.generate(image, "How many objects are there?", max_new_tokens=20)
    assert [one.greedy for one in model.likelihoods(image, "How many objects are there?", [said, "ring"])] == [
        True,
        False,
    ]
    for wrong in ([], "yes", ["yes", " "], [1]):
        with pytest.raises(UserError, match="has no answers to choose from; give a list of texts, none empty"):
            model.likelihood(image, "hm", wrong)  # type: ignore[arg-type]


def test_probabilities_are_those_of_generation(model: LoadedModel) -> None:
    """Greedy, each token is the most probable one; and by hand from the logits."""
    image, question = tiny.picture(2), "How many objects are there?"
    answer = model.generate(image, question, max_new_tokens=8)
    found = model.probabilities(image, question, answer)
    batch = model._collator([model._sample(image, [(question, answer)], "")])
    outputs = model.model(batch)
    for (token, probability), logits, target in zip(found, outputs.logits, outputs.targets, strict=True):
        assert probability == pytest.approx(float(logits.softmax(-1)[target]), abs=1e-6)
        assert token == model.model.lm.tokenizer.decode([int(target)])
    assert answer == "".join(token for token, _ in found[:-1]).strip()
