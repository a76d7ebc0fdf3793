"""``deepstack``: which layers go where, its size, and what it refuses; Qwen3-VL itself is in ``tests/parity``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.test_conf import composed
from tests.tiny import ADJACENT, ONE_TURN, SAMPLES, collator

from vlmlab.connector.perceiver import PerceiverConnector
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.deepstack import DeepStack
from vlmlab.fusion.several import SeveralFusion
from vlmlab.model.build import build_model
from vlmlab.model.vlm import VLM


def stacked(taps: list[int], fusion: Any = None, **keys: Any) -> VLM:
    encoder = HfEncoder(str(tiny.siglip()), layers=taps)
    connector = tiny.spread(tiny.MlpConnector(32, 32), seed=1)
    return tiny.vlm(encoder=encoder, connector=connector, fusion=fusion or DeepStack(**keys))


@torch.no_grad()
def test_the_last_layer_goes_into_the_sequence_and_the_others_inside() -> None:
    model, plain = stacked([1, 3, 2]), stacked([2], fusion=ConcatFusion())
    batch = collator(model)([ONE_TURN, ADJACENT])
    seen, alone = model.see(batch), plain.see(batch)
    assert seen.visual is not None and len(seen.visual.grids) == 3 and seen.tokens is not None
    assert tiny.worst(seen.tokens, alone.tokens) < 1e-6
    made = model.fusion.memories(seen, batch)
    for k, grid in enumerate(seen.visual.grids[:2]):
        assert torch.equal(made[f"fusion.{k}"].tensors["added"], model.fusion.merges[k](grid))
    used = [len(layer.ports.sites["after"].blocks) for layer in model.lm.model.base_model.layers]
    assert used == [1, 1, 0, 0]
    other = stacked([1, 3, 2], layers=[-2, 0])
    places = [layer.ports.sites["after"].keys for layer in other.lm.model.base_model.layers]
    assert places == [["fusion.1"], [], ["fusion.0"], []]


@torch.no_grad()
def test_a_start_at_zero_is_concat() -> None:
    model, plain = stacked([1, 2], zero_start=True), stacked([2], fusion=ConcatFusion())
    batch = collator(model)(SAMPLES)
    assert model.fusion.starts_as == "concat" and torch.equal(model(batch).logits, plain(batch).logits)
    random = stacked([1, 2])
    assert random.fusion.starts_as == "nothing" and tiny.worst(random(batch).logits, plain(batch).logits) > 1e-3


def test_parameters_by_hand() -> None:
    each = 2 * 32 + (32 * 32 + 32) + (32 * 32 + 32)
    assert sum(p.numel() for p in stacked([0, 1, 2]).fusion.parameters()) == 2 * each
    assert sum(p.numel() for p in stacked([2], hidden=5).fusion.parameters()) == 2 * 32 + (32 * 5 + 5) + (5 * 32 + 32)


def test_a_configuration_builds_it_and_beside_others() -> None:
    """The connector is as wide as what it reads."""
    for fusion in ("fusion=deepstack", "fusion=several"):
        also = ["fusion@fusion.parts.tokens=deepstack"] if fusion.endswith("several") else []
        model = build_model(composed(fusion, *also, "encoder.layers=[1,3]"))
        assert model.connector is not None and model.encoder is not None
        assert model.connector.layers[0].in_features * 2 == model.encoder.width
    assert isinstance(model.fusion, SeveralFusion)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.layers=\[0\] names 1 layers of the LM for 2 of the encoder's; name 2"):
        stacked([1, 2, 3], layers=[0])
    with pytest.raises(
        UserError, match=r"fusion.layers=\[0, 3\] adds 2 .* no word looks any more; name layers from 0 to 2"
    ):
        stacked([1, 2, 3], layers=[0, 3])
    with pytest.raises(UserError, match=r"fusion.layers=None adds 4 of encoder.layers after the last"):
        stacked([0, 1, 1, 2, 3])
    with pytest.raises(UserError, match=r"equal blocks of the encoder's 4x4 cells, and this connector's do not"):
        tiny.vlm(fusion=DeepStack(), connector=PerceiverConnector(32, 32))
