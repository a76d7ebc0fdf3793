"""Several encoders as one: the formulas of every way to combine them, what trains, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image as Pil
from tests import tiny
from tests.tiny import SAMPLES, choices, clip, collator, dinov2, picture, siglip, vlm, worst
from torch import Tensor

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.patch import PatchEncoder
from vlmlab.encoder.scratch import ScratchEncoder


def pixels(side: int = 64) -> Tensor:
    return torch.stack([torch.from_numpy(picture(seed, (side, side)).transpose(2, 0, 1)) for seed in (1, 2)])


def two() -> list[Encoder]:
    """Two layers of one tower, and another tower with its own normalisation."""
    return [HfEncoder(str(siglip()), layers=[1, -1]), HfEncoder(str(clip()), layers=[-2])]


def small(features: int | None = 32) -> PatchEncoder:
    """A grid of 2 x 2 from images of 32 pixels."""
    return PatchEncoder(image_size=32, patch_size=16, features=features)


def alone(encoders: Sequence[Encoder]) -> list[Tensor]:
    return [grid for encoder in encoders for grid in encoder.eval()(pixels()).grids]


@torch.no_grad()
def test_channel_gives_every_grid() -> None:
    encoder = MultiEncoder(two()).eval()
    seen = encoder(pixels())
    assert encoder.width == 96 and encoder.hw == (4, 4) and seen.hw.tolist() == [[4, 4]] * 2
    assert all(torch.equal(a, b) for a, b in zip(seen.grids, alone(two()), strict=True))


@torch.no_grad()
def test_token_stacks_the_grids() -> None:
    encoder = MultiEncoder(two(), combine="token").eval()
    (grid,) = encoder(pixels()).grids
    assert encoder.width == 32 and encoder.hw == (12, 4) and grid.shape == (2, 48, 32)
    for i, part in enumerate(alone(two())):
        assert torch.equal(grid[:, 16 * i : 16 * (i + 1)], part)


@torch.no_grad()
def test_average() -> None:
    encoder = MultiEncoder(two(), combine="average").eval()
    (grid,) = encoder(pixels()).grids
    assert encoder.width == 32 and encoder.hw == (4, 4)
    assert worst(grid, sum(alone(two())) / 3) < 1e-6


@torch.no_grad()
def test_a_smaller_encoder_sees_the_image_scaled() -> None:
    """As Pillow would scale it, to two levels of brightness: Pillow rounds between rows and columns."""
    raw = PatchEncoder(image_size=32, patch_size=16)
    encoder = MultiEncoder([raw, HfEncoder(str(siglip()))], grid=[2, 2]).eval()
    assert encoder.preprocess.height == 64 and encoder.width == 768 + 32 and encoder.hw == (2, 2)
    images = [Pil.fromarray(i.permute(1, 2, 0).numpy()).resize((32, 32), Pil.Resampling.BICUBIC) for i in pixels()]
    want = raw(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])).grids[0]
    assert worst(encoder(pixels()).grids[0], want) < 2.01 * 2 / 255


@torch.no_grad()
def test_resampled_grids() -> None:
    """2 x 2 to 4 x 4, bilinear with the places of pixels' centres, by plain loops."""
    encoder = MultiEncoder([small(), HfEncoder(str(siglip()))], grid=[4, 4]).eval()
    coarse = MultiEncoder([small(), HfEncoder(str(siglip()))], combine="token").eval()
    coarse.tower[0].load_state_dict(encoder.tower[0].state_dict())
    assert coarse.hw == (1, 20), "4 and 16 places of different columns make one row"
    source = coarse(pixels()).grids[0][:, :4].unflatten(1, (2, 2))  # (I, 2, 2, Dv)
    got = encoder(pixels()).grids[0].unflatten(1, (4, 4))
    for y in range(4):
        for x in range(4):
            v, u = (min(max((place + 0.5) / 2 - 0.5, 0.0), 1.0) for place in (y, x))
            top = source[:, 0, 0] * (1 - u) + source[:, 0, 1] * u
            bottom = source[:, 1, 0] * (1 - u) + source[:, 1, 1] * u
            assert worst(got[:, y, x], top * (1 - v) + bottom * v) < 1e-5


