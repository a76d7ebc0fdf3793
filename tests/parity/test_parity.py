"""Our compositions against transformers' models with the same random weights, fp32, within 1e-5."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import (
    ONE_TURN,
    SAMPLES,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    VISION,
    batches,
    collator,
    gemma3,
    qwen2,
    root,
    save,
    siglip,
    spread,
    text_config,
    tokenizer,
    vlm,
    worst,
)
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.tensors import Batch
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.none import NoFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM
from vlmlab.objective.lm import LanguageModelling


def llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**text_config()),
        image_token_id=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return spread(LlavaForConditionalGeneration(config), seed=7)


def ours(theirs: LlavaForConditionalGeneration) -> VLM:
    """A VLM from the parts of a LLaVA, saved as two towers."""
    size = (siglip() / "preprocessor_config.json").read_text()
    theirs.model.vision_tower.save_pretrained(root() / "llava-vision")
    (root() / "llava-vision" / "preprocessor_config.json").write_text(size)
    lm = HfLanguageModel(str(qwen2()))
    lm.model.model.load_state_dict(theirs.model.language_model.state_dict())
    lm.model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    encoder = HfEncoder(str(root() / "llava-vision"), layers=[-2])
    connector = MlpConnector(encoder.width, lm.width)
    projector = theirs.model.multi_modal_projector
    connector.layers[0].load_state_dict(projector.linear_1.state_dict())
    connector.layers[2].load_state_dict(projector.linear_2.state_dict())
    return vlm(mask=Causal(), encoder=encoder, connector=connector, lm=lm)


def all_logits(model: VLM, batch: Batch) -> torch.Tensor:
    embeds = model.embed(batch)
    return model.lm.logits(model.lm.states(embeds, batch.layout, model.mask))


@torch.no_grad()
def test_llava() -> None:
    theirs = llava()
    model = ours(theirs)
    batch = collator(model)([ONE_TURN, TWO_TURNS, TWO_IMAGES])
    assert model.lm.image_id == theirs.config.image_token_id
    want = theirs(
        input_ids=batch.input_ids,
        pixel_values=(batch.pixels.float() / 255 - 0.5) / 0.5,
        attention_mask=batch.layout.valid.long(),
    ).logits
    valid = batch.layout.valid
    assert worst(all_logits(model, batch)[valid], want[valid]) < 1e-5
    assert want[valid].std() > 0.1
    model.set_mask(Bidirectional())
    assert worst(all_logits(model, batch)[valid], want[valid]) > 1e-3, "the comparison sees the mask"


@torch.no_grad()
def test_the_loss_is_transformers_own() -> None:
    theirs = llava()
    model = ours(theirs)
    batch = collator(model)([ONE_TURN, TWO_TURNS, TWO_IMAGES])
    want = theirs(
        input_ids=batch.input_ids,
        pixel_values=(batch.pixels.float() / 255 - 0.5) / 0.5,
        attention_mask=batch.layout.valid.long(),
        labels=batch.labels,
    ).loss
    total, count = LanguageModelling()(model(batch), batch)["lm"]
    assert int(count) == batch.supervised == int(batch.labels.ne(-100).sum())
    assert abs(float(total / count - want)) < 1e-5


def gemma_vlm() -> Gemma3ForConditionalGeneration:
    text = {**text_config(head_dim=8, sliding_window=24), "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=16, image_token_index=3)
    return spread(Gemma3ForConditionalGeneration(config), seed=8)


@pytest.mark.parametrize("where", ["one turn", "image in turn two", "image in each turn"])
@torch.no_grad()
def test_gemma3_image_mask(where: str) -> None:
    """Whole-model logits of Gemma-3 with token types equal those under ``bidir``, window included.

    Images of up to a window's length: longer ones see each other beyond the window there, here they do not.
    """
    theirs = gemma_vlm()
    lm = HfLanguageModel(str(gemma3())).eval()
    lm.model.model.load_state_dict(theirs.model.language_model.state_dict())
    lm.model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    batch = batches()[where]
    embeds = lm.embed(batch.input_ids)
    want = theirs(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(batch.input_ids),
        token_type_ids=batch.layout.visual.long(),
    ).logits
    assert worst(lm.logits(lm.states(embeds, batch.layout, Bidirectional())), want) < 1e-5
    assert worst(lm.logits(lm.states(embeds, batch.layout, Causal())), want) > 1e-3, "the comparison sees the mask"


@pytest.mark.parametrize("mask", [Causal(), Bidirectional()], ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_without_fusion_the_lm_is_transformers_bit_for_bit(mask: object) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(qwen2(), dtype=torch.float32).eval()
    model = VLM(None, None, NoFusion(), HfLanguageModel(str(qwen2())), mask).eval()
    assert model.tokens_per_image == 0
    for sample in SAMPLES:
        batch = collator(model)([sample])
        assert batch.pixels.shape[0] == 0 and not batch.layout.visual.any()
        want = theirs(input_ids=batch.input_ids).logits
        assert torch.equal(all_logits(model, batch), want)
        few = want[:, :-1][batch.labels[:, 1:] != -100]  # a product of fewer rows may be another kernel's
        assert worst(model(batch).logits, few) < 2e-6
    batch = collator(model)(SAMPLES)
    padded = theirs(input_ids=batch.input_ids, attention_mask=batch.layout.valid.long()).logits
    valid = batch.layout.valid
    assert torch.equal(all_logits(model, batch)[valid], padded[valid])


@torch.no_grad()
def test_generation_without_fusion_is_transformers() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(qwen2(), dtype=torch.float32).eval()
    model = VLM(None, None, NoFusion(), HfLanguageModel(str(qwen2())), Causal()).eval()
    batch = collator(model).ask([TEXT_ONLY, TWO_TURNS, ONE_TURN])
    mask = batch.layout.valid.long()
    want = theirs.generate(input_ids=batch.input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    want = want[:, batch.input_ids.shape[1] :]
    texts = model.lm.tokenizer.batch_decode(want, skip_special_tokens=True)
    assert model.generate(batch, 8) == [text.strip() for text in texts]


@torch.no_grad()
def test_final_logit_softcapping() -> None:
    """A rule after the head that this package reproduces: Gemma's soft cap."""
    folder = root() / "capped"
    theirs = AutoModelForCausalLM.from_pretrained(gemma3(), dtype=torch.float32)
    theirs.config.final_logit_softcapping = 0.5
    save(theirs, "capped")
    tokenizer().save_pretrained(folder)
    lm = HfLanguageModel(str(folder)).eval()
    batch = batches()["one turn"]
    want = theirs.eval()(input_ids=batch.input_ids).logits
    got = lm.logits(lm.states(lm.embed(batch.input_ids), batch.layout, Causal()))
    assert worst(got, want) < 1e-5 and want.abs().max() <= 0.5


def test_gradients_equal_llavas() -> None:
    theirs = llava()
    model = ours(theirs)
    batch = collator(model)([ONE_TURN, TWO_IMAGES])
    pixels = (batch.pixels.float() / 255 - 0.5) / 0.5
    out = theirs(input_ids=batch.input_ids, pixel_values=pixels, attention_mask=batch.layout.valid.long())
    F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum").backward()
    total, _ = LanguageModelling()(model(batch), batch)["lm"]
    total.backward()
    first, their_first = model.lm.model.model.layers[0], theirs.model.language_model.layers[0]
    pairs = [
        (model.connector.layers[0].weight, theirs.model.multi_modal_projector.linear_1.weight),
        (first.self_attn.q_proj.weight, their_first.self_attn.q_proj.weight),
    ]
    for a, b in pairs:
        assert worst(a.grad, b.grad) < 1e-4 * float(b.grad.abs().max())
