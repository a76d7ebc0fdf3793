"""Learnt keys and values before those of the text: peft's mathematics, and a plain loop."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from tests.fusion.test_fusions import built
from tests.lm.test_hf import asked, cache_free
from tests.tiny import batches, gemma3, llama, qwen2, vlm, worst

from vlmlab.adapter.base import switch
from vlmlab.adapter.prefix_tuning import Prefix, PrefixLayer, PrefixTuningAdapter
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Layout
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal

P = 3


@pytest.mark.parametrize("tower", [qwen2, llama], ids=lambda t: t.__name__)
@torch.no_grad()
def test_it_is_pefts_on_copied_weights(tower: object) -> None:
    """Whose text has its positions after those of the prefix."""
    lm = HfLanguageModel(str(tower())).eval()  # type: ignore[operator]
    base = copy.deepcopy(lm.model)
    base.set_attn_implementation("eager")
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = get_peft_model(base, config).eval()
    table = theirs.prompt_encoder["default"].embedding.weight  # (P, layers * 2 * G * dh)
    switch(PrefixTuningAdapter(length=P).wrap(lm.model), "default")
    layers = [module for module in lm.model.modules() if isinstance(module, PrefixLayer)]
    groups, _, head = layers[0].adapters["default"].keys.shape
    parts = table.view(P, 2 * len(layers), groups, head).permute(1, 2, 0, 3)  # (layers * 2, G, P, dh)
    for k, layer in enumerate(layers):
        layer.adapters["default"].keys.copy_(parts[2 * k])
        layer.adapters["default"].values.copy_(parts[2 * k + 1])
    ids = torch.randint(10, 200, (2, 7))
    layout = Layout.of_text(torch.ones_like(ids, dtype=torch.bool))
    shifted = Layout(**{**vars(layout), "position": layout.position + P})
    want = theirs(input_ids=ids).logits
    got = lm.logits(lm.states(lm.embed(ids), shifted, Causal()))
    assert worst(got, want) < 1e-4
    assert worst(lm.logits(lm.states(lm.embed(ids), layout, Causal())), want) > 1e-4


@pytest.mark.parametrize("gate", ["none", "zero"])
@torch.no_grad()
def test_by_hand(gate: str) -> None:
    torch.manual_seed(0)
    heads, groups, head, count, keys = 4, 2, 5, 3, 6
    own = Prefix(P, groups, head, heads if gate == "zero" else 0)
    for parameter in own.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    query, key, value = (torch.randn(2, h, n, head) for h, n in ((heads, count), (groups, keys), (groups, keys)))
    mask = torch.rand(2, 1, count, keys) < 0.5
    mask[..., 0] = True

    def attend(q, k, v, allowed):  # type: ignore[no-untyped-def]
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        scores = (0.3 * q @ k.mT).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    found = own(attend, 0.3, query, key, value, mask)  # (B, Q, H, dh)
    for b in range(2):
        for h in range(heads):
            g = h // (heads // groups)
            for q in range(count):
                text = [k for k in range(keys) if mask[b, 0, q, k]]
                scores = [0.3 * query[b, h, q] @ key[b, g, k] for k in text]
                learnt = [0.3 * query[b, h, q] @ own.keys[g, p] for p in range(P)]
                if gate == "none":
                    shares = torch.stack([*learnt, *scores]).softmax(0)
                    want = shares @ torch.stack([*own.values[g], *(value[b, g, k] for k in text)])
                else:
                    want = torch.stack(scores).softmax(0) @ torch.stack([value[b, g, k] for k in text])
                    want = want + own.gate[h].tanh() * torch.stack(learnt).softmax(0) @ own.values[g]
                assert worst(found[b, q, h], want) < 1e-5


@pytest.mark.parametrize("tower", [qwen2, gemma3], ids=lambda t: t.__name__)
@torch.no_grad()
def test_cached_decoding_equals_full_forwards_without_a_gate(tower: object) -> None:
    model = vlm(lm=HfLanguageModel(str(tower())))  # type: ignore[operator]
    model.set_adapter(PrefixTuningAdapter(length=P))
    for _, parameter in model.parts()["lm"]:
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = asked(model.eval())
    want, lead = cache_free(model, batch, 6)
    assert lead > 1e-5
    arguments = (model.embed(batch), batch.layout, model.mask, 6, model.inside(batch, model.see(batch)))
    assert model.lm.generate(*arguments, eos_token_id=-1).tolist() == want.tolist()


@torch.no_grad()
def test_without_a_gate_it_starts_as_nothing_else_and_padding_changes_nothing() -> None:
    lm = HfLanguageModel(str(qwen2())).eval()
    batch = batches()["right padding"]
    real = batch.layout.valid
    before = lm.states(lm.embed(batch.input_ids), batch.layout, Bidirectional())
    switch(PrefixTuningAdapter(length=P).wrap(lm.model), "default")
    after = lm.states(lm.embed(batch.input_ids), batch.layout, Bidirectional())
    assert torch.isfinite(after[real]).all() and worst(before[real], after[real]) > 1e-5
    wider = batch.layout.extended(real.shape[1] + 2)
    wider = replace(wider, kind=wider.kind.index_fill(1, torch.tensor([-2, -1]) + wider.kind.shape[1], 0))
    more = torch.nn.functional.pad(batch.input_ids, (0, 2))
    assert worst(lm.states(lm.embed(more), wider, Bidirectional())[:, :-2][real], after[real]) < 1e-5


def test_what_cannot_have_it_is_refused() -> None:
    with pytest.raises(UserError, match="prefixes go into the LM"):
        PrefixTuningAdapter(parts=["encoder"])
    with pytest.raises(UserError, match="choose none or zero"):
        PrefixTuningAdapter(gate="one")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="use adapter=lora, or another fusion"):
        built("composite").set_adapter(PrefixTuningAdapter())
