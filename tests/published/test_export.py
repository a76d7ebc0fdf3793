"""Compositions as models of transformers: opened by its classes alone, with the lab's logits, tokens and answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.published import models
from tests.published.splitting import imported
from tests.test_conf import composed
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaForConditionalGeneration,
)

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image as Pixels
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.loading import LoadedModel, load
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.build import build_model
from vlmlab.model.vlm import VLM
from vlmlab.published.card import write_card
from vlmlab.published.export import ExportCheck, export_route, write
from vlmlab.published.llava import Llava
from vlmlab.published.mask_code import code, is_causal, is_of_prefixes, is_of_prompts, needs_answers
from vlmlab.published.paligemma import PaliGemma
from vlmlab.published.prompts import conversation

SQUARE, WIDE = tiny.picture(1), tiny.picture(2, (40, 90))
TURNS = (("what colour is it", "two green squares"), ("how many", "red blue"))


def made(
    *words: str, lm: Path | None = None, encoder: Path | None = None, lora: bool = False
) -> tuple[VLM, DictConfig]:
    """A composition with random weights that all matter, an adapter's among them."""
    places = (f"encoder.path={encoder or tiny.siglip()}", f"lm.path={lm or tiny.qwen2()}")
    cfg = composed("encoder=hf", "lm=hf", *places, "collate.questions=whole", *words)
    model = build_model(cfg).eval()
    tiny.spread(model.connector, 1)
    if lora:
        model.set_adapter(LoraAdapter(parts=["lm", "encoder"], r=2, alpha=4, targets="all-linear"))
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        for k, weight in enumerate(adapters):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(k))
    return model, cfg


def given(model: VLM, cfg: DictConfig, folder: Path) -> ExportCheck:
    model.merge()
    route = export_route(model)
    proof = write(model, cfg, folder, route)
    write_card(folder, None, cfg, route, proof)
    return proof


def logits_of(model: VLM, picture: Pixels) -> tuple[Tensor, Any]:
    batch = tiny.collator(model)([Sample("x", (picture,), tuple(Turn(*turn) for turn in TURNS))])
    with torch.no_grad():
        return model(batch).logits, batch


def asker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ``ask`` of the card's own snippet, which is run as it is printed."""
    return snippet_of(folder, monkeypatch)["ask"]


def snippet_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All that the snippet defines."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(blocks) == 1 and "vlmlab" not in blocks[0]
    Image.fromarray(SQUARE).save(folder / "picture.png")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    return names


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "mlp causal": (("connector=mlp", "mask=causal", "encoder.layers=[-2]"), {}),
    "linear causal lora": (("connector=linear", "mask=causal", "encoder.layers=null"), {"lora": True}),
    "linear bidir": (("connector=linear", "mask=bidir", "encoder.layers=[1,-2]", "encoder.square=true"), {}),
    "mlp bidir lora": (("connector=mlp", "mask=bidir", "connector.activation=silu"), {"lora": True}),
    "mlp prefix_lm": (("connector=mlp", "mask=prefix_lm", "encoder.class_token=true"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_those_of_the_lab(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, options = CASES[case]
    towers = (
        {"encoder": tiny.clip(), "lm": tiny.llama()} if "class_token" in str(words) or "square" in str(words) else {}
    )
    model, cfg = made(*words, **towers, **options)
    loaded, (want, batch) = LoadedModel(model, cfg), logits_of(model, WIDE)
    said = [loaded.generate(picture, "what colour", max_new_tokens=6) for picture in (SQUARE, WIDE)]
    later = loaded.generate(WIDE, "how many", max_new_tokens=6, history=TURNS[:1])
    assert given(model, cfg, tmp_path).turns

    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, LlavaForConditionalGeneration) and not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert isinstance(processor, LlavaProcessor)
    pixels = processor.image_processor(Image.fromarray(WIDE), return_tensors="pt")["pixel_values"]
    encoder: Any = model.encoder
    assert torch.equal(pixels, (batch.pixels.float() / encoder.white - encoder.mean) / encoder.std)
    q = torch.arange(batch.input_ids.shape[1])
    shown = {} if is_causal(model.mask) else {"attention_mask": model.mask(batch.layout, q)[:, None]}
    with torch.no_grad():
        got = theirs(input_ids=batch.input_ids, pixel_values=pixels, **shown).logits
        plain = theirs(input_ids=batch.input_ids, pixel_values=pixels).logits
    there = batch.labels[:, 1:] != -100
    assert tiny.worst(got[:, :-1][there], want) < 1e-5 * max(1, float(want.abs().max()))
    assert not shown or tiny.worst(plain[:, :-1][there], want) > 1e-2, "what plain generate would leave out"
    said_of = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "generation_config")}
    assert said_of["config"]["vlmlab"] == {"mask": words[1].removeprefix("mask=")}
    assert said_of["generation_config"]["eos_token_id"] == model.lm.stop_ids

    ask = asker(tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()
    pictures = [Image.fromarray(picture) for picture in (SQUARE, WIDE)]
    assert [ask(conversation(p, "what colour"), max_new_tokens=6).strip() for p in pictures] == said
    history = conversation(pictures[1], TURNS[0][0], TURNS[0][1], "how many")
    assert ask(history, max_new_tokens=6).strip() == later


def test_it_comes_back_in_as_it_was(tmp_path: Path) -> None:
    """With its mask, a linear layer, squares, and with the tower's final output."""
    model, cfg = made("connector=linear", "mask=bidir", "encoder.layers=null", "encoder.square=true")
    want, _ = logits_of(model, WIDE)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    given(model, cfg, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"is a model of transformers and no run; `vlmlab import path=.* makes one of it"
    ):
        load(tmp_path / "out")
    run = imported(tmp_path / "out", tmp_path / "run")
    back = load(run, device="cpu").model
    assert type(back.mask) is type(model.mask) and tiny.worst(logits_of(back, WIDE)[0], want) < 1e-5
    again = back.state_dict()
    assert own.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in own.items())


