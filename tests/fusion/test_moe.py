"""Experts by loops and against transformers' Mixtral; what they drop, what balances them, and what no longer trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ADJACENT, ONE_TURN, TEXT_ONLY, TWO_IMAGES, collator
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch
from vlmlab.fusion.base import beside
from vlmlab.fusion.moe import Experts, MixtureOfExperts, kept
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.model.vlm import VLM
from vlmlab.objective.balance import ExpertBalance


def mixed(lm: Any = None, **keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=MixtureOfExperts(**keys), lm=lm)


def batch_of(model: VLM, pack_length: int | None = None) -> Batch:
    return collator(model, pack_length=pack_length)([TWO_IMAGES, ADJACENT, ONE_TURN, TEXT_ONLY])


def block_and_states(seed: int = 3, **keys: Any) -> tuple[VLM, Batch, Experts, torch.Tensor]:
    model = mixed(**keys)
    tiny.spread(model.fusion, seed=seed, scale=0.3)
    batch, block = batch_of(model), model.fusion.blocks[0]
    assert isinstance(block, Experts)
    return model, batch, block, torch.randn(*batch.input_ids.shape, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top", [1, 2, 3])
@torch.no_grad()
def test_a_block_is_the_loop(top: int) -> None:
    _, batch, block, x = block_and_states(top=top)
    memory = beside(batch)
    got = block(x, None, layout=batch.layout, memory=memory)
    for t in range(0, x.shape[1], 3):
        p = (block.router.weight @ x[0, t]).softmax(0)
        assert tiny.worst(memory.notes["router"][0, t], p) < 1e-6
        likeliest = sorted(range(4), key=lambda i: -float(p[i]))[:top]
        share = sum(float(p[i]) for i in likeliest)
        want = sum(float(p[i]) / share * block.experts[i](x[0, t]) for i in likeliest)
        assert tiny.worst(got[0, t], want) < 1e-5


@torch.no_grad()
def test_a_block_is_mixtrals() -> None:
    _, batch, block, x = block_and_states(top=2)
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config).eval()
    theirs.gate.weight.copy_(block.router.weight)
    experts: Any = block.experts
    theirs.experts.gate_up_proj.copy_(torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts]))
    theirs.experts.down_proj.copy_(torch.stack([e.down_proj.weight for e in experts]))
    assert tiny.worst(block(x, None, layout=batch.layout, memory=beside(batch)), theirs(x)) < 1e-5


def test_capacity_is_the_loop() -> None:
    make = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(3, generator=make)[:2] for _ in range(20)])
    valid = torch.arange(20) < 17
    for capacity, most in ((0.5, 6), (0.1, 4), (1.0, 12)):  # ceil(capacity * 2 * 17 / 3), at least 4
        got, taken = kept(chosen, valid, 3, capacity), [0, 0, 0]
        for choice in (0, 1):
            for t in range(17):
                expert = int(chosen[t, choice])
                assert bool(got[t, choice]) == (taken[expert] < most)
                taken[expert] += 1
        assert not got[17:].any() and not got.all()


@torch.no_grad()
def test_nothing_is_dropped_outside_training() -> None:
    _, batch, block, x = block_and_states(capacity=0.3)
    free = block_and_states()[2]
    given: dict[str, Any] = {"layout": batch.layout, "memory": beside(batch)}
    want = free(x, None, **given)
    assert torch.equal(block.eval()(x, None, **given), want)
    dropped = block.train()(x, None, **given)
    weight, chosen = given["memory"].notes["router"].flatten(0, 1).topk(2)
    stays = kept(chosen, batch.layout.valid.flatten(), 4, 0.3)
    for t, got in enumerate(dropped.flatten(0, 1)):  # what stays shares the weight, and nothing adds nothing
        left = [(float(weight[t, c]), int(chosen[t, c])) for c in (0, 1) if stays[t, c]]
        told = [w / sum(w for w, _ in left) * block.experts[i](x.flatten(0, 1)[t]) for w, i in left]
        assert tiny.worst(got, torch.stack(told).sum(0) if told else torch.zeros(32)) < 1e-5
    assert {0, 1} <= {int(n) for n in stays.sum(1)}


@torch.no_grad()
def test_balance_is_the_loop() -> None:
    model, batch, *_ = block_and_states()
    outputs = model(batch)
    (total, count) = ExpertBalance()(outputs, batch)["balance"]
    want = 0.0
    for key in ("fusion.0", "fusion.1"):
        p, likeliest, mean, number = outputs.memories[key].notes["router"], [0] * 4, torch.zeros(4), 0
        for r, t in batch.layout.valid.nonzero().tolist():
            likeliest[int(p[r, t].argmax())] += 1
            mean, number = mean + p[r, t], number + 1
        want += 4 * sum(likeliest[i] / number * float(mean[i]) / number for i in range(4))
    assert int(count) == number == ExpertBalance().counts(batch)["balance"]
    assert float(total) / number == pytest.approx(want, rel=1e-5)
    even = torch.full((1, 8, 4), 0.25)
    even[0, torch.arange(8), torch.arange(8) % 4] += 1e-6
    outputs.memories["fusion.0"].notes["router"] = outputs.memories["fusion.1"].notes["router"] = even
    text = collator(model)([TEXT_ONLY])
    whole = text.layout.at(torch.arange(8))
    assert float(ExpertBalance()(outputs, _with(text, whole))["balance"][0]) / 8 == pytest.approx(2.0, rel=1e-5)


def _with(batch: Batch, layout: Any) -> Batch:
    return type(batch)(**{**vars(batch), "layout": layout})


def test_recomputed_activations_count_the_balance_once() -> None:
    found = []
    for saving in (False, True):
        model = mixed(lm=HfLanguageModel(str(tiny.qwen2()), gradient_checkpointing=saving))
        tiny.spread(model.fusion, seed=3)
        batch = batch_of(model.train())
        outputs = model(batch)
        total, _ = ExpertBalance()(outputs, batch)["balance"]
        loss = nn.functional.cross_entropy(outputs.logits, outputs.targets) + total
        loss.backward()
        found.append(
            (float(total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (value, want), (again, got) = found
    assert value == again and want.keys() == got.keys()
    assert max(tiny.worst(want[n], got[n]) for n in want) == 0.0 and want["fusion.blocks.0.router.weight"].any()


def test_what_the_experts_stand_for_trains_no_more() -> None:
    model = mixed(every=2)
    trained = {name for name, _ in model.parts()["lm"]}
    every = {f"lm.{name}" for name, _ in model.lm.named_parameters()}
    assert every - trained == {
        f"lm.model.model.layers.{k}.mlp.{m}_proj.weight" for k in (1, 3) for m in ("gate", "up", "down")
    }
    outputs = model(batch_of(model))
    nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    assert {n for n, p in model.named_parameters() if n.startswith("lm.") and p.grad is not None} <= trained
    assert sum(p.numel() for p in model.fusion.parameters()) == 2 * (4 * 3 * 32 * 48 + 4 * 32)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.top=5 is more than fusion.experts=4"):
        mixed(top=5)
    with pytest.raises(UserError, match=r"fusion.experts=0 is not possible"):
        mixed(experts=0)
    model = tiny.vlm()
    batch = batch_of(model)
    with pytest.raises(UserError, match=r"objective=balance reads the router"):
        ExpertBalance()(model(batch), batch)
