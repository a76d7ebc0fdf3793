"""InstructBLIP's Q-Former and Ovis2's visual words against transformers, with the same random weights, within 1e-5."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import spread, text_config, worst
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    OPTConfig,
    Ovis2Config,
    Ovis2VisionConfig,
    Qwen2Config,
)
from transformers.models.ovis2.modeling_ovis2 import Ovis2Model

from vlmlab.connector.ovis import OvisConnector
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.tensors import Visual

IDS = torch.tensor([[7, 8, 9, -1, -1], [9, 8, 7, 6, 5]])


def instructblip() -> InstructBlipForConditionalGeneration:
    tower = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(hidden_size=20, image_size=28, patch_size=14, **tower).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            cross_attention_frequency=2,
            encoder_hidden_size=20,
            vocab_size=30,
            max_position_embeddings=12,
        ).to_dict(),
        text_config=OPTConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            vocab_size=40,
            word_embed_proj_dim=24,
        ).to_dict(),
        num_query_tokens=5,
    )
    return spread(InstructBlipForConditionalGeneration(config), seed=4)


def from_instructblip(theirs: InstructBlipForConditionalGeneration) -> QFormerConnector:
    ours = QFormerConnector(
        20, 24, queries=5, hidden=16, layers=3, heads=2, instruction=True, vocab_size=30, max_words=12
    ).eval()
    weights = {name.removeprefix("embeddings."): w for name, w in theirs.qformer.state_dict().items()}
    ours.words.weight.data = weights.pop("word_embeddings.weight")
    ours.places.weight.data = weights.pop("position_embeddings.weight")
    ours.qformer.load_state_dict(weights)
    ours.queries.data = theirs.query_tokens.data
    ours.out.load_state_dict(theirs.language_projection.state_dict())
    ours.norm.load_state_dict(theirs.vision_model.post_layernorm.state_dict())
    ours.norm.eps = theirs.vision_model.post_layernorm.eps
    return ours


@torch.no_grad()
def test_instructblip() -> None:
    theirs = instructblip()
    ours = from_instructblip(theirs)
    features: list[Tensor] = []
    keep = theirs.vision_model.post_layernorm.register_forward_hook(lambda m, given, out: features.append(given[0]))
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    want = theirs.get_image_features(
        pixel_values=pixels, qformer_input_ids=IDS.clamp(min=0), qformer_attention_mask=IDS.ge(0).long()
    ).pooler_output
    keep.remove()
    seen = Visual([features[0]], None, torch.tensor([[1, 5]] * 2))
    assert worst(ours(seen, IDS), want) < 1e-5 and want.std() > 0.1
    assert worst(ours(seen, IDS.flip(0)), want) > 1e-3, "the comparison sees the instruction"


def ovis2(tokenize: str, stride: int) -> Ovis2Model:
    vision = Ovis2VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        vocab_size=22,
        hidden_stride=stride,
        num_visual_indicator_tokens=2,
        tokenize_function=tokenize,
    )
    text = Qwen2Config(**text_config())
    config = Ovis2Config(vision_config=vision.to_dict(), text_config=text.to_dict(), hidden_size=32, vocab_size=9)
    return spread(Ovis2Model(config), seed=5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tokenize", ["softmax", "gumbel_argmax", "st_argmax"])
@torch.no_grad()
def test_ovis2(tokenize: str, stride: int) -> None:
    theirs = ovis2(tokenize, stride)
    ours = OvisConnector(16, 32, words=20, stride=stride, tokenize=tokenize).train()
    tower = theirs.vision_tower
    ours.head.load_state_dict(tower.head_linear.state_dict())
    ours.norm.load_state_dict(tower.head_norm.state_dict())
    ours.table.load_state_dict(theirs.visual_embeddings_table.state_dict())
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    seen = Visual([tower.transformer(pixels).last_hidden_state], None, torch.tensor([[4, 4]] * 2))
    torch.manual_seed(0)  # gumbel_argmax draws
    want = theirs.get_image_features(pixel_values=pixels)
    torch.manual_seed(0)
    got = ours(seen)
    assert worst(got[:, 1:-1], want.pooler_output) < 1e-5 and want.pooler_output.std() > 0.02
    assert worst(got[:, [0, -1]], want.visual_indicator_features.expand(2, -1, -1)) == 0
    assert got.shape[1] == ours.tokens_per_image((4, 4)) == {1: 16, 2: 4}[stride] + 2


@torch.no_grad()
def test_text_and_queries_have_separate_feed_forwards() -> None:
    """A plain loop over the first layer of InstructBLIP's Q-Former: one self-attention, two feed-forwards."""
    ours = from_instructblip(instructblip())
    layer = ours.qformer.encoder.layer[0]
    valid = IDS[:1] >= 0
    words = ours.words(IDS[:1].clamp(min=0)) + ours.places.weight[:5]
    x = F.layer_norm(torch.cat([ours.queries, words], 1), (16,), *_affine(ours.qformer.layernorm))[0]  # (5 + 5, 16)
    part, out = layer.attention.attention, layer.attention.output
    attended = torch.zeros_like(x)
    for head in range(2):
        mine = slice(head * 8, head * 8 + 8)
        q, k, v = ((x @ m.weight.T + m.bias)[:, mine] for m in (part.query, part.key, part.value))
        for i in range(10):
            keys = [j for j in range(10) if j < 5 or valid[0, j - 5]]
            weights = torch.stack([q[i] @ k[j] / 8**0.5 for j in keys]).softmax(0)
            attended[i, mine] = sum(w * v[j] for w, j in zip(weights, keys, strict=True))
    attended = attended @ out.dense.weight.T + out.dense.bias + x
    attended = F.layer_norm(attended, (16,), *_affine(out.LayerNorm))
    hidden = F.gelu(attended[5:] @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias)
    text = hidden @ layer.output.dense.weight.T + layer.output.dense.bias + attended[5:]
    text = F.layer_norm(text, (16,), *_affine(layer.output.LayerNorm))
    got: list[Tensor] = []
    keep = layer.register_forward_hook(lambda m, given, result: got.append(result))
    ours(Visual([torch.randn(1, 4, 20)], None, torch.tensor([[2, 2]])), IDS[:1])
    keep.remove()
    assert worst(got[0][0, 5:][valid[0]], text[valid[0]]) < 1e-5


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps
