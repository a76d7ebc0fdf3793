"""How much visual tokens differ between images, as a stage says before its first step."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from tests import tiny

from vlmlab.data.sampler import Order
from vlmlab.engine.finite import as_evaluated
from vlmlab.model.build import build_collator
from vlmlab.train.looks import IMAGES, Looks, differing_share


def test_shares_by_hand() -> None:
    places, images = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 6.0])
    same = places[None, :, None].expand(2, 2, 1)  # every image alike
    assert differing_share(same) == 0.0
    flat = images[:, None, None].expand(2, 2, 1)  # every place alike
    assert differing_share(flat) == 1.0
    both = same + flat  # variance over images 9, over places 1
    assert abs(differing_share(both) - 0.9) < 1e-6
    assert differing_share(torch.zeros(3, 2, 1)) == 0.0


def test_nothing_of_the_model_changes() -> None:
    model = tiny.vlm().train()
    model.lm.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    with as_evaluated(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


def test_bad_rows_and_rows_without_images_are_passed_over() -> None:
    model = tiny.vlm()
    cfg = OmegaConf.create({"collate": {"max_length": 512, "pack_length": None}})
    collate = build_collator(cfg, model, "chat")
    looks = Looks(tiny.SAMPLES, Order(len(tiny.SAMPLES), 8, 0, "s"), collate, print)
    counts = [len(batch.pixels) for batch in looks._batches()]
    assert sum(counts) >= 1 and sum(counts[:-1]) < IMAGES