IDEFICS2 = (
    "connector=idefics2", "connector.hidden=48", "connector.latents=5", "connector.depth=2", "connector.heads=4",
    "connector.head_dim=8", "connector.kv_heads=2", "encoder.layers=null",
)  # fmt: skip
OTHERS = {
    "paligemma": (PaliGemmaForConditionalGeneration, ("connector=linear", "mask=prefix_lm", "encoder.layers=null")),
    "idefics2 bidir": (Idefics2ForConditionalGeneration, (*IDEFICS2, "mask=bidir")),
}


@pytest.mark.parametrize(("kind", "words"), OTHERS.values(), ids=OTHERS)
def test_other_classes_answer_as_the_lab_and_come_back_in(
    kind: type[Any], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cfg = made(*words)
    loaded = LoadedModel(model, cfg)
    said = [loaded.generate(picture, "what colour", max_new_tokens=6) for picture in (SQUARE, WIDE)]
    want, own = logits_of(model, WIDE)[0], {name: value.clone() for name, value in model.state_dict().items()}
    alone = kind is PaliGemmaForConditionalGeneration  # whose own mask is that of one question
    assert given(model, cfg, tmp_path / "out").turns != alone
    theirs = snippet_of(tmp_path / "out", monkeypatch)
    assert type(theirs["model"]) is kind
    pictures = [Image.fromarray(picture) for picture in (SQUARE, WIDE)]
    assert [theirs["ask"](conversation(p, "what colour"), max_new_tokens=6).strip() for p in pictures] == said
    read = theirs["read"](conversation(pictures[0], "what colour"))
    assert ("token_type_ids" in read) == alone and not read.get("token_type_ids", torch.zeros(1)).any()
    back = load(imported(tmp_path / "out", tmp_path / "run"), device="cpu").model
    assert type(back.mask) is type(model.mask) and tiny.worst(logits_of(back, WIDE)[0], want) < 1e-5
    again = back.state_dict()
    assert own.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in own.items())


@pytest.mark.slow
@pytest.mark.parametrize(("made_by", "options"), [(models.paligemma, {}), (models.idefics2, {"image_size": 64})])
def test_they_go_out_as_they_came_in(
    made_by: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published weights again, bit for bit."""
    loaded = load(imported(made_by(), tmp_path / "run", **options), device="cpu")
    said = loaded.generate(WIDE, "what colour", max_new_tokens=6)
    given(loaded.model, loaded.config, tmp_path / "out")
    first, again = (load_file(folder / "model.safetensors") for folder in (made_by(), tmp_path / "out"))
    assert first.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in first.items())
    ask = asker(tmp_path / "out", monkeypatch)
    assert ask(conversation(Image.fromarray(WIDE), "what colour"), max_new_tokens=6).strip() == said


def test_what_the_others_do_not_have() -> None:
    """LLaVA takes what PaliGemma's own mask or features are not."""
    model, _ = made("connector=linear", "mask=prefix_lm", "encoder.layers=null")
    assert type(export_route(model).plan) is PaliGemma
    model.set_mask(Bidirectional())
    assert type(export_route(model).plan) is Llava
    other, _ = made(*IDEFICS2, "connector.hidden=40")
    with pytest.raises(UserError, match=r"Idefics2 has a gated MLP like its language model's \(connector.hidden=48\)"):
        export_route(other)


def test_blip2_goes_out_as_it_came_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own weights again, with the lab's processor and template; a mask cannot go with it."""
    loaded = load(imported(models.blip2_llama(), tmp_path / "run"), device="cpu")
    said = [loaded.generate(picture, "what colour", max_new_tokens=6) for picture in (SQUARE, WIDE)]
    given(loaded.model, loaded.config, tmp_path / "out")
    first, again = (load_file(folder / "model.safetensors") for folder in (models.blip2_llama(), tmp_path / "out"))
    assert first.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in first.items())
    ask = asker(tmp_path / "out", monkeypatch)
    pictures = [Image.fromarray(picture) for picture in (SQUARE, WIDE)]
    assert [ask(conversation(p, "what colour"), max_new_tokens=6).strip() for p in pictures] == said
    loaded.model.set_mask(Bidirectional())
    with pytest.raises(UserError, match="`generate` of Blip2ForConditionalGeneration takes no prompt"):
        export_route(loaded.model)


