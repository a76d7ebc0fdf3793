"""Two transformers and one attention: against two whole LMs by hand, what stays the text's, and the size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ONE_TURN, TEXT_ONLY, TWO_IMAGES, collator
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.lavi import LaViFusion
from vlmlab.fusion.mixture_of_transformers import MixtureOfTransformers
from vlmlab.fusion.several import SeveralFusion
from vlmlab.mask.memory.before import ImagesBefore
from vlmlab.model.vlm import VLM


def mixed(**keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=MixtureOfTransformers(**keys))


@torch.no_grad()
def test_it_is_two_transformers_with_one_attention() -> None:
    """Every position by the layers of its own LM, one by one, with keys and values of both."""
    model = mixed()
    tiny.spread(model.fusion, seed=4)
    lm, batch = model.lm.model.base_model, collator(model, pack_length=1000)([TWO_IMAGES, ONE_TURN])
    other = copy.deepcopy(tiny.vlm().lm.model.base_model)  # the visual tokens' LM
    for layer, made in zip(other.layers, model.fusion.copies, strict=True):
        for name, part in made.items():
            path = {"norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm", "mlp": "mlp"}
            into = path.get(name) or f"self_attn.{name.removeprefix('linear_')}_proj"
            layer.get_submodule(into).load_state_dict(part.state_dict())
    x, visual = model.embed(batch)[0], batch.layout.visual[0]
    allowed = model.mask(batch.layout, torch.arange(len(x)))[0]
    rotation = lm.rotary_emb(x, batch.layout.position)

    def of_own(module: str, k: int, states: torch.Tensor) -> torch.Tensor:
        text, image = (each.layers[k].get_submodule(module) for each in (lm, other))
        return torch.stack([(image if v else text)(s[None])[0] for s, v in zip(states, visual, strict=True)])

    for k in range(len(lm.layers)):
        y = of_own("input_layernorm", k, x)
        q, key, v = (of_own(f"self_attn.{n}_proj", k, y).unflatten(-1, (-1, 8)).transpose(0, 1)[None] for n in "qkv")
        q, key = apply_rotary_pos_emb(q, key, *rotation)
        key, v = (t.repeat_interleave(2, 1) for t in (key, v))
        out = F.scaled_dot_product_attention(q, key, v, attn_mask=allowed[None, None])[0].transpose(0, 1).flatten(1)
        x = x + of_own("self_attn.o_proj", k, out)
        x = x + of_own("mlp", k, of_own("post_attention_layernorm", k, x))
    want = lm.norm(x)[~visual]
    assert tiny.worst(model(batch).states[0][~visual], want) < 1e-5


@torch.no_grad()
def test_text_alone_is_the_lms_whatever_the_copies_learnt() -> None:
    model = mixed()
    batch = collator(model)([TEXT_ONLY])
    before = model(batch).logits
    tiny.spread(model.fusion, seed=4)
    assert torch.equal(model(batch).logits, before)


def test_parameters_by_hand() -> None:
    attention = 2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16  # q, k, v have biases
    last = 2 * 32 * 16 + 2 * 16
    want = {
        ("attention",): 3 * attention + last,
        ("mlp",): 3 * 3 * 32 * 48,
        ("norms",): 3 * 2 * 32 + 32,
        ("attention", "mlp", "norms"): 3 * (attention + 3 * 32 * 48 + 64) + last + 32,
    }
    for untied, size in want.items():
        assert sum(p.numel() for p in mixed(untied=untied).fusion.parameters()) == size


@torch.no_grad()
def test_a_copy_of_what_has_ports_has_none() -> None:
    """LaVi's norms beside it: the copy of a norm is a norm alone."""
    torch.manual_seed(0)
    parts = {"norms": LaViFusion(ImagesBefore(), every=1), "own": MixtureOfTransformers()}
    model = tiny.vlm(fusion=SeveralFusion(parts))
    twin = tiny.vlm(fusion=ConcatFusion())
    for batch in (collator(model)([ONE_TURN, TWO_IMAGES]), collator(model)([TEXT_ONLY])):
        assert tiny.worst(model(batch).logits, twin(batch).logits) < 1e-5


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.untied=heads is unknown; choose attention or mlp or norms"):
        mixed(untied=["heads"])
    with pytest.raises(UserError, match=r"fusion.untied=\[mlp\] in the LM's last layer alone reaches no word"):
        mixed(untied=["mlp"], layers=[3])
