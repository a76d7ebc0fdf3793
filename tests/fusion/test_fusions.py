"""Every fusion keeps its word: what it starts as, how many tokens it takes, and where they go."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.tiny import ADJACENT, ONE_TURN, SAMPLES, TWO_IMAGES, choices, collator, qwen2, vlm
from torch import Tensor

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.tensors import Batch
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.none import NoFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.vlm import VLM

FUSIONS = choices("fusion")


def compose(fusion: torch.nn.Module) -> VLM:
    if fusion.reads == "nothing":
        return VLM(None, None, fusion, HfLanguageModel(str(qwen2())), Bidirectional()).eval()
    return vlm(fusion=fusion)


@pytest.mark.parametrize("path", FUSIONS, ids=lambda p: p.stem)
def test_declarations(path: object) -> None:
    fusion = instantiate(OmegaConf.load(path))
    assert fusion.reads in ("features", "tokens", "nothing")
    assert isinstance(fusion.in_sequence, bool)
    assert fusion.starts_as in ("text_only", "concat", "nothing")
    model = compose(fusion)
    batch = collator(model)(SAMPLES)
    assert bool(batch.layout.visual.any()) == fusion.in_sequence == (model.tokens_per_image > 0)


def reference(batch: Batch, model: VLM) -> Tensor:
    """Logits of what the fusion says it starts as, from parts that know nothing of it."""
    twin = compose(ConcatFusion() if model.fusion.starts_as == "concat" else NoFusion())
    return twin(collator(twin)(SAMPLES)).logits


@pytest.mark.parametrize("path", FUSIONS, ids=lambda p: p.stem)
@torch.no_grad()
def test_every_fusion_starts_as_it_says(path: object) -> None:
    fusion = instantiate(OmegaConf.load(path))
    if fusion.starts_as == "nothing":
        assert "nothing" in (type(fusion).__doc__ or ""), "the docstring gives the reason"
        return
    model = compose(fusion)
    batch = collator(model)(SAMPLES)
    assert torch.equal(model(batch).logits, reference(batch, model))


@pytest.mark.parametrize("path", FUSIONS, ids=lambda p: p.stem)
@torch.no_grad()
def test_with_no_image_every_fusion_is_the_language_model(path: object) -> None:
    model = compose(instantiate(OmegaConf.load(path)))
    text = [s for s in SAMPLES if not s.images]
    batch = collator(model)(text)
    lm = HfLanguageModel(str(qwen2())).eval()
    want = lm.model(input_ids=batch.input_ids, attention_mask=batch.layout.valid.long()).logits
    assert torch.equal(model(batch).logits, want[:, :-1][batch.labels[:, 1:] != -100])


@torch.no_grad()
def test_concat_puts_every_token_in_its_place() -> None:
    model = vlm()
    for pack_length in (None, 400):
        batch = collator(model, pack_length=pack_length)([TWO_IMAGES, ONE_TURN, ADJACENT])
        embeds, _, tokens = model.embed(batch)
        plain = model.lm.embed(batch.input_ids)
        start = 0
        for row in range(len(batch.input_ids)):
            here = batch.image_row.eq(row).nonzero()[:, 0]
            for image, index in enumerate(here.tolist()):
                at = batch.layout.image[row].eq(image)
                assert int(at.sum()) == 16 and torch.equal(embeds[row, at], tokens[index])
                start += 1
            rest = ~batch.layout.visual[row]
            assert torch.equal(embeds[row, rest], plain[row, rest])
        assert start == len(batch.pixels) == 5


def test_too_few_positions_are_refused_with_the_samples() -> None:
    model = vlm()
    batch = collator(model)([ONE_TURN, TWO_IMAGES])
    tokens = torch.zeros(2, 16, 32)
    with pytest.raises(DataError, match=r"one.*images.*48 image positions for 2 x 16"):
        model.fusion(tokens, model.lm.embed(batch.input_ids), batch)
