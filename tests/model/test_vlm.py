"""The composition: every choice builds, loads what it saved, and the parts are named for what they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tests import tiny
from tests.test_conf import composed
from tests.tiny import (
    ADJACENT,
    ONE_TURN,
    SAMPLES,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    choices,
    collator,
    qwen2,
    siglip,
    spread,
    tokenizer,
    two_towers,
    vlm,
    worst,
)

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Seen
from vlmlab.encoder.hf import HfEncoder
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.causal import Causal
from vlmlab.model.build import build_dual_encoder, build_model
from vlmlab.model.dual import DualEncoder
from vlmlab.model.vlm import VLM

GROUPS = ("mask", "lm", "encoder", "connector", "fusion", "adapter", "objective")


def config(**groups: str) -> DictConfig:
    """What composition gives, with the tiny towers in place of real ones."""
    chosen = {"encoder": "hf", "connector": "mlp", "lm": "hf", "mask": "bidir", "fusion": "concat", **groups}
    conf = choices("mask")[0].parent.parent
    cfg = OmegaConf.create({group: tiny.loaded(conf / group / f"{name}.yaml") for group, name in chosen.items()})
    cfg.fusion = composed(f"fusion={chosen['fusion']}").fusion  # some are filled from another group
    cfg.collate = {"max_length": 512, "pack_length": None}
    tower = two_towers() if chosen["fusion"].startswith("emma") else siglip()
    for group, path in (("encoder", tower), ("lm", qwen2())):
        if "path" in list(cfg[group]):  # `in` alone counts a mandatory value as absent
            cfg[group].path = str(path)
    if chosen["lm"] == "scratch":
        cfg.lm.update({"text": {"_target_": "tests.model.test_vlm.Text"}, "hidden_size": 32, "num_attention_heads": 4})
        cfg.lm.update({"num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 320})
    return cfg


class Text:
    """A data set of text for ``lm=scratch``."""

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Any:
        return SAMPLES[index]


CASES = [(group, path.stem) for group in GROUPS for path in choices(group)]


@pytest.mark.parametrize(("group", "name"), CASES, ids=str)
def test_every_choice_builds_and_runs(group: str, name: str) -> None:
    if name == "visual_rows_open":
        with pytest.raises(UserError, match="leaks"):
            build_model(config(mask=name))
        return
    if group == "objective":
        assert instantiate(config(objective=name).objective).weight > 0
        return
    cfg = config(**{group: name})
    model = build_model(cfg).eval()
    if group == "adapter":
        model.set_adapter(instantiate(cfg.adapter))
    batch = collator(model)([ONE_TURN, TWO_IMAGES, TEXT_ONLY])
    out = model(batch)
    assert out.logits.shape == (batch.supervised, model.lm.model.get_input_embeddings().num_embeddings)
    assert torch.isfinite(out.logits).all()
    assert len(model.generate(collator(model).ask([ONE_TURN, TWO_IMAGES]), 3)) == 2


@pytest.mark.parametrize("adapter", [p.stem for p in choices("adapter")])
@pytest.mark.parametrize("connector", [p.stem for p in choices("connector")])
@torch.no_grad()
def test_saved_weights_give_the_same_logits(connector: str, adapter: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    cfg = config(connector=connector, adapter=adapter)
    models = []
    for _ in range(2):
        model = build_model(cfg).eval()
        model.set_adapter(instantiate(cfg.adapter))
        models.append(model.eval())
    spread(models[0], seed=5)
    batch = collator(models[0])([ONE_TURN, TWO_TURNS, ADJACENT])
    want = models[0](batch).logits
    assert worst(models[1](batch).logits, want) > 1e-3
    save_model(models[0], str(tmp_path / "model.safetensors"))
    missing, unexpected = load_model(models[1], str(tmp_path / "model.safetensors"))
    assert not missing and not unexpected
    assert torch.equal(models[1](batch).logits, want)


def test_parts() -> None:
    model = vlm()
    parts = model.parts()
    assert set(parts) == {"encoder", "connector", "lm"}
    names = [name for named in parts.values() for name, _ in named]
    assert len(names) == len(set(names)) and set(names) == {name for name, _ in model.named_parameters()}
    assert sum(p.numel() for _, p in parts["connector"]) == sum(p.numel() for p in model.connector.parameters())
    assert set(model.sourced()) == {"encoder", "lm"}


def test_forward_takes_only_the_supervised_positions() -> None:
    model = vlm()
    batch = collator(model)(SAMPLES)
    out = model(batch)
    embeds = model.embed(batch)
    whole = model.lm.logits(model.lm.states(embeds, batch.layout, model.mask))
    row, at = batch.labels[:, 1:].ne(-100).nonzero(as_tuple=True)
    assert torch.equal(out.targets, batch.labels[row, at + 1])
    assert worst(out.logits, whole[row, at]) < 1e-5
    assert out.seen.visual is not None and out.seen.tokens is not None
    assert out.seen.tokens.shape == (len(batch.pixels), 16, 32)


def test_the_mask_of_a_call_and_of_a_stage() -> None:
    model = vlm()
    batch = collator(model)([ONE_TURN])
    bidir, causal = model(batch).logits, model(batch, Causal()).logits
    assert worst(bidir, causal) > 1e-3
    model.set_mask(Causal())
    assert torch.equal(model(batch).logits, causal)


def test_a_batch_without_images_is_text_alone() -> None:
    """No tower runs; the training step, not the model, joins ranks that saw an image with ranks that did not."""
    model = vlm().train()
    batch = collator(model)([TEXT_ONLY])
    out = model(batch)
    assert out.seen == Seen()
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.lm.parameters())
    assert all(p.grad is None for part in (model.encoder, model.connector) for p in part.parameters())


def test_generated_text_has_no_special_tokens() -> None:
    texts = vlm().generate(collator(vlm()).ask([ONE_TURN, TWO_IMAGES]), 6)
    assert len(texts) == 2 and not any("<|" in text for text in texts) and all(t == t.strip() for t in texts)


# -- the dual encoder --------------------------------------------------------------------------------------------------


def dual() -> DualEncoder:
    encoder, lm = HfEncoder(str(siglip()), pooled=True), HfLanguageModel(str(qwen2()))
    parts = vlm(encoder=encoder, lm=lm)
    return DualEncoder(encoder, parts.connector, parts.fusion, lm, parts.mask, width=8).eval()


@torch.no_grad()
def test_the_text_side_reads_the_caption_alone() -> None:
    model = dual()
    batch = collator(model, "plain")([ONE_TURN, TWO_TURNS])
    out = model(batch)
    caption = [tokenizer()(t + "<|im_end|>")["input_ids"] for t in ("two green squares", "red blue")]
    want = [model.lm.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in caption]
    assert worst(model.text_state(batch), torch.stack(want)) < 1e-5
    assert out.pairing is not None
    assert torch.allclose(out.pairing.text.norm(dim=-1), torch.ones(2))
    assert abs(float(out.pairing.log_scale.exp()) - 10) < 1e-5 and float(out.pairing.bias) == -10
    other = copy.copy(batch)
    assert torch.equal(model.text_state(other), model.text_state(batch))


def test_the_dual_encoder_needs_one_image_a_row() -> None:
    model = dual()
    with pytest.raises(UserError, match="one image a row"):
        model(collator(model, "plain")([ONE_TURN, ADJACENT]))
    assert set(model.parts()) == {"encoder", "connector", "lm", "pair"}


def test_every_part_of_the_dual_encoder_has_a_gradient() -> None:
    from vlmlab.objective.lm import LanguageModelling
    from vlmlab.objective.siglip import Siglip

    cfg = config(encoder="scratch", lm="scratch")
    model = build_dual_encoder(cfg).train()
    batch = collator(model, "plain")([ONE_TURN, TWO_TURNS])
    out = model(batch)
    sum(v for o in (LanguageModelling(), Siglip()) for v, _ in o(out, batch).values()).backward()
    assert [n for named in model.parts().values() for n, p in named if p.grad is None] == []


def test_no_fusion_builds_no_vision() -> None:
    model: VLM = build_model(config(fusion="none"))
    assert model.encoder is None and model.connector is None and set(model.parts()) == {"lm"}
