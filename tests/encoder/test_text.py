"""The text tower beside a vision tower: transformers' own numbers, its tokens, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.tiny import CONF, VISION, choices, clip, root, siglip, spread, tokenizer, worst
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
)

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.sources import WorldStatements
from vlmlab.encoder.embedded import EmbeddedEncoder
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.patch import PatchEncoder
from vlmlab.encoder.text import TransformersTextTower, open_text_tower
from vlmlab.towers.source import embedded, tower_hash
from vlmlab.towers.text_export import retrieval

CONTEXT = 12
TEXTS = ["what colour is the big round thing", "red", "", "two green squares " * 9]
PREPROCESS = {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words framed as the family has them: CLIP begins and ends every text, SigLIP ends it, and pads with the end."""
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, padding_side="right")
    own.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    frame = "<|im_start|> $A <|im_end|>" if family == "clip" else "$A <|im_end|>"
    tokens = [(token, own.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=tokens)
    return own


@cache
def both(family: str) -> Path:
    """A random checkpoint of both towers with tokenizer and preprocessing."""
    own = family_tokenizer(family)
    text = {
        "vocab_size": len(own),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": 1,  # as both families' configs have it, and not what their tokenizers pad with
    }
    folder = root() / f"both_{family}"
    if family == "clip":
        model: PreTrainedModel = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    spread(model).save_pretrained(folder)
    own.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESS))
    return folder


DIRECT = {"clip": CLIPTextModel, "siglip": SiglipTextModel}


