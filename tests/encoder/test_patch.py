"""Raw patches: the order of pixels and patches, newlines, and Fuyu as a whole."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import ONE_TURN, TWO_IMAGES, collator, picture, save_lm, spread, text_config, vlm, worst
from torch import Tensor
from transformers import AutoModelForCausalLM, FuyuConfig, FuyuForCausalLM

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.patch import PatchEncoder
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.causal import Causal


def pixels(*size: int) -> Tensor:
    """(2, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(picture(seed, (size[0], size[1])).transpose(2, 0, 1)) for seed in (1, 2)])


def looped(values: Tensor, side: int) -> Tensor:
    """(3, H, W) uint8 -> (N, p * p * 3) by plain loops: patches in raster order, then rows, columns, channels."""
    out = []
    for top in range(0, values.shape[1], side):
        for left in range(0, values.shape[2], side):
            patch = [
                int(values[c, top + y, left + x]) / 127.5 - 1
                for y in range(side)
                for x in range(side)
                for c in range(3)
            ]
            out.append(patch)
    return torch.tensor(out)


def test_raw_patches() -> None:
    encoder = PatchEncoder(image_size=[24, 16], patch_size=8)
    seen = encoder(pixels(24, 16))
    assert encoder.hw == (3, 2) and seen.hw.tolist() == [[3, 2], [3, 2]] and seen.pooled is None
    assert encoder.width == 192 and encoder.trainable() == [] and encoder.source is None
    (grid,) = seen.grids
    assert worst(grid, torch.stack([looped(image, 8) for image in pixels(24, 16)])) < 1e-6


def test_features_and_newlines() -> None:
    encoder = spread(PatchEncoder(image_size=16, patch_size=8, features=5, newline=True))
    seen = encoder(pixels(16, 16))
    (grid,) = seen.grids
    assert encoder.hw == (2, 3) and seen.hw.tolist() == [[2, 3]] * 2 and grid.shape == (2, 6, 5) and encoder.width == 5
    linear, newline = encoder.tower[0], encoder.newline
    flat = torch.stack([looped(image, 8) for image in pixels(16, 16)]) @ linear.weight.T + linear.bias
    for place, patch in enumerate([0, 1, None, 2, 3, None]):
        want = newline.expand(2, -1) if patch is None else flat[:, patch]
        assert worst(grid[:, place], want) < 1e-5
    grid.square().sum().backward()
    assert [name for name, p in encoder.trainable()] == ["newline", "tower.0.weight", "tower.0.bias"]
    assert all(p.grad is not None for _, p in encoder.trainable())


def test_images_are_brought_to_its_size() -> None:
    encoder = PatchEncoder(image_size=[24, 16], patch_size=8)
    assert encoder.preprocess(picture(1, (80, 96))).shape == (3, 24, 16)
    assert encoder(torch.zeros(0, 3, 24, 16, dtype=torch.uint8)).grids[0].shape == (0, 6, 192)


def test_an_adapter_wraps_the_linear_layer() -> None:
    encoder = PatchEncoder(patch_size=16, features=8)
    encoder.tower = LoraAdapter(parts=("encoder",), r=2).wrap(encoder.tower)
    assert sum("lora" in name for name, _ in encoder.trainable()) == 2
    assert encoder(pixels(64, 64)).grids[0].shape == (2, 16, 8)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"encoder\.image_size=\[64,60\].*encoder\.patch_size=16"):
        PatchEncoder(image_size=[64, 60])
    with pytest.raises(UserError, match="no pooled output"):
        PatchEncoder(pooled=True)


NEWLINE = 40
"""The token that stands for the end of a row in the Fuyu below."""


def fuyu() -> FuyuForCausalLM:
    text = text_config(num_hidden_layers=3, hidden_act="relu2", qk_layernorm=True)
    text = {key: value for key, value in text.items() if key != "num_key_value_heads"}
    config = FuyuConfig(text_config={**text, "model_type": "persimmon"}, patch_size=16, image_size=64, image_token_id=3)
    return spread(FuyuForCausalLM(config), seed=6)


@torch.no_grad()
def test_fuyu() -> None:
    """The whole model with newlines: one linear layer takes patches and newlines to the LM's embeddings.

    There a newline is a word of the LM, here a learned feature before the linear layer: the one that it takes there.
    """
    theirs = fuyu()
    language = AutoModelForCausalLM.from_config(theirs.config.text_config)
    lm = HfLanguageModel(str(save_lm(language, "persimmon")))
    lm.model.model.load_state_dict(theirs.model.language_model.state_dict())
    lm.model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    encoder = PatchEncoder(image_size=64, patch_size=16, newline=True)
    connector = MlpConnector(encoder.width, lm.width, depth=1)
    linear = theirs.model.vision_embed_tokens
    connector.layers[0].load_state_dict(linear.state_dict())
    row_end = lm.embed(torch.tensor([NEWLINE]))[0]
    encoder.newline.copy_(torch.linalg.pinv(linear.weight.double()) @ (row_end - linear.bias).double())
    model = vlm(mask=Causal(), encoder=encoder, connector=connector, lm=lm)

    batch = collator(model)([ONE_TURN, TWO_IMAGES])
    assert model.tokens_per_image == 4 * 5 and model.lm.image_id == theirs.config.image_token_id
    ids = batch.input_ids.clone()
    placeholders = ids[batch.layout.visual].view(-1, 5)
    placeholders[:, 4] = NEWLINE
    ids[batch.layout.visual] = placeholders.flatten()
    patches = torch.cat([looped(image, 16) for image in batch.pixels])  # (I * N, p * p * 3)
    want = theirs(input_ids=ids, pixel_values=patches[None], attention_mask=batch.layout.valid.long()).logits
    embeds = model.embed(batch)
    got = lm.logits(lm.states(embeds, batch.layout, Causal()))
    valid = batch.layout.valid
    assert worst(got[valid], want[valid]) < 1e-5 and want.std() > 0.1
    encoder.newline.zero_()
    embeds = model.embed(batch)
    assert worst(lm.logits(lm.states(embeds, batch.layout, Causal()))[valid], want[valid]) > 1e-3, "newlines matter"
