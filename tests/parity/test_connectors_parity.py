"""Connectors against transformers' with the same random weights, fp32, within 1e-5."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch import nn
from transformers import IdeficsConfig, InternVLConfig, LlavaConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector as TheirIdefics2Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlmlab.connector.attention_pool import AttentionPoolConnector
from vlmlab.connector.idefics2 import Idefics2Connector
from vlmlab.connector.mlp import MlpConnector
from vlmlab.connector.perceiver import PerceiverConnector
from vlmlab.connector.pixel_shuffle import PixelShuffleConnector
from vlmlab.connector.pool import PoolConnector


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_idefics_perceiver(qk_norm: bool) -> None:
    ours = spread(PerceiverConnector(32, 24, latents=5, depth=2, heads=2, head_dim=8, qk_norm=qk_norm))
    config = IdeficsConfig(
        vision_config={"embed_dim": 32}, perceiver_config={"qk_layer_norms_perceiver": qk_norm, "use_resampler": True}
    )
    theirs = IdeficsPerceiverResampler(config, embed_dim=32, depth=2, n_heads=2, head_dim=8, n_latents=5)
    theirs.load_state_dict(ours.resampler.state_dict())
    want = theirs(visual().grids[0]) @ ours.out.weight.T + ours.out.bias
    assert worst(ours(visual()), want) < 1e-5 and want.std() > 0.1


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_llava_projector(activation: str) -> None:
    config = LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 24, "num_attention_heads": 4},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 4},
        projector_hidden_act=activation,
        vision_feature_layer=[-2, -1],
    )
    theirs = spread(LlavaMultiModalProjector(config))
    ours = MlpConnector(64, 24, activation=activation)
    ours.layers[0].load_state_dict(theirs.linear_1.state_dict())
    ours.layers[2].load_state_dict(theirs.linear_2.state_dict())
    seen = visual(layers=2)
    want = theirs(torch.cat(seen.grids, -1))
    assert worst(ours(seen), want) < 1e-6 and want.std() > 0.1


@torch.no_grad()
def test_idefics2_connector() -> None:
    config = Idefics2Config(
        text_config={"model_type": "mistral", "hidden_size": 24, "intermediate_size": 40, "hidden_act": "silu"},
        vision_config={"hidden_size": 32},
        perceiver_config={
            "hidden_size": 24,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
    )
    theirs = spread(TheirIdefics2Connector(config))
    ours = Idefics2Connector(32, 24, latents=5, depth=2, heads=4, head_dim=8, kv_heads=2, hidden=40).eval()
    ours.mlp.load_state_dict(theirs.modality_projection.state_dict())
    ours.resampler.load_state_dict(theirs.perceiver_resampler.state_dict())
    features = visual().grids[0]
    want = theirs(features, attention_mask=torch.ones(3, 16, dtype=torch.long))
    assert worst(ours(visual()), want) < 1e-5 and want.std() > 0.1


@torch.no_grad()
def test_internvl_pixel_shuffle() -> None:
    config = InternVLConfig(
        vision_config={"model_type": "internvl_vision", "hidden_size": 32},
        text_config={"model_type": "qwen2", "hidden_size": 24},
        downsample_ratio=0.5,
    )
    theirs = spread(InternVLMultiModalProjector(config))
    ours = PixelShuffleConnector(32, 24, factor=2)
    ours.norm.load_state_dict(theirs.layer_norm.state_dict())
    ours.layers[0].load_state_dict(theirs.linear_1.state_dict())
    ours.layers[2].load_state_dict(theirs.linear_2.state_dict())
    grid = visual().grids[0].unflatten(1, (4, 4))
    shuffled = InternVLModel.pixel_shuffle(None, grid, scale_factor=0.5).flatten(1, 2)  # it does not use itself
    want = theirs(shuffled)
    assert worst(ours(visual()), want) < 1e-5 and want.std() > 0.1


@pytest.mark.parametrize("hw", [(4, 4), (3, 5)], ids=str)
@torch.no_grad()
def test_molmo_attention_pool(hw: tuple[int, int]) -> None:
    molmo = pytest.importorskip("transformers.models.molmo2.modeling_molmo2")
    config = molmo.Molmo2AdapterConfig(
        vision_feature_layer=[-1, -2],
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=20,
        text_hidden_size=24,
    )
    theirs = spread(molmo.Molmo2Adapter(config), scale=0.3)
    ours = AttentionPoolConnector(32, 24, heads=2, width=16, hidden=20).eval()
    pooling, projector = theirs.image_pooling_2d, theirs.image_projector
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (ours.query, pooling.q_proj),
        (ours.key, pooling.k_proj),
        (ours.value, pooling.v_proj),
        (ours.attended, pooling.o_proj),
        (ours.gate, projector.gate_proj),
        (ours.up, projector.up_proj),
        (ours.down, projector.down_proj),
    ]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    rows, columns = -(-hw[0] // 2), -(-hw[1] // 2)
    index = torch.full((3, rows, columns, 4), -1)
    for image in range(3):
        for i in range(hw[0]):
            for j in range(hw[1]):
                index[image, i // 2, j // 2, i % 2 * 2 + j % 2] = (image * hw[0] + i) * hw[1] + j
    seen = visual(layers=2, width=16, hw=hw)
    want = theirs(torch.cat(seen.grids, -1), index.reshape(-1, 4)).last_hidden_state.unflatten(0, (3, -1))
    assert worst(ours(seen), want) < 1e-5 and want.std() > 0.01


@torch.no_grad()
def test_perception_lm_pooling() -> None:
    lm = pytest.importorskip("transformers.models.perception_lm.modeling_perception_lm")
    ours = spread(PoolConnector(32, 24, side=2))
    want = ours.layers(lm.PerceptionLMAdaptiveAvgPooling(pooling_ratio=2)(visual().grids[0]))
    assert worst(ours(visual()), want) < 1e-5