NOT: dict[str, tuple[tuple[str, ...], str]] = {
    "fusion": (("fusion=lavi",), "LaViFusion is in none"),
    "connector": (("connector=pool", "connector.side=2"), "has a projector of one linear layer or two"),
    "width": (("connector.hidden=24",), r"as wide as the language model .*\(connector.hidden=null\)"),
    "size": (("encoder.image_size=80",), r"images have 80x80 pixels and the tower's own 64x64 \(encoder.image_size\)"),
    "encoder": (("encoder=patch",), "PatchEncoder is in none"),
}


@pytest.mark.parametrize("case", NOT)
def test_what_no_class_is(case: str) -> None:
    words, why = NOT[case]
    places = () if case == "encoder" else ("encoder=hf", f"encoder.path={tiny.siglip()}")
    model = build_model(composed(*places, "lm=hf", f"lm.path={tiny.qwen2()}", *words))
    with pytest.raises(UserError, match=why) as raised:
        export_route(model)
    assert len(str(raised.value)) < 300


def test_a_window_under_a_mask(tmp_path: Path) -> None:
    model, _ = made("mask=bidir", lm=tiny.sliding_qwen2())
    with pytest.raises(UserError, match="layers that see a window"):
        export_route(model)


def test_what_is_not_the_same_is_not_left_there(tmp_path: Path) -> None:
    """A tower whose final output no config of LLaVA reads."""
    model, cfg = made("encoder.layers=null", encoder=tiny.dinov2())
    with pytest.raises(UserError, match=r"is another: its logits are .* from the run's; export by form=run"):
        given(model, cfg, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_every_mask_says_its_rule() -> None:
    """But the one that is refused for training; and each rule is verify to be what the mask does."""
    known = {path.stem: instantiate(OmegaConf.load(path)) for path in tiny.choices("mask")}
    leaky = known.pop("visual_rows_open")
    assert not is_of_prompts(leaky)
    assert [name for name, mask in known.items() if is_causal(mask)] == ["causal"]
    assert [name for name, mask in known.items() if is_of_prefixes(mask)] == ["prefix_lm"]
    assert all(is_of_prompts(mask) and "def sees" in code(mask, 1, 2) for mask in known.values())
    of_answers = {name for name, mask in known.items() if needs_answers(mask)}
    assert of_answers == {"bidir_all_images", "visual_keys_open", "prefix_lm"}
    with pytest.raises(UserError, match="declares no `rule`"):
        code(leaky, 1, 2)
    wrong = type("Wrong", (type(known["bidir"]),), {"rule": "earlier"})()
    with pytest.raises(UserError, match=r"its `rule` \(earlier\) is not what it does"):
        code(wrong, 1, 2)


def test_a_template_of_parts_writes_what_that_of_texts_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from vlmlab.published.prompts import with_parts

    tokenizer = tiny.tokenizer()
    render: Any = render_jinja_template
    template = with_parts(tokenizer, "<|image|>")

    def text(messages: list[dict[str, Any]], of: str) -> str:
        return render([messages], chat_template=of, add_generation_prompt=True)[0][0]

    parts = conversation("x.png", "what", "red", "how", system="be")
    plain = [{**m, "content": "".join(p.get("text", "<|image|>") for p in m["content"])} for m in parts]
    assert text(parts, template) == text(plain, template) == text(plain, tokenizer.get_chat_template())
    with pytest.raises(Exception, match="a part of type audio; give image and text"):
        text([{"role": "user", "content": [{"type": "audio"}]}], template)
