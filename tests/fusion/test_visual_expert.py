"""Visual experts by loops, their size, and what they leave as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ADJACENT, ONE_TURN, SAMPLES, TEXT_ONLY, TWO_IMAGES, collator
from transformers import Phi3Config, Phi3ForCausalLM

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.visual_expert import VisualExpert
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM


def expert(lm: Any = None, **keys: Any) -> VLM:
    return tiny.vlm(mask=Causal(), fusion=VisualExpert(**keys), lm=lm)


def phi3() -> HfLanguageModel:
    """Joined maps to queries, keys and values, and to gate and up."""
    return HfLanguageModel(str(tiny.save_lm(Phi3ForCausalLM(Phi3Config(**tiny.text_config())), "phi3")))


@torch.no_grad()
@pytest.mark.parametrize("last_as_text", [False, True])
def test_each_linear_map_is_the_loop(last_as_text: bool) -> None:
    """Position by position: the copy's weights where the token is visual, the LM's elsewhere."""
    model = expert(last_as_text=last_as_text, layers=[1])
    tiny.spread(model.fusion, seed=4)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ADJACENT, TEXT_ONLY])
    layer, copies, kept = model.lm.model.base_model.layers[1], model.fusion.experts[0], []
    paths = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
             "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
    for name, path in paths.items():
        own = layer.get_submodule(path)
        own.register_forward_hook(lambda m, args, out, name=name: kept.append((name, m, args[0][0], out[0])))
    model(batch)
    layout, visual = batch.layout, []
    for i in range(layout.kind.shape[1]):
        last = i + 1 == layout.kind.shape[1] or int(layout.image[0, i + 1]) != int(layout.image[0, i])
        visual.append(bool(layout.visual[0, i]) and not (last_as_text and last))
    assert sum(visual) == 4 * (15 if last_as_text else 16) and {name for name, *_ in kept} == set(paths)
    for name, own, given, got in kept:
        for i, (x, y) in enumerate(zip(given, got, strict=True)):
            used = copies[name] if visual[i] else own
            want = used.weight @ x + (0 if used.bias is None else used.bias)
            assert tiny.worst(y, want) < 1e-5, (name, i)


@torch.no_grad()
@pytest.mark.parametrize("sublayers", ["both", "attention", "mlp"])
def test_joined_maps_are_copied_too(sublayers: str) -> None:
    model = expert(phi3(), sublayers=sublayers)
    plain = tiny.vlm(mask=Causal(), fusion=ConcatFusion(), lm=phi3())
    batch = collator(model)(SAMPLES)
    assert torch.equal(model(batch).logits, plain(batch).logits)
    names = {"attention": {"qkv", "o"}, "mlp": {"gate_up", "down"}, "both": {"qkv", "o", "gate_up", "down"}}
    assert set(model.fusion.experts[0]) == names[sublayers]
    tiny.spread(model.fusion, seed=1)
    assert tiny.worst(model(batch).logits, plain(batch).logits) > 1e-2


@torch.no_grad()
def test_a_text_is_answered_by_the_language_model_alone() -> None:
    """Whatever the copies have learnt."""
    model = expert()
    want = model(collator(model)([TEXT_ONLY])).logits
    tiny.spread(model.fusion, seed=7)
    assert torch.equal(model(collator(model)([TEXT_ONLY])).logits, want)


def test_parameters_by_hand() -> None:
    """q 32x32, k and v 32x16, with biases in Qwen2; o 32x32; three maps of 32x48; only k and v in the last layer."""
    attention, mlp, last = 2 * 32 * 32 + 32 + 2 * (32 * 16 + 16), 3 * 32 * 48, 2 * (32 * 16 + 16)
    sizes = {"both": 3 * (attention + mlp) + last, "attention": 3 * attention + last, "mlp": 3 * mlp}
    for sublayers, size in sizes.items():
        assert sum(p.numel() for p in expert(sublayers=sublayers).fusion.parameters()) == size
    every = expert(every=2).fusion
    assert sum(p.numel() for p in every.parameters()) == attention + mlp + last
    assert next(iter(every.state_dict())) == "experts.0.q.weight"


def test_the_copies_are_the_fusions_own() -> None:
    model = expert()
    batch = collator(model)([ONE_TURN])
    model.lm.requires_grad_(False)
    outputs = model(batch)
    torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.fusion.parameters())
    assert not {id(p) for p in model.lm.parameters()} & {id(p) for p in model.fusion.parameters()}


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.sublayers=norms is unknown; choose both or attention or mlp"):
        expert(sublayers="norms")
    with pytest.raises(UserError, match=r"fusion.layers=\[4\] names a layer that is not there"):
        expert(layers=[4])
    with pytest.raises(UserError, match=r"the LM's last layer alone reaches no word; name an earlier one"):
        expert(layers=[-1], sublayers="mlp")
