"""Several fusions in order are each of them, one after the other."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.test_conf import composed
from tests.tiny import SAMPLES, collator

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.gated_xattn import GatedCrossAttention
from vlmlab.fusion.lavi import LaViFusion
from vlmlab.fusion.several import SeveralFusion
from vlmlab.mask.memory.before import ImagesBefore
from vlmlab.mask.memory.latest import LatestImage


def beside() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    cross = GatedCrossAttention(LatestImage(), heads=2, head_width=6)
    return {"norms": LaViFusion(ImagesBefore(), every=2), "cross": cross, "tokens": ConcatFusion()}


@torch.no_grad()
def test_every_part_has_its_own_memory_and_its_own_eyes() -> None:
    model = tiny.vlm(fusion=SeveralFusion(beside()))
    assert (model.fusion.in_sequence, model.fusion.starts_as, model.fusion.reads_text) == (True, "concat", False)
    batch = collator(model)(SAMPLES)
    assert torch.equal(model(batch).logits, tiny.vlm()(batch).logits)
    memories = model.fusion.memories(model.see(batch), batch)
    blocks = [f"fusion.norms.{k}" for k in range(4)] + ["fusion.cross.0"]
    assert list(memories) == blocks
    assert memories["fusion.norms.0"].sees.sum() > memories["fusion.cross.0"].sees.sum() > 0
    before = model(batch).logits
    for name in ("norms", "cross"):
        tiny.spread(model.fusion.parts[name], seed=4)
        after = model(batch).logits
        assert tiny.worst(before, after) > 1e-3
        before = after


def test_two_of_a_kind_do_not_mix() -> None:
    """Two LaVi fusions: a block reads its own fusion's memory, though the names in it are the same."""
    torch.manual_seed(0)
    parts = {name: LaViFusion(ImagesBefore(), layers=[layer]) for name, layer in (("low", 0), ("high", 3))}
    model = tiny.vlm(fusion=SeveralFusion(parts))
    tiny.spread(model.fusion, seed=4)
    batch = collator(model)(SAMPLES)
    outputs = model(batch)
    torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.fusion.parameters())


def test_order_and_company() -> None:
    with pytest.raises(UserError, match=r"fusion.parts has a and b, which both put tokens into the sequence"):
        SeveralFusion({"a": ConcatFusion(), "b": ConcatFusion()})
    with pytest.raises(UserError, match=r"fusion.parts lists no fusion"):
        SeveralFusion({"a": None})
    assert SeveralFusion({"a": None, "norms": LaViFusion(ImagesBefore())}).starts_as == "text_only"
    for name in ("low.er", "keys", 7):
        with pytest.raises(UserError, match=rf"fusion.parts cannot have a part named {name!r}; give it another"):
            SeveralFusion({name: ConcatFusion()})


def test_any_fusion_is_added_on_the_command_line() -> None:
    fusion = instantiate(
        composed(
            "fusion=emma", "fusion.parts.mixing=null", "+fusion@fusion.parts.norms=lavi",
            "memory_mask@fusion.parts.norms.sees=latest", "fusion.parts.norms.every=2",
        ).fusion
    )  # fmt: skip
    assert list(fusion.parts) == ["concat", "norms"] and not fusion.reads_text
    norms = fusion.parts["norms"]
    assert isinstance(norms, LaViFusion) and isinstance(norms.sees, LatestImage) and norms.every == 2
    model = tiny.vlm(fusion=fusion)
    assert len(norms.norms) == 4 and model.tokens_per_image == 16


@torch.no_grad()
def test_parts_of_parts_have_keys_of_their_own() -> None:
    inner = SeveralFusion({"a": LaViFusion(ImagesBefore(), layers=[0]), "b": LaViFusion(ImagesBefore(), layers=[0])})
    model = tiny.vlm(fusion=SeveralFusion({"inner": inner, "tokens": ConcatFusion()}))
    batch = collator(model)(SAMPLES)
    found = {key.rpartition(".")[0] for key in model.fusion.memories(model.see(batch), batch)}
    assert found == {"fusion.inner.a", "fusion.inner.b"}
    before = model(batch).logits
    assert torch.equal(before, tiny.vlm()(batch).logits)
    for name in ("a", "b"):  # both at the same norm
        tiny.spread(inner.parts[name], seed=4)
        after = model(batch).logits
        assert tiny.worst(before, after) > 1e-3
        before = after
