"""What is found of a published model without its weights, and what is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.published import models
from tests.tiny import SIZE, VISION, qwen2

from vlmlab.contracts.errors import UserError
from vlmlab.published.model import KNOWN, REFUSED, find

OF_A_PROCESSOR = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)
"""Messages whose content is a list, as processors have them."""


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """The same folder with other values in its config; None takes a key out."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    for key, value in changes.items():
        at, *inner = key.split("__")
        (config[at].update({inner[0]: value}) if inner else config.update({at: value}))
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_the_words_compose_the_same_model() -> None:
    words = find(str(models.blip2_opt())).words(Path("/runs/b"))
    assert words[:4] == ["encoder=hf", "encoder.path='/runs/b/encoder'", "lm=hf", "lm.path='/runs/b/lm'"]
    assert {"connector=qformer", "connector.queries=5", "connector.norm_eps=1e-06", "encoder.layers=[-1]"} <= {*words}
    assert {"mask=causal", "recipe=published", "lm.image_token='<|image|>'"} <= {*words}


WRONG: dict[str, tuple[Callable[[], Path], dict[str, Any], str]] = {
    "activation": (models.llava, {"projector_hidden_act": "bent"}, "projector_hidden_act=bent, which transf"),
    "first patch": (
        models.llava_siglip, {"vision_feature_select_strategy": "default"}, "drops the first token and its tower has",
    ),
    "quantised": (
        models.llava, {"quantization_config": {"quant_method": "awq"}}, "has quantised weights; give the model as it",
    ),
    "T5": (models.blip2_opt, {"text_config": {"model_type": "t5"}}, r"its language model \(t5\) has an encoder"),
    "narrow": (
        models.blip2_opt, {"qformer_config__intermediate_size": 20}, "its Q-Former has intermediate_size=20, and here",
    ),
    "window": (models.paligemma, {"text_config__sliding_window": 8}, r"\(Gemma 2\) sees a window"),
    "perceiver": (models.idefics2, {"perceiver_config__hidden_act": "gelu"}, "its perceiver has hidden_act=gelu"),
    "draws": (models.ovis2_folder, {"vision_config__tokenize_function": "gumbel_argmax"}, "draws words at random"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_the_parts_do_not_reproduce_is_refused(case: str, tmp_path: Path) -> None:
    make, changes, why = WRONG[case]
    with pytest.raises(UserError, match=why) as raised:
        find(str(changed(make(), tmp_path / "x", **changes)), image_size=SIZE)
    assert str(raised.value).startswith("path=") and len(str(raised.value)) < 400


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_classes_that_cannot_be_taken_apart_say_why(kind: Any, tmp_path: Path) -> None:
    folder = changed(models.llava(), tmp_path / "x")
    kind().save_pretrained(folder)
    with pytest.raises(UserError, match=rf"this {kind.__name__[:-6]} cannot be made of vlmlab's parts: it"):
        find(str(folder))


def test_another_class_is_told_which_are_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a Qwen2, which vlmlab does not take apart; give one of Llava") as raised:
        find(str(qwen2()))
    assert all(plan.model.__name__ in str(raised.value) for plan in KNOWN.values())
    with pytest.raises(UserError, match="path=nowhere-x is neither a local folder nor a hub id within reach"):
        find("nowhere-x")


def test_adapters_and_pickles_are_not_read(tmp_path: Path) -> None:
    folder = changed(models.llava(), tmp_path / "x")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has an adapter beside its weights"):
        find(str(folder))


def test_a_chat_template_is_needed(tmp_path: Path) -> None:
    folder = changed(models.llava(), tmp_path / "x")
    jinja = folder / "chat_template.jinja"
    own = jinja.read_text()
    jinja.write_text(OF_A_PROCESSOR)
    with pytest.raises(UserError, match=r"has no usable chat template .*; give chat_template=<Jinja text or a file"):
        find(str(folder))
    jinja.unlink()
    with pytest.raises(UserError, match="has no chat template; give chat_template="):
        find(str(folder))
    (tmp_path / "own.jinja").write_text(own)
    assert find(str(folder), chat_template=own).tokenizer.chat_template == own
    found = find(str(folder), chat_template=str(tmp_path / "own.jinja"))
    assert found.tokenizer.chat_template == own and not found.notes


def test_one_size_in_place_of_tiles(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cuts images into tiles \(do_image_splitting\), .*give image_size=<pixels>"):
        find(str(models.idefics2()))
    native = changed(models.idefics2(), tmp_path / "x")
    settings = json.loads((native / "preprocessor_config.json").read_text()) | {"do_image_splitting": False}
    (native / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its processor gives images no single size; give image_size=<pixels>"):
        find(str(native))
    found = find(str(native), image_size=[32, 48])
    assert (found.preprocess.height, found.preprocess.width, found.preprocess.resample) == (32, 48, 2)
    assert "every image is brought to 32x48 pixels" in found.notes[0]


def test_a_placeholder_of_its_own_or_a_new_one(tmp_path: Path) -> None:
    older = changed(models.blip2_opt(), tmp_path / "x", image_token_index=None)
    assert find(str(older)).keys["lm.image_token"] == "<|image|>"
    other = changed(models.llava(), tmp_path / "y")
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    (other / "config.json").write_text(json.dumps(config))
    assert find(str(other)).keys["lm.image_token"] == "<image>" and VISION["patch_size"] == 16
