"""Fusions against transformers' own layers, with copied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from vlmlab.contracts.tensors import Memory
from vlmlab.fusion.gated_xattn import CrossBlock

WIDTH, MEDIA, HEADS = 32, 24, 4
NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "cross_attn.q_proj",
    "attention.k": "cross_attn.k_proj",
    "attention.v": "cross_attn.v_proj",
    "attention.out": "cross_attn.o_proj",
    "attention.q_norm": "cross_attn.q_layer_norm",
    "attention.k_norm": "cross_attn.k_layer_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_gated_cross_attention_is_idefics(gate: str, qk_norm: bool) -> None:
    config: Any = IdeficsConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=48, rms_norm_eps=1e-6,
        alpha_initializer="zeros", alpha_type="float" if gate == "scalar" else "vector", qk_layer_norms=qk_norm,
        vision_config={"embed_dim": MEDIA}, use_resampler=False, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = tiny.spread(IdeficsGatedCrossAttentionLayer(config, layer_idx=0), seed=2, scale=0.3)
    ours = CrossBlock(WIDTH, MEDIA, HEADS, WIDTH // HEADS, 1.5, "rms", "swiglu", gate, qk_norm).eval()
    for name, other in NAMES.items():
        if qk_norm or ("q_norm" not in name and "k_norm" not in name):
            ours.get_submodule(name).weight.copy_(theirs.get_submodule(other).weight)
    ours.attention_gate.copy_(theirs.alpha_cross_attn.flatten())
    ours.mlp_gate.copy_(theirs.alpha_dense.flatten())

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, WIDTH, generator=generator)
    media = torch.randn(3, 5, MEDIA, generator=generator)  # two images of row 0, one of row 1
    sees = torch.zeros(2, 7, 3, dtype=torch.bool)
    sees[0, 1:4, 0] = sees[0, 4:, 1] = sees[1, 2:, 2] = True  # the first positions see nothing
    slots = torch.tensor([[0, 1], [2, -1]])
    keys, values = ours.attention.memory(media)
    got = ours(states, layout=None, memory=Memory({"keys": keys, "values": values}, sees, slots))  # type: ignore[arg-type]

    rows = torch.stack([media[[0, 1]].flatten(0, 1), torch.cat([media[2], torch.zeros(5, MEDIA)])])  # (2, 10, MEDIA)
    allowed = torch.stack([sees[0][:, [0, 1]], torch.stack([sees[1][:, 2], torch.zeros(7, dtype=torch.bool)], 1)])
    allowed = allowed.repeat_interleave(5, -1)  # (2, 7, 10)
    additive = torch.zeros(2, 1, 7, 10).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    want = theirs(
        states, image_hidden_states=rows, image_attention_mask=additive, cross_attention_gate=allowed.any(-1).float()
    )
    want = want[0] if isinstance(want, tuple) else want
    assert tiny.worst(got, want) < 1e-5 and want.std() > 0.1
