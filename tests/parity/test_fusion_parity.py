"""Fusions against transformers' own layers, with copied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor
from transformers import IdeficsConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionPatchMerger

from vlmlab.connector.pixel_shuffle import PixelShuffleConnector
from vlmlab.contracts.tensors import Memory
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.deepstack import DeepStack, Merge
from vlmlab.fusion.gated_xattn import CrossBlock
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.causal import Causal

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
    ours = CrossBlock(WIDTH, MEDIA, HEADS, WIDTH // HEADS, HEADS, 1.5, "rms", "swiglu", gate, qk_norm).eval()
    for name, other in NAMES.items():
        if qk_norm or ("q_norm" not in name and "k_norm" not in name):
            ours.get_submodule(name).weight.copy_(theirs.get_submodule(other).weight)
    ours.attention_gate.copy_(theirs.alpha_cross_attn.flatten())
    ours.mlp_gate.copy_(theirs.alpha_dense.flatten())

    states, rows, allowed, got = looked(ours, MEDIA)
    want = theirs(
        states,
        image_hidden_states=rows,
        image_attention_mask=additive(allowed),
        cross_attention_gate=allowed.any(-1).float(),
    )
    want = want[0] if isinstance(want, tuple) else want
    assert tiny.worst(got, want) < 1e-5 and want.std() > 0.1


def looked(ours: CrossBlock, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States (2, 7, D), images of both rows (2, 10, width), who sees which (2, 7, 10), and what a block gives.

    Two images are of row 0 and one of row 1; the first positions see nothing.
    """
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 7, WIDTH, generator=generator)
    media = torch.randn(3, 5, width, generator=generator)
    sees = torch.zeros(2, 7, 3, dtype=torch.bool)
    sees[0, 1:4, 0] = sees[0, 4:, 1] = sees[1, 2:, 2] = True
    slots = torch.tensor([[0, 1], [2, -1]])
    got = ours(states, layout=None, memory=Memory(ours.memory(media), sees, slots))  # type: ignore[arg-type]
    rows = torch.stack([media[[0, 1]].flatten(0, 1), torch.cat([media[2], torch.zeros(5, width)])])
    allowed = torch.stack([sees[0][:, [0, 1]], torch.stack([sees[1][:, 2], torch.zeros(7, dtype=torch.bool)], 1)])
    return states, rows, allowed.repeat_interleave(5, -1), got


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(2, 1, 7, 10).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)


@torch.no_grad()
def test_gated_cross_attention_is_mllamas() -> None:
    """Grouped heads, norms of queries and keys, and no feed-forward layer where no image is seen."""
    config = MllamaTextConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-6,
        num_hidden_layers=2, cross_attention_layers=[1], pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = tiny.spread(MllamaCrossAttentionDecoderLayer(config, layer_idx=1), seed=2, scale=0.3)
    ours = CrossBlock(WIDTH, WIDTH, HEADS, WIDTH // HEADS, 2, 1.5, "rms", "swiglu", "scalar", True, False).eval()
    renamed = {"q_layer_norm": "q_norm", "k_layer_norm": "k_norm"}
    for name, other in NAMES.items():
        for old, new in renamed.items():
            other = other.replace(old, new)
        ours.get_submodule(name).weight.copy_(theirs.get_submodule(other).weight)
    ours.attention_gate.copy_(theirs.cross_attn_attn_gate)
    ours.mlp_gate.copy_(theirs.cross_attn_mlp_gate)

    states, rows, allowed, got = looked(ours, WIDTH)
    told = allowed.any(-1)[:, None, :, None].float()  # (2, 1, 7, 1)
    want = theirs(
        states, cross_attention_states=rows, cross_attention_mask=additive(allowed) * told,
        attention_mask=None, full_text_row_masked_out_mask=told,
    )  # fmt: skip
    want = want[0] if isinstance(want, tuple) else want
    blind = ~allowed.any(-1)
    assert blind.sum() == 3 and torch.equal(got[blind], states[blind])
    assert tiny.worst(got[~blind], want[~blind]) < 1e-5 and want.std() > 0.1


@pytest.mark.parametrize("layers", [None, [0, 2]])
@torch.no_grad()
def test_deepstack_is_qwen3_vls(layers: list[int] | None) -> None:
    """Its LM with what is added at visual positions, in a padded batch with one, two and no images a row."""
    lm = HfLanguageModel(str(tiny.save_lm(Qwen3ForCausalLM(Qwen3Config(**tiny.text_config(head_dim=8))), "qwen3")))
    encoder = HfEncoder(str(tiny.siglip()), layers=[1, 2, 3])
    connector = tiny.spread(PixelShuffleConnector(encoder.width // 3, lm.width, factor=2), seed=1)
    fusion: Any = DeepStack(layers=layers)
    model = tiny.vlm(mask=Causal(), connector=connector, lm=lm, encoder=encoder, fusion=fusion)
    tiny.spread(fusion, seed=5)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen3VLTextConfig(**tiny.text_config(head_dim=8, rope_parameters=rope), attn_implementation="sdpa")
    theirs = Qwen3VLTextModel(config).eval()
    theirs.load_state_dict(lm.model.base_model.state_dict())

    batch = tiny.collator(model)([tiny.TWO_IMAGES, tiny.ONE_TURN, tiny.TEXT_ONLY])
    seen = model.see(batch)
    embeds, visual = model.embed(batch, seen), batch.layout.visual
    added = [m.tensors["added"].flatten(0, 1) for m in fusion.memories(seen, batch).values()]
    assert len(added) == 2 and len(added[0]) == int(visual.sum()) == 3 * 4
    if layers is not None:  # theirs are the first ones: what is added after layer 1 is nothing
        added.insert(1, torch.zeros_like(added[0]))
    want = theirs(
        inputs_embeds=embeds, attention_mask=batch.layout.valid.long(), visual_pos_masks=visual,
        deepstack_visual_embeds=added,
    ).last_hidden_state  # fmt: skip
    valid = batch.layout.valid
    assert tiny.worst(model(batch).states[valid], want[valid]) < 1e-5
    bare = theirs(inputs_embeds=embeds, attention_mask=valid.long()).last_hidden_state
    assert tiny.worst(bare[valid], want[valid]) > 1e-2


@torch.no_grad()
def test_a_merge_is_qwen3_vls() -> None:
    """Blocks of 2 x 2 cells, which Qwen3-VL's encoder has one after the other already."""
    config = Qwen3VLVisionConfig(hidden_size=24, spatial_merge_size=2, out_hidden_size=WIDTH)
    theirs = tiny.spread(Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True), seed=3, scale=0.3)
    ours = Merge(24, WIDTH, (3, 2, 2, 2), None, False)
    for name, other in {"norm": "norm", "up": "linear_fc1", "down": "linear_fc2"}.items():
        ours.get_submodule(name).load_state_dict(theirs.get_submodule(other).state_dict())
    features = torch.randn(2, 6 * 4, 24, generator=torch.Generator().manual_seed(0))  # 6 rows and 4 columns
    blocks = [
        features[i].reshape(6, 4, 24)[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(4, 24)
        for i in range(2) for r in range(3) for c in range(2)
    ]  # fmt: skip
    assert tiny.worst(ours(features).flatten(0, 1), theirs(torch.cat(blocks))) < 1e-5