def processed(family: str, texts: list[str]) -> Tensor:
    """(I, T) ids as a processor of the family hands them to its model, padded to the context."""
    own = AutoTokenizer.from_pretrained(both(family))
    return own(texts, truncation=True, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("family", DIRECT)
@torch.no_grad()
def test_states_are_those_of_transformers(family: str) -> None:
    direct = DIRECT[family].from_pretrained(both(family)).eval()
    with_all = direct(input_ids=processed(family, TEXTS), output_hidden_states=True)
    before_norm: list[Tensor] = []
    hook = direct.final_layer_norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    direct(input_ids=processed(family, TEXTS))
    hook.remove()
    ids = HfEncoder(str(both(family))).text_tower().tokenise(TEXTS)
    for layer, want in [
        (-1, before_norm[0]),
        (None, with_all.last_hidden_state),
        (0, with_all.hidden_states[0]),
        (1, with_all.hidden_states[1]),
        (-2, with_all.hidden_states[2]),
        (3, before_norm[0]),
    ]:
        tower = open_text_tower(str(both(family)), "float32", layer=layer)
        states = tower(ids)
        assert states.shape == (len(TEXTS), CONTEXT, tower.width) == (4, 12, 24)
        assert worst(states, want) <= 1e-6, layer
    assert worst(before_norm[0], with_all.last_hidden_state) > 1e-2  # the two are not the same thing


@pytest.mark.parametrize("family", DIRECT)
def test_tokens_are_those_of_the_family_with_minus_one_behind(family: str) -> None:
    tower = HfEncoder(str(both(family))).text_tower()
    ids, want = tower.tokenise(TEXTS), processed(family, TEXTS)
    assert tower.context == CONTEXT and ids.shape == want.shape and ids.dtype == torch.long
    assert torch.equal(torch.where(ids < 0, tower.pad, ids), want)
    own = AutoTokenizer.from_pretrained(both(family))
    for row, text in zip(ids, TEXTS, strict=True):
        alone = own(text, truncation=True, max_length=CONTEXT)["input_ids"]
        assert row[: len(alone)].tolist() == alone and set(row[len(alone) :].tolist()) <= {-1}
        assert row[len(alone) - 1] == own.eos_token_id  # of a text that is cut off as well
    frame = {"clip": 2, "siglip": 1}[family]
    assert [(row >= 0).sum().item() for row in ids[2:]] == [frame, CONTEXT]
    assert tower.tokenise([]).shape == (0, CONTEXT) and tower(tower.tokenise([])).shape == (0, CONTEXT, 24)


@pytest.mark.parametrize("family", DIRECT)
def test_the_whole_context_has_states_and_padding_is_seen_as_the_family_sees_it(family: str) -> None:
    tower = HfEncoder(str(both(family))).text_tower()
    ids = tower.tokenise(["red", "blue"])
    red, blue = tower(ids)
    assert red.isfinite().all() and worst(red[-1], blue[-1]) > 1e-3  # the last padding position knows the words
    other = ids.clone()
    other[0, -1] = ids[0, 0]  # another last token
    before = worst(tower(other)[0, :-1], red[:-1])
    assert before == 0 if family == "clip" else before > 1e-3  # causal, and not


@pytest.mark.parametrize("family", DIRECT)
def test_it_is_frozen_and_no_part_of_the_encoder(family: str) -> None:
    encoder = HfEncoder(str(both(family)))
    before = {name for name, _ in encoder.named_parameters()}
    tower = encoder.text_tower()
    assert {name for name, _ in encoder.named_parameters()} == before
    assert not any(isinstance(module, TransformersTextTower) for module in encoder.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower(tower.tokenise(TEXTS)).requires_grad
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert tower.source == encoder.source == tower_hash(both(family))
    assert open_text_tower(str(both(family)), "float16")(tower.tokenise(TEXTS)).dtype == torch.float32


def test_only_what_the_states_depend_on_is_kept() -> None:
    names = {name for name, _ in open_text_tower(str(both("siglip")), "float32", layer=1).named_parameters()}
    assert {name.split(".")[1] for name in names} == {"embeddings", "encoder"}
    assert not any(".layers.1." in name for name in names)
    kept = {name for name, _ in open_text_tower(str(both("siglip")), "float32", layer=None).named_parameters()}
    assert {name.split(".")[1] for name in kept} == {"embeddings", "encoder", "final_layer_norm"}
    with pytest.raises(UserError, match=r"of 3 layers has no hidden state 4; use -4\.\.3"):
        open_text_tower(str(both("siglip")), "float32", layer=4)


def test_encoders_without_a_text_tower_say_so(tmp_path: Path) -> None:
    for folder in (siglip(), clip()):
        with pytest.raises(UserError, match=r"encoder\.path=.* has no text tower .*CLIPModel or SiglipModel"):
            HfEncoder(str(folder)).text_tower()
    alone = PatchEncoder(64, 16)
    for encoder in (alone, MultiEncoder([HfEncoder(str(both("clip")), layers=[-2])])):
        with pytest.raises(UserError, match=f"{type(encoder).__name__} has no text tower"):
            encoder.text_tower()


@pytest.mark.parametrize("lost", ["tokenizer", "weights"])
def test_a_folder_that_lacks_something_is_refused_in_one_sentence(lost: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in both("siglip").iterdir():
        if not (lost == "tokenizer" and path.name.startswith("tokenizer")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    if lost == "weights":
        tensors = load_file(tmp_path / "model.safetensors")
        short = {name: tensor for name, tensor in tensors.items() if "text_model.encoder.layers.2" not in name}
        save_file(short, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    want = {"tokenizer": r"no readable tokenizer", "weights": r"lacks weights of SiglipTextModel .*encoder\.path"}
    with pytest.raises(UserError, match=want[lost]) as caught:
        HfEncoder(str(tmp_path)).text_tower()
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((both("clip") / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"encoder\.path=.* no weights in safetensors"):
        open_text_tower(str(tmp_path), "float32")


@pytest.mark.parametrize("family", DIRECT)
def test_without_values_it_has_its_shapes(family: str) -> None:
    with torch.device("meta"):
        tower = HfEncoder(str(both(family))).text_tower()
        ids = tower.tokenise(TEXTS)
        states = tower(ids.to("meta"))
    loaded = HfEncoder(str(both(family))).text_tower()
    assert torch.equal(ids, loaded.tokenise(TEXTS))
    assert {n: p.shape for n, p in tower.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert {p.device.type for p in tower.parameters()} == {"meta"} and tower.source is None
    assert states.device.type == "meta" and states.shape == (len(TEXTS), CONTEXT, 24)


HUB: dict[str, tuple[int, int, float]] = {  # width, context, millions of weights without projection
    "clip_vit_b32": (512, 77, 63.1),
    "clip_vit_l14_336": (768, 77, 123.1),
    "siglip_base_224": (768, 64, 109.7),
    "siglip_so400m_224": (1152, 64, 448.4),
    "siglip_so400m_384": (1152, 64, 448.4),
    "siglip2_base_224": (768, 64, 281.7),
    "siglip2_so400m_384": (1152, 64, 706.5),
}


@pytest.mark.parametrize("name", HUB)
def test_the_architecture_of_an_id(name: str) -> None:
    width, context, millions = HUB[name]
    with torch.device("meta"):
        encoder: Any = instantiate(tiny.loaded(CONF / "encoder" / f"{name}.yaml"))
        tower = encoder.text_tower()
    whole = sum(p.numel() for p in tower.parameters()) + 2 * width  # and the final norm
    assert (tower.width, tower.context) == (width, context) and whole == pytest.approx(millions * 1e6, rel=2e-3)


def test_every_id_of_two_towers_has_its_text_tower() -> None:
    hub = {path.stem for path in choices("encoder") if "architecture" in tiny.loaded(path)}
    assert {name for name in hub if not name.startswith(("dinov2", "eva"))} == set(HUB)
    with torch.device("meta"), pytest.raises(UserError, match=r"encoder\.path=facebook/dinov2-small has no text"):
        instantiate(tiny.loaded(CONF / "encoder" / "dinov2_small.yaml")).text_tower()


# -- the one that ships ------------------------------------------------------------------------------------------------


def test_the_shipped_one_has_read_captions_and_questions() -> None:
    """Chance is 0.01 and 0.5."""
    vision = EmbeddedEncoder(pooled=True)
    found = {
        form: retrieval(vision, embedded("text"), WorldStatements("val", 100, seed=1, forms=[form]))
        for form in ("caption", "dense", "answered", "question")
    }
    assert found["caption"]["at_1"] > 0.3 and found["dense"]["at_1"] > 0.7 and found["answered"]["at_1"] > 0.1
    assert found["caption"]["above"] > 0.95 and found["question"]["above"] > 0.75


@torch.no_grad()
def test_the_shipped_one_tells_the_words_of_a_question_apart() -> None:
    tower = EmbeddedEncoder().text_tower()
    assert tower.source == tower_hash(embedded("text"))
    one, other, same = tower(
        tower.tokenise(
            ["What color is the circle?", "What color is the square?", "What color is the circle?"],
        )
    )
    assert one.shape == (tower.context, tower.width) and torch.equal(one, same)
    assert worst(one, other) > 0.1 * float(one.std())
    unknown = tower.tokenizer.unk_token_id
    ids = tower.tokenise([sample.turns[0].answer for sample in WorldStatements("val", 200, forms=["question"])])
    assert unknown is None and (ids[:, -1] == -1).all()  # every word is known, and none of them is cut off
