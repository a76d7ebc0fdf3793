"""Encoders that name weights of the hub, without a network: their architecture at full size on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.tiny import SAMPLES, choices, clip, collator, dinov2, picture, qwen2, siglip, vlm, worst
from transformers import CLIPVisionModel, Dinov2Model, PreTrainedModel, SiglipVisionModel

from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.lm.hf import HfLanguageModel

HUB = [path for path in choices("encoder") if "architecture" in tiny.loaded(path)]
WHOLE = {  # weights of the whole vision tower, in millions, as its model card or paper has it
    "siglip_so400m_384": 428.2,
    "siglip_so400m_224": 427.7,
    "siglip_base_224": 92.9,
    "siglip2_base_224": 92.9,
    "siglip2_so400m_384": 428.2,
    "clip_vit_l14_336": 303.5,
    "clip_vit_b32": 87.5,
    "dinov2_small": 22.1,
    "dinov2_base": 86.6,
    "dinov2_large": 304.4,
    "eva_clip_g": 985.9,
}
GRID = {"384": 27, "336": 24, "224": 16}
TOWERS: dict[str, tuple[Path, type[PreTrainedModel], int]] = {
    "siglip": (siglip(), SiglipVisionModel, 0),
    "clip": (clip(), CLIPVisionModel, 1),
    "dinov2": (dinov2(), Dinov2Model, 1),
}


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_the_architecture_of_an_id(path: Path) -> None:
    config = tiny.loaded(path)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", config.path)
    with torch.device("meta"):
        encoder = instantiate(config)
        whole = instantiate(config, layers=None, pooled=True)
        pixels = torch.zeros(2, 3, encoder.preprocess.height, encoder.preprocess.width, dtype=torch.uint8)
    assert {p.device.type for p in encoder.parameters()} == {"meta"} and encoder.source is None
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(WHOLE[path.stem] * 1e6, rel=2e-3)
    seen = encoder(pixels)
    rows, columns = encoder.hw
    assert seen.grids[0].shape == (2, rows * columns, encoder.width)
    title = path.read_text().splitlines()[0]
    assert f"{rows} x {columns} features" in title and f"of width {encoder.width}" in title


def test_every_id_has_its_count() -> None:
    assert set(WHOLE) == {path.stem for path in HUB}


def test_an_unknown_id_without_an_architecture_is_named() -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"encoder\.path=no/such is neither"):
        HfEncoder("no/such")


def test_a_folder_is_read_without_its_weights(tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip() / name).read_bytes())
    with torch.device("meta"):
        encoder = HfEncoder(str(tmp_path), layers=[-2])
    loaded = HfEncoder(str(clip()), layers=[-2])
    assert {n: p.shape for n, p in encoder.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert encoder.preprocess == loaded.preprocess and encoder.hw == loaded.hw


@pytest.mark.parametrize("size", [96, [48, 96]], ids=str)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_another_size_interpolates_the_positions(name: str, size: int | list[int]) -> None:
    """As transformers' own tower does when told to."""
    folder, kind, special = TOWERS[name]
    encoder = HfEncoder(str(folder), layers=[-2], image_size=size).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert encoder.hw == (height // 16, width // 16)
    pixels = torch.from_numpy(encoder.preprocess(picture(3, (200, 150))))[None]
    assert pixels.shape == (1, 3, height, width)
    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.preprocess.mean, encoder.preprocess.std))
    told = {} if kind is Dinov2Model else {"interpolate_pos_encoding": True}
    out = theirs(pixel_values=(pixels / 255 - mean) / std, output_hidden_states=True, **told)
    assert worst(encoder(pixels).grids[0], out.hidden_states[-2][:, special:]) < 1e-5
    assert encoder(pixels).hw.tolist() == [[height // 16, width // 16]]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")], ids=str
)
def test_frozen_towers_in_half_precision(dtypes: tuple[str, str], autocast: bool) -> None:
    """The connector between them learns, with and without autocast, and the answers come."""
    whole = vlm()
    model = vlm(
        encoder=HfEncoder(str(siglip()), layers=[-2], dtype=dtypes[0]),
        lm=HfLanguageModel(str(qwen2()), dtype=dtypes[1]),
    )
    assert next(model.encoder.parameters()).dtype == getattr(torch, dtypes[0])
    assert next(model.lm.parameters()).dtype == getattr(torch, dtypes[1])
    batch = collator(model)(SAMPLES)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(batch).logits.float()
        out.logsumexp(-1).sum().backward()
        assert len(model.generate(collator(model).ask(SAMPLES[:2]), 2)) == 2
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.connector.parameters())
    want = whole(batch).logits
    assert worst(out, want) < 0.1 * float(want.detach().std())
