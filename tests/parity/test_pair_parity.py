"""A pair of towers equals transformers' CLIPModel and SiglipModel on the same folder: tokens, pooling, head, logits."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import PATCH, SIZE, VISION, picture, root, spread, tokenizer, worst
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.hf_text import HfPairText
from vlmlab.engine.pair import PairCollator
from vlmlab.model.pair import PairedTowers
from vlmlab.objective.clip import Clip
from vlmlab.objective.siglip import Siglip

CONTEXT = 12
TEXTS = ["what colour is the big round thing", "red", "", "two green squares " * 9]
KINDS = ("clip", "clip_first", "siglip")
"""CLIP with its end token in the config, CLIP as the first checkpoints have it (``eos_token_id: 2``), and SigLIP."""


def family_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words framed and padded as the family has them; the first CLIPs' end token has the highest id of all."""
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, padding_side="right")
    end = {"clip": "<|endoftext|>", "clip_first": "<|last|>", "siglip": "<|im_end|>"}[kind]
    own.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": end, "pad_token": end})
    frame = f"$A {end}" if kind == "siglip" else f"<|im_start|> $A {end}"
    tokens = [(token, own.convert_tokens_to_ids(token)) for token in ("<|im_start|>", end)]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=tokens)
    return own


@cache
def folder(kind: str) -> Path:
    """A random checkpoint of both towers with tokenizer and preprocessing."""
    own = family_tokenizer(kind)
    text = {"vocab_size": len(own), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": own.bos_token_id,
            "eos_token_id": 2 if kind == "clip_first" else own.eos_token_id, "pad_token_id": 1}  # fmt: skip
    if kind == "siglip":
        text |= {"projection_size": VISION["hidden_size"]}
        model: PreTrainedModel = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    spread(model)
    place = root() / f"pair_{kind}"
    model.save_pretrained(place)
    own.save_pretrained(place)
    size = {"size": {"height": SIZE, "width": SIZE}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (place / "preprocessor_config.json").write_text(json.dumps(size))
    return place


def direct(kind: str) -> Any:
    return (SiglipModel if kind == "siglip" else CLIPModel).from_pretrained(folder(kind)).eval()


def pair(kind: str, **keys: Any) -> PairedTowers:
    torch.manual_seed(0)
    encoder = HfEncoder(str(folder(kind)), pooled=True)
    return PairedTowers(encoder, HfPairText(str(folder(kind)), **keys)).eval()


def batch_of(model: PairedTowers, texts: list[str]) -> Any:
    samples = [Sample(str(i), (picture(i),), (Turn("", text),)) for i, text in enumerate(texts)]
    assert model.encoder is not None
    return PairCollator(model.encoder.preprocess, model.lm.tokenise, model.lm.pad)(samples)


def theirs(kind: str, model: Any, batch: Any) -> Any:
    own = AutoTokenizer.from_pretrained(folder(kind))
    ids = own(TEXTS, truncation=True, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]
    pixels = (batch.pixels.float() / 255 - 0.5) / 0.5
    return model(input_ids=ids, pixel_values=pixels, **({} if kind == "siglip" else {"return_loss": True}))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers(kind: str) -> None:
    ours, model = pair(kind), direct(kind)
    batch = batch_of(ours, TEXTS)
    want = theirs(kind, model, batch)
    outputs = ours(batch)
    found = outputs.pairing
    logits = found.log_scale.exp() * found.image @ found.text.T + found.bias
    assert worst(logits, want.logits_per_image) <= 1e-5
    assert worst(found.image, want.image_embeds) <= 1e-5 and worst(found.text, want.text_embeds) <= 1e-5
    assert worst(ours.embed_texts(TEXTS), want.text_embeds) <= 1e-5
    assert worst(ours.embed_images([picture(i) for i in range(4)]), want.image_embeds) <= 1e-5
    if kind == "siglip":
        total, count = Siglip()(outputs, batch)["siglip"]
        signs = 2 * torch.eye(4) - 1
        assert worst(total / count, -F.logsigmoid(signs * want.logits_per_image).sum() / 4) <= 1e-5
    else:
        total, count = Clip(largest=1e9)(outputs, batch)["clip"]
        assert worst(total / count, want.loss) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_each_convention_pools_where_the_text_ends(kind: str) -> None:
    """CLIP's pooled text depends on nothing after the end token, SigLIP's is at the last position."""
    tower = pair(kind).lm
    ids = tower.tokenise(["red", "blue"])
    with torch.no_grad():
        read = tower(ids)
        end = (read.valid.sum(1) - 1).tolist()
        if kind == "siglip":
            assert worst(tower.model.head(read.states[:, -1]), read.pooled) <= 1e-6  # type: ignore[operator]
        else:
            assert worst(read.states[torch.arange(2), torch.tensor(end)], read.pooled) <= 1e-6
    assert read.valid.tolist() == (ids >= 0).tolist()


def test_a_pair_of_one_checkpoint_trains_all_of_it_and_nothing_else() -> None:
    ours = pair("clip").train()
    batch = batch_of(ours, TEXTS)
    total, count = Clip()(ours(batch), batch)["clip"]
    (total / count).backward()
    parts = ours.parts()
    assert set(parts) == {"encoder", "lm", "pair"}
    assert {name for name, _ in parts["pair"]} == {"pair.image.weight", "pair.text.weight", "pair.log_scale"}
    assert all(p.grad is not None for named in parts.values() for _, p in named)
    whole = sum(p.numel() for p in direct("clip").parameters())
    assert sum(p.numel() for named in parts.values() for _, p in named) == whole
    assert set(ours.sourced()) == {"encoder", "lm", "pair"} and len(set(ours.sourced().values())) == 1


def test_a_new_head_and_widths_that_do_not_fit() -> None:
    torch.manual_seed(0)
    encoder, text = HfEncoder(str(folder("clip")), pooled=True), HfPairText(str(folder("clip")), head=False)
    new = PairedTowers(encoder, text, width=8, scale=1 / 0.07, bias=None)
    assert new.pair.image.weight.shape == (8, 32) and new.pair.text.weight.shape == (8, 24)  # type: ignore[union-attr]
    assert new.pair.log_scale.exp().item() == pytest.approx(1 / 0.07) and new.pair.bias is None
    assert "pair" not in new.sourced()
    with pytest.raises(UserError, match=r"dual_encoder\.width=null compares an image of width 32 with a text of"):
        PairedTowers(encoder, text)
    wide: Any = HfEncoder(str(folder("clip")), pooled=True)
    wide.pooled_width = 40
    for kind in ("clip", "siglip"):
        with pytest.raises(UserError, match=r"text_tower\.head=true: .* gives 40; give the encoder the same path"):
            PairedTowers(wide, HfPairText(str(folder(kind))))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    shutil.copy(folder("clip") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"text_tower\.path=.* no weights in safetensors"):
        HfPairText(str(tmp_path))


def test_half_precision_gives_single() -> None:
    read = HfPairText(str(folder("siglip")), dtype="bfloat16")
    found = read(read.tokenise(TEXTS))
    assert found.pooled.dtype == found.states.dtype == torch.float32
    assert PATCH < SIZE and isinstance(found.valid, Tensor)
