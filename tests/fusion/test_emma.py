"""EMMA's mixing by loops, its size, and what it lets through."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from tests.tiny import ONE_TURN, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Visual
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.emma import InstructionMixing, share_taken
from vlmlab.fusion.several import SeveralFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.vlm import VLM


def emma(mask_padding: bool = False, layers: list[int] | None = None) -> VLM:
    torch.manual_seed(0)
    encoder, lm = HfEncoder(str(tiny.two_towers()), layers=layers or [-2]), HfLanguageModel(str(tiny.qwen2()))
    fusion = SeveralFusion({"mixing": InstructionMixing(mask_padding), "concat": ConcatFusion()})
    connector = tiny.spread(MlpConnector(encoder.width, lm.width), seed=1)
    return VLM(encoder, connector, fusion, lm, Bidirectional(), encoder.text_tower()).eval()


def mixing(model: VLM) -> InstructionMixing:
    found = model.fusion.parts["mixing"]
    assert isinstance(found, InstructionMixing)
    return found


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("mask_padding", [False, True])
@torch.no_grad()
def test_it_is_the_loop(mask_padding: bool) -> None:
    model = emma(mask_padding, layers=[1, -2])
    part = tiny.spread(mixing(model), seed=2)
    batch = collator(model)([ONE_TURN, TWO_IMAGES, TEXT_ONLY])
    assert model.encoder is not None and model.text is not None and batch.text_ids is not None
    visual, text = model.encoder(batch.pixels), model.text(batch.text_ids)  # (3, 16, 32) twice, (3, 12, 24)
    got = part.features(visual, batch, text)
    x = torch.cat(visual.grids, -1)
    for i in range(3):
        rows = [x[i, n].tolist() for n in range(16)]
        for t in range(12):
            kept = not mask_padding or int(batch.text_ids[i, t]) >= 0
            z = text[i, t]
            words = [gelu(float(z @ part.project.weight[c] + part.project.bias[c])) * kept for c in range(64)]
            rows.append(words)
        for n in (0, 7, 15):
            for c in (0, 31, 32, 63):
                want = sum(float(part.mix.weight[n, j]) * rows[j][c] for j in range(28)) + float(part.mix.bias[n])
                assert abs(float(torch.cat(got.grids, -1)[i, n, c]) - want) < 1e-5
    assert [g.shape[-1] for g in got.grids] == [32, 32]


@torch.no_grad()
def test_it_adds_as_many_parameters_as_published() -> None:
    """ViT-L/14-336: 576 features of width 1,024, 77 states of width 768 (counted from the published code)."""
    part = InstructionMixing()
    with torch.device("meta"):
        encoder, text = SimpleNamespace(hw=(24, 24), width=1024), SimpleNamespace(context=77, width=768)
        part.attach(SimpleNamespace(encoder=encoder, text=text))  # type: ignore[arg-type]
    assert sum(p.numel() for p in part.parameters()) == 1_164_160


@torch.no_grad()
def test_the_identity_lets_any_instruction_pass_untouched() -> None:
    model = emma()
    batch = collator(model)([ONE_TURN, TWO_TURNS])
    assert model.encoder is not None
    features = model.encoder(batch.pixels).grids[0]
    assert torch.equal(model.see(batch).visual.grids[0], features)  # type: ignore[union-attr]


def test_another_instruction_changes_the_features_after_one_update() -> None:
    model = emma()
    batch = collator(model)([ONE_TURN, TWO_TURNS])
    assert batch.text_ids is not None
    other = replace(batch, text_ids=batch.text_ids.flip(0))
    optimizer = torch.optim.SGD(model.fusion.parameters(), lr=0.1)
    outputs = model(batch)
    torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    part = mixing(model)
    assert part.mix.weight.grad is not None and part.mix.weight.grad[:, 16:].any(), "the text's half moves first"
    optimizer.step()
    with torch.no_grad():
        ours, theirs = (model.see(b).visual.grids[0] for b in (batch, other))  # type: ignore[union-attr]
    assert tiny.worst(ours, theirs) > 1e-5


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="text tower and this encoder has none"):
        tiny.vlm(fusion=InstructionMixing())
    model = emma()
    batch = collator(model)([ONE_TURN])
    short = Visual([torch.zeros(1, 9, 32)], None, torch.tensor([[3, 3]]))
    with pytest.raises(UserError, match=r"a grid of 16 features and this encoder gives \(9, 32\)"):
        mixing(model).features(short, batch, torch.zeros(1, 12, 24))


def test_what_is_taken_from_whom() -> None:
    """Two visual tokens and one of text."""
    got = share_taken(torch.tensor([[1.0, -0.5, 0.25], [0.0, 2.0, -0.25]]), 2)
    assert got == pytest.approx(
        {
            "l1, visual": (1 + 2.5) / 2, "l1, text": 0.5,
            "l2, visual": (1 + math.sqrt(4.25)) / 2, "l2, text": math.sqrt(0.125),
            "from other visual": 0.5 / 4, "from text": 0.5 / 4,
        }
    )  # fmt: skip
    model = emma()
    start = share_taken(mixing(model).mix.weight, 16)
    assert (start["l1, visual"], start["l1, text"], start["from other visual"], start["from text"]) == (1, 0, 0, 0)
