"""Published models, taken apart into runs, against themselves: logits within 1e-4, with several images and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.published.models import MODELS, ONE_SIZE, their_inputs
from tests.published.splitting import imported
from tests.tiny import ONE_TURN, SIZE, TWO_IMAGES, TWO_TURNS, worst
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vlmlab
from vlmlab.contracts.tensors import Batch, Layout, Role
from vlmlab.mask.causal import Causal
from vlmlab.mask.prefix_lm import PrefixLM
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM


def logits(model: VLM, batch: Batch) -> Tensor:
    return model.lm.logits(model.lm.states(model.embed(batch), batch.layout, model.mask))


def up_to_first_answer(batch: Batch) -> Batch:
    """Everything after the first answer counts as answer, as PaliGemma's suffix does."""
    layout = batch.layout
    started = layout.role.eq(Role.ANSWER).cumsum(1) > 0
    return Batch(
        **{
            **batch.__dict__,
            "layout": Layout(**{**layout.__dict__, "role": torch.where(started, int(Role.ANSWER), layout.role)}),
        }
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    folder = MODELS[name]()
    run = imported(folder, tmp_path / "run", image_size=SIZE if name in ONE_SIZE else None)
    loaded = vlmlab.load(run, device="cpu")
    model, theirs = loaded.model, _published(folder)
    loaded.config.collate.pack_length = None
    batch = build_collator(loaded.config, model, "chat")([ONE_TURN, TWO_TURNS, TWO_IMAGES])
    if isinstance(model.mask, PrefixLM):
        batch = up_to_first_answer(batch)
    want = theirs(**their_inputs(theirs, batch)).logits
    valid = batch.layout.valid
    assert worst(logits(model, batch)[valid], want[valid]) < 1e-4 and want[valid].std() > 0.05
    assert isinstance(model.mask, PrefixLM if name == "paligemma" else Causal)
    assert not getattr(model.lm.model.config, "use_bidirectional_attention", None), "the mask says who sees whom"
    blank = Batch(**{**batch.__dict__, "pixels": torch.zeros_like(batch.pixels)})
    assert worst(logits(model, blank)[valid], want[valid]) > 1e-3, "the comparison sees the images"


@torch.no_grad()
def test_generation(tmp_path: Path) -> None:
    """Left-padded prompts of several images: the ids that transformers' own ``generate`` gives."""
    loaded = vlmlab.load(imported(MODELS["llava"](), tmp_path / "run"), device="cpu")
    model, theirs = loaded.model, _published(MODELS["llava"]())
    batch = build_collator(loaded.config, model, "chat").ask([ONE_TURN, TWO_IMAGES])
    given = their_inputs(theirs, batch)
    want = theirs.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=model.lm.stop_ids)
    got = model.lm.generate(model.embed(batch), batch.layout, model.mask, 6)
    assert torch.equal(got, want[:, batch.input_ids.shape[1] :])


def _published(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