def test_what_trains_has_a_gradient_and_its_own_name() -> None:
    encoder = MultiEncoder([*two(), HfEncoder(str(dinov2())), small(8)], grid=[4, 4]).train()
    sum(grid.square().sum() for grid in encoder(pixels()).grids).backward()
    named = dict(encoder.named_parameters())
    assert [name for name, p in encoder.trainable() if p.grad is None or named[name] is not p] == []
    assert named.keys() - {name for name, _ in encoder.trainable()} == {"tower.2.tower.embeddings.mask_token"}


def test_building_draws_no_random_numbers_and_keeps_modes() -> None:
    children = [HfEncoder(str(siglip())), HfEncoder(str(clip()))]
    children[1].train()
    torch.manual_seed(5)
    MultiEncoder(children)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert children[1].training and not children[0].tower.training


def test_sources() -> None:
    one = MultiEncoder(two()).source
    assert one == MultiEncoder([*two(), PatchEncoder()]).source is not None, "raw patches have no weights to name"
    assert one != MultiEncoder(two()[::-1]).source
    assert MultiEncoder([*two(), ScratchEncoder(64, 16, 32, 48, 1, 2)]).source is None


@torch.no_grad()
def test_pooled() -> None:
    pools = HfEncoder(str(siglip()), pooled=True).eval()
    encoder = MultiEncoder([HfEncoder(str(clip())), pools], pooled=True).eval()
    seen = encoder(pixels())
    assert encoder.pooled_width == 32 and seen.pooled is not None and torch.equal(seen.pooled, pools(pixels()).pooled)
    assert MultiEncoder([pools])(pixels()).pooled is None
    with pytest.raises(UserError, match=r"encoders\.<i>\.pooled=true"):
        MultiEncoder(two(), pooled=True)


def test_an_adapter_reaches_every_tower() -> None:
    encoder = MultiEncoder([*two(), small(32)], grid=[4, 4])
    encoder.tower = LoraAdapter(parts=("encoder",), r=2).wrap(encoder.tower)
    lora = {name.split(".")[1] for name, _ in encoder.trainable() if "lora" in name}
    assert lora == {"0", "1", "2"} and len(encoder(pixels()).grids) == 4


@pytest.mark.parametrize(
    ("encoders", "keywords", "words"),
    [
        (lambda: [], {}, r"encoder\.encoders is empty"),
        (two, {"combine": "sum"}, r"combine=sum is unknown; choose from channel, token, average"),
        (
            lambda: [*two(), small()],
            {},
            r"combine=channel needs equal grids, not 4x4, 4x4, 4x4, 2x2; set encoder\.grid",
        ),
        (
            lambda: [*two(), PatchEncoder()],
            {"combine": "token"},
            r"one width, not 32, 32, 32, 768; use combine=channel",
        ),
        (two, {"grid": [4]}, r"encoder\.grid=\[4\] is not a grid"),
    ],
)
def test_mistakes_are_named(encoders: Any, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MultiEncoder(encoders(), **keywords)


# those with weights elsewhere are held to theirs in test_hub.py
WEIGHTS_HERE = [path for path in choices("encoder") if "path" not in list(OmegaConf.load(path))]


@pytest.mark.parametrize("path", WEIGHTS_HERE, ids=lambda p: p.stem)
@torch.no_grad()
def test_every_choice_keeps_its_word(path: Path) -> None:
    """Widths and grids are those it says, on pixels as its geometry makes them."""
    encoder = instantiate(tiny.loaded(path)).eval()
    image = torch.from_numpy(encoder.preprocess(picture(1, (90, 70))))
    seen = encoder(torch.stack([image, image]))
    rows, columns = encoder.hw
    assert torch.cat(seen.grids, -1).shape == (2, rows * columns, encoder.width)
    assert seen.hw.tolist() == [[rows, columns]] * 2 and seen.pooled is None
    assert {name for name, _ in encoder.trainable()} <= {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize("combine", ["channel", "token", "average"])
def test_in_a_model(combine: Any) -> None:
    model = vlm(encoder=MultiEncoder(two(), combine=combine))
    assert model.tokens_per_image == (48 if combine == "token" else 16)
    batch = collator(model)(SAMPLES)
    model(batch).logits.logsumexp(-1).sum().backward()
    assert [name for name, p in model.parts()["encoder"] if p.grad is None] == []
    assert len(model.generate(collator(model).ask(SAMPLES[:2]), 2)) == 2
