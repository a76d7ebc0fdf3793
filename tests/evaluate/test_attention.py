"""What an answer looks at: the weights are those of the forward pass, and where there are none a sentence says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.test_conf import composed
from tests.tiny import ADJACENT, ONE_TURN, TEXT_ONLY, collator

from vlmlab.contracts.tensors import Memory
from vlmlab.contracts.watch import Watch
from vlmlab.encoder.hf import HfEncoder
from vlmlab.evaluate.attention import CROSS, SELF, attention
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.lm.inside import attend, look
from vlmlab.lm.masking import within
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.vlm import VLM


def built(*words: str, lm: Any = tiny.qwen2, sample: Any = ONE_TURN) -> Any:
    """What the answer looks at, of tiny towers with a fusion whose weights are as after training."""
    torch.manual_seed(0)
    fusion = instantiate(composed(*words).fusion) if words else ConcatFusion()
    language = HfLanguageModel(str(lm()))
    if fusion.reads == "nothing":
        model = VLM(None, None, fusion, language, Bidirectional()).eval()
    else:
        encoder = HfEncoder(str(tiny.siglip()), layers=[-2])
        connector = tiny.spread(tiny.MlpConnector(encoder.width, language.width), seed=1)
        model = VLM(encoder, connector, fusion, language, Bidirectional()).eval()
    tiny.spread(model.fusion, seed=3, scale=0.2)
    return model, collator(model)([sample])


@pytest.mark.parametrize("lm", [tiny.qwen2, tiny.gemma3])
@torch.no_grad()
def test_the_weights_are_those_that_transformers_computes(lm: Any) -> None:
    model, batch = built(lm=lm)
    found = attention(model, batch)
    q, config = torch.arange(batch.input_ids.shape[1]), model.lm.model.config
    allowed, kinds = model.mask(batch.layout, q), {*(getattr(config, "layer_types", None) or ["full_attention"])}
    closed = {}
    for kind in kinds:
        shown = within(allowed, batch.layout, q, config.sliding_window if kind == "sliding_attention" else None)
        closed[kind] = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)[:, None]
    model.lm.model.set_attn_implementation("eager")
    asked = {"attention_mask": closed if len(kinds) > 1 else closed["full_attention"]}
    out = model.lm.model.base_model(
        inputs_embeds=model.embed(batch), position_ids=batch.layout.position, use_cache=False,
        output_attentions=True, **asked,
    )  # fmt: skip
    predicts = (batch.labels[0, 1:] != -100).nonzero()[:, 0]
    wanted = torch.stack([w[0].mean(0)[predicts][:, batch.layout.visual[0]] for w in out.attentions])
    assert found.maps[SELF].shape == (*wanted.shape[:2], 1, model.tokens_per_image) and found.grid == (4, 4)
    torch.testing.assert_close(torch.from_numpy(found.maps[SELF][:, :, 0]), wanted, atol=1e-5, rtol=1e-4)
    assert len(found.tokens) == len(found.probabilities) == len(predicts)


@torch.no_grad()
def test_the_weights_times_the_values_are_what_attention_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 if x == "q" else 1, 7, 4, generator=generator)[None] for x in "qkv")
    watch = Watch(torch.tensor([2, 5, 6]))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    told, _ = attend(module, q, k, v, None, watch=watch)  # (1, 7, 2, 4)
    torch.testing.assert_close(watch.own[0] @ v[0], told[0, watch.queries].transpose(0, 1))
    assert watch.own[0][:, 0, 3:].abs().max() == 0  # causal
    sees = torch.ones(1, 7, 2, dtype=torch.bool)
    sees[:, :3] = False
    memory = Memory({}, sees, torch.tensor([[0, 1]]), watch=watch)
    keys, values = (torch.randn(2, 3, 2, 4, generator=generator) for _ in range(2))
    told = look(q.transpose(1, 2), keys, values, memory).unflatten(-1, (2, 4))  # (1, 7, 2, 4)
    flat = values.flatten(0, 1).transpose(0, 1)  # (H, J * M, dh)
    torch.testing.assert_close(watch.images[0] @ flat, told[0, watch.queries].transpose(0, 1))
    assert watch.images[0][:, 0].abs().max() == 0 and watch.images[0].shape == (2, 3, 6)


def test_keys_of_a_picture_in_front_of_the_layers_own_share_one_softmax_with_them() -> None:
    model, batch = built("fusion=prefix", "fusion.gate=none")
    watch = Watch((batch.labels[0, 1:] != -100).nonzero()[:, 0])
    model(batch, watch=watch)
    assert len(watch.images) == len(watch.own) == len(model.fusion.blocks)
    for own, images in zip(watch.own, watch.images, strict=True):
        torch.testing.assert_close(own.sum(-1) + images.sum(-1), torch.ones(own.shape[:2]))
        assert images.min() > 0 and own[:, 0, watch.queries[0] + 1 :].abs().max() == 0
    assert attention(model, batch).maps[CROSS].shape[-2:] == (1, 16)


def test_what_takes_its_share_of_the_softmax_and_is_no_token_stands_in_front() -> None:
    model, batch = built("fusion=moda", "fusion.pseudo=score")
    watch = Watch((batch.labels[0, 1:] != -100).nonzero()[:, 0])
    model(batch, watch=watch)
    for own in watch.own:
        assert own.shape[-1] == batch.input_ids.shape[1] and own.sum(-1).max() < 1
        assert own[:, 0, watch.queries[0] + 1 :].abs().max() == 0  # a column too far would be in the future


@pytest.mark.parametrize(
    ("words", "sample", "said"),
    [
        (("fusion=none",), ONE_TURN, "reads no images"),
        ((), TEXT_ONLY, "No image was given"),
        (("fusion=lavi", "fusion.conditioner=mlp"), ONE_TURN, "without attention to visual tokens (LaViFusion)"),
        (("fusion=vlora",), ONE_TURN, "without attention to visual tokens"),
    ],
)
def test_where_nothing_looks_at_a_picture_a_sentence_says_why(words: Any, sample: Any, said: str) -> None:
    found = attention(*built(*words, sample=sample))
    assert not found.maps and said in found.why_none, found.why_none
    assert all(0 < p <= 1 for p in found.probabilities)


def test_two_pictures_have_a_map_each() -> None:
    found = attention(*built(sample=ADJACENT))
    assert found.maps[SELF].shape[2:] == (2, 16) and len(found.pictures) == 2
    assert (found.maps[SELF].sum((-1, -2)) < 1).all()
