"""Our masks against transformers' own: the boolean patterns it builds, and PaliGemma as a whole."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import (
    ONE_TURN,
    TWO_IMAGES,
    TWO_TURNS,
    VISION,
    batches,
    collator,
    qwen2,
    root,
    save_lm,
    siglip,
    spread,
    text_config,
    worst,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    GemmaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.tensors import Batch, Layout, Role
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.bidir_all_images import BidirectionalAllImages
from vlmlab.mask.causal import Causal
from vlmlab.mask.prefix_lm import PrefixLM
from vlmlab.model.vlm import VLM


def theirs(layout: Layout, blocks: Tensor) -> Tensor:
    """(B, S, S): causal, or in the same block; padding and packed samples (by their positions) apart."""
    config = AutoConfig.from_pretrained(qwen2())
    config._attn_implementation = "sdpa"
    alone = bool(layout.segment.max() == 0)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(*blocks.shape, 4),
        attention_mask=layout.valid.long() if alone else None,
        past_key_values=None,
        position_ids=None if alone else layout.position,
        block_sequence_ids=blocks,
    )
    return mask[:, 0]


def same(mask: object, layout: Layout, blocks: Tensor) -> bool:
    ours = mask(layout, torch.arange(blocks.shape[1]))
    rows = layout.valid[..., None]  # what a padded row sees does not matter
    return torch.equal(ours & rows, theirs(layout, blocks) & rows)


@pytest.mark.parametrize(
    "where", ["one turn", "image in turn two", "image in each turn", "right padding", "left padding"]
)
def test_blocks_of_images(where: str) -> None:
    """Gemma-3's rule: the tokens of one image see each other."""
    layout = batches()[where].layout
    assert same(Bidirectional(), layout, layout.image)
    assert not same(Causal(), layout, layout.image)


def test_one_block_of_all_images() -> None:
    """Where no answer is between the images, which is where transformers has no leak rule to need."""
    layout = batches()["right padding"].layout.select(torch.tensor([0, 1, 4]))  # one image, one image, two adjacent
    assert same(BidirectionalAllImages(), layout, torch.where(layout.visual, 0, -1))


def test_packed_samples_are_those_of_the_positions() -> None:
    layout = batches()["packed"].layout
    assert same(Causal(), layout, torch.full_like(layout.image, -1))


@pytest.mark.parametrize("where", ["one turn", "right padding"])
def test_the_prefix_is_paligemmas(where: str) -> None:
    """Token type 0 up to the first answer, 1 from there on."""
    layout = up_to_first_answer(batches()[where].layout)
    prefix = (layout.role != Role.ANSWER) & layout.valid
    assert same(PrefixLM(), layout, torch.where(prefix, 0, -1))


def up_to_first_answer(layout: Layout) -> Layout:
    """Everything after the first answer counts as answer, as PaliGemma's suffix does."""
    started = layout.role.eq(Role.ANSWER).cumsum(1) > 0
    return Layout(**{**layout.__dict__, "role": torch.where(started, int(Role.ANSWER), layout.role)})


def paligemma() -> PaliGemmaForConditionalGeneration:
    text = {**text_config(head_dim=8), "model_type": "gemma", "tie_word_embeddings": False}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        image_token_index=3,
        projection_dim=32,
    )
    return spread(PaliGemmaForConditionalGeneration(config), seed=9)


def ours(model: PaliGemmaForConditionalGeneration) -> VLM:
    size = (siglip() / "preprocessor_config.json").read_text()
    model.model.vision_tower.save_pretrained(root() / "paligemma-vision")
    (root() / "paligemma-vision" / "preprocessor_config.json").write_text(size)
    language = GemmaForCausalLM(model.config.text_config)
    save_lm(language, "paligemma-lm")  # spread over; the weights are copied below
    lm = HfLanguageModel(str(root() / "paligemma-lm"))
    lm.model.model.load_state_dict(model.model.language_model.state_dict())
    lm.model.lm_head.load_state_dict(model.lm_head.state_dict())
    encoder = HfEncoder(str(root() / "paligemma-vision"))
    connector = MlpConnector(encoder.width, lm.width, depth=1)
    connector.layers[0].load_state_dict(model.model.multi_modal_projector.linear.state_dict())
    return VLM(encoder, connector, ConcatFusion(), lm, PrefixLM()).eval()


def logits(model: VLM, batch: Batch) -> Tensor:
    embeds = model.embed(batch)
    return model.lm.logits(model.lm.states(embeds, batch.layout, model.mask))


@torch.no_grad()
def test_paligemma() -> None:
    """The whole model: pixels to logits, images and prompt open, the rest causal."""
    whole = paligemma()
    model = ours(whole)
    batch = collator(model)([ONE_TURN, TWO_TURNS, TWO_IMAGES])
    layout = up_to_first_answer(batch.layout)
    batch = Batch(**{**batch.__dict__, "layout": layout})
    before = torch.where(layout.role.eq(Role.ANSWER), 1, 0)
    want = whole(
        input_ids=batch.input_ids,
        pixel_values=(batch.pixels.float() / 255 - 0.5) / 0.5,
        attention_mask=layout.valid.long(),
        position_ids=layout.position,  # it would count from 1, which rotary positions cannot tell
        token_type_ids=before.masked_fill(~layout.valid, 1),
    ).logits
    valid = layout.valid
    assert worst(logits(model, batch)[valid], want[valid]) < 1e-5 and want.std() > 0.1
    model.set_mask(Causal())
    assert worst(logits(model, batch)[valid], want[valid]) > 1e-3, "the comparison sees the mask"
