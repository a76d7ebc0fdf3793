"""A cache before an encoder: the same features to the bit, kept or not; never those of another encoder or image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor, nn

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.cache.address import tensors
from vlmlab.cache.disk import DiskCache
from vlmlab.cache.none import NoCache
from vlmlab.cache.shelf import SUFFIX
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.tensors import Visual
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.preprocess import Preprocess


class Company(Encoder):
    """An encoder whose last bits depend on the size of the batch, as kernels may; counts what it is shown."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tower = nn.Linear(3 * 8 * 8, 5, bias=False)
        with torch.no_grad():
            self.tower.weight.copy_(torch.randn(5, 192, generator=torch.Generator().manual_seed(3)))
        self.drop = nn.Dropout(dropout)
        self.width, self.pooled_width, self.preprocess, self.source = 5, 5, Preprocess(8, 8), None
        self._shown = 0  # private, as what an encoder is must not change while it looks

    @property
    def hw(self) -> tuple[int, int]:
        return 1, 1

    def forward(self, pixels: Tensor) -> Visual:
        self._shown += len(pixels)
        grid = self.drop(self.tower(pixels.flatten(1).float() / 255))[:, None] + 1e-3 * len(pixels)  # (I, 1, 5)
        return Visual([grid], None, torch.ones(len(pixels), 2, dtype=torch.long))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters())


class Holder(nn.Module):
    """A model as far as a cache knows it."""

    def __init__(self, encoder: Encoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.cache: Any = NoCache()


def frozen(encoder: Encoder) -> Encoder:
    return encoder.eval().requires_grad_(False)


def pixels(count: int, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


Look = Callable[[Encoder, Tensor], Visual]


def served(
    folder: Path, encoder: Encoder, look: Callable[[Look], Any], said: list[str] | None = None, **settings: Any
) -> tuple[Any, dict[str, int]]:
    """What `look` returns, given what a model looks through while a cache serves it; and the counts."""
    model = Holder(encoder)
    lines = said if said is not None else []
    with DiskCache(str(folder), **settings).serving(model, lines.append) as used:
        found = look(lambda encoder, images: model.cache(encoder, images))
    assert isinstance(model.cache, NoCache)
    return found, used.get("cache", {})


def seen(folder: Path, encoder: Encoder, images: Tensor, said: list[str] | None = None, **settings: Any) -> Visual:
    return served(folder, encoder, lambda look: look(encoder, images), said, **settings)[0]


def equal(a: Visual, b: Visual) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype and x.shape == y.shape for x, y in pairs)


def alone(encoder: Encoder, images: Tensor) -> Visual:
    """What the encoder sees of every image by itself."""
    each = [encoder(image[None]) for image in images]
    joined = [torch.cat(parts) for parts in zip(*(tensors(visual) for visual in each), strict=True)]
    count = len(each[0].grids)
    return Visual(joined[1 : 1 + count], joined[1 + count] if joined[1 + count :] else None, joined[0])


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "siglip pooled": lambda: HfEncoder(str(tiny.siglip()), pooled=True),
    "two layers": lambda: HfEncoder(str(tiny.siglip()), layers=[0, -1]),
    "clip": lambda: HfEncoder(str(tiny.clip()), layers=[-2]),
    "dinov2": lambda: HfEncoder(str(tiny.dinov2())),
    "interpolated": lambda: HfEncoder(str(tiny.siglip()), image_size=96),
    "half": lambda: HfEncoder(str(tiny.siglip()), dtype="bfloat16"),
    "multi": lambda: MultiEncoder([HfEncoder(str(tiny.siglip())), HfEncoder(str(tiny.clip()), layers=[1, 2])]),
}


@pytest.mark.parametrize("name", list(ENCODERS))
def test_kept_or_computed_features_are_the_encoders(tmp_path: Path, name: str) -> None:
    encoder = frozen(ENCODERS[name]())
    images = pixels(5, encoder.preprocess.height)
    expected = alone(encoder, images)
    cold, before = served(tmp_path, encoder, lambda look: look(encoder, images))
    warm, after = served(tmp_path, frozen(ENCODERS[name]()), lambda look: look(encoder, images))
    assert equal(cold, expected) and equal(warm, expected)
    assert (before["hits"], before["misses"], after["hits"], after["misses"]) == (0, 5, 5, 0)
    assert before["written_bytes"] == after["read_bytes"] > 0 and not after["written_bytes"]
    batched = encoder(images)  # without a cache: equal but for the rounding of batched kernels
    for a, b in zip(tensors(warm), tensors(batched), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and tiny.worst(a.float(), b.float()) < 1e-4


def test_company_order_and_repetition_change_no_bit(tmp_path: Path) -> None:
    encoder = frozen(Company())
    images = pixels(6)
    assert not equal(alone(encoder, images), encoder(images))  # or this test could not fail
    for number, order in enumerate(([[0, 1, 2, 3, 4, 5]], [[5], [0, 0, 4], [1, 2], [3, 3]], [[2, 1], [0, 3, 4, 5]])):
        for folder in (tmp_path / "shared", tmp_path / str(number)):
            encoder._shown = 0

            def in_this_order(look: Look, order: list[list[int]] = order) -> list[Visual]:
                return [look(encoder, images[places]) for places in order]

            found, _ = served(folder, encoder, in_this_order)
            for places, visual in zip(order, found, strict=True):
                assert equal(visual, alone(Company(), images[places]))
            first = folder.name != "shared" or not number
            assert encoder._shown == 2 + (6 if first else 0)  # the probe twice, every image at most once


def test_rounded_features_are_rounded_whether_kept_or_not(tmp_path: Path) -> None:
    encoder = frozen(Company())
    images = pixels(3)
    exact = seen(tmp_path, encoder, images)
    expected = exact.grids[0].bfloat16().float()
    assert not torch.equal(exact.grids[0], expected)
    for _ in range(2):
        assert torch.equal(seen(tmp_path, encoder, images, dtype="bfloat16").grids[0], expected)
    assert equal(seen(tmp_path, encoder, images), exact)
    with pytest.raises(UserError, match=r"cache\.dtype=float16"):
        DiskCache(str(tmp_path), dtype="float16")  # type: ignore[arg-type]


def one_layer(encoder: Encoder) -> None:
    next(iter(encoder.parameters())).requires_grad_(True)


def adapted(encoder: Encoder) -> None:
    encoder.tower = LoraAdapter(parts=["encoder"], r=2).wrap(encoder.tower)


@pytest.mark.parametrize("change", [one_layer, adapted, lambda encoder: encoder.requires_grad_(True)])
def test_an_encoder_that_trains_is_left_alone(tmp_path: Path, change: Callable[[Encoder], Any]) -> None:
    encoder = frozen(HfEncoder(str(tiny.siglip())))
    change(encoder)
    said: list[str] = []
    found, used = served(tmp_path / "never", encoder, lambda look: look(encoder, pixels(2, tiny.SIZE)), said)
    assert equal(found, encoder(pixels(2, tiny.SIZE))) and found.grids[0].requires_grad
    assert said == ["feature cache: not used, the encoder trains"]
    assert not used and not (tmp_path / "never").exists()


def test_without_an_encoder_there_is_nothing_to_keep(tmp_path: Path) -> None:
    said: list[str] = []
    with DiskCache(str(tmp_path)).serving(Holder(None), said.append) as used:
        pass
    assert said == ["feature cache: not used, there is no encoder"] and not used


def test_an_encoder_that_learnt_in_between_is_another_one(tmp_path: Path) -> None:
    encoder = frozen(Company())
    images = pixels(3)
    before = seen(tmp_path, encoder, images)
    with torch.no_grad():
        encoder.tower.weight[0, 0] += 1e-3
    after = seen(tmp_path, encoder, images)
    assert equal(after, alone(encoder, images)) and not equal(after, before)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2


def test_an_encoder_that_answers_twice_differently_is_left_alone(tmp_path: Path) -> None:
    encoder = Company(dropout=0.5).requires_grad_(False).train()
    images = pixels(4)
    torch.manual_seed(0)
    expected = [encoder(images), encoder(images)]
    torch.manual_seed(0)
    said: list[str] = []
    found, used = served(tmp_path / "never", encoder, lambda look: [look(encoder, images) for _ in range(2)], said)
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))  # asking it drew no random number either
    assert "feature cache: not used, the encoder answers twice differently" in said
    assert not used["hits"] and not used["misses"] and not (tmp_path / "never").exists()


def test_images_of_two_sizes_and_two_precisions_do_not_mix(tmp_path: Path) -> None:
    encoder = frozen(HfEncoder(str(tiny.dinov2())))
    small, large = pixels(2, 64), pixels(2, 96)

    def all_ways(look: Look) -> list[Visual]:
        found = [look(encoder, small), look(encoder, large)]
        with torch.autocast("cpu", torch.bfloat16):
            return [*found, look(encoder, small)]

    with torch.autocast("cpu", torch.bfloat16):
        half = alone(encoder, small)
    for hits in (0, 6):
        found, used = served(tmp_path, encoder, all_ways)
        expected = [alone(encoder, small), alone(encoder, large), half]
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True)) and not equal(found[0], half)
        assert used["hits"] == hits
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3


def test_a_damaged_record_is_computed_anew_and_said(tmp_path: Path) -> None:
    encoder = frozen(Company())
    images = pixels(4)
    expected = seen(tmp_path, encoder, images)
    data = next(tmp_path.glob("*/*.data"))
    content = bytearray(data.read_bytes())
    content[20] ^= 64
    data.write_bytes(content)
    said: list[str] = []
    found, used = served(tmp_path, encoder, lambda look: [look(encoder, images), look(encoder, images)], said)
    assert all(equal(visual, expected) for visual in found)
    assert (used["damaged"], used["misses"], used["hits"]) == (1, 1, 7)
    assert any("damaged features" in line for line in said)
    assert served(tmp_path, encoder, lambda look: look(encoder, images))[1]["hits"] == 4


def test_a_full_cache_keeps_no_more_and_says_so_once(tmp_path: Path) -> None:
    encoder = frozen(Company())
    images = pixels(40)
    other = Company()
    other.tower.weight.data += 1
    seen(tmp_path, frozen(other), images)  # nobody uses it any more
    stale = {path.name for path in tmp_path.iterdir()}
    said: list[str] = []

    def one_by_one(look: Look) -> list[Visual]:
        return [look(encoder, images[k : k + 4]) for k in range(0, 40, 4)]

    limit = 3200
    found, used = served(tmp_path, encoder, one_by_one, said, max_gb=limit / 1e9)
    assert all(equal(visual, alone(encoder, images[4 * k : 4 * k + 4])) for k, visual in enumerate(found))
    assert 0 < used["written_bytes"] < limit
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= limit
    assert not stale & {path.name for path in tmp_path.iterdir()}
    assert [line for line in said if "nothing new is kept" in line] == [
        f"feature cache: {tmp_path}: cache.max_gb=3.2e-06 is reached; nothing new is kept"
    ]


def test_a_disk_that_refuses_changes_no_value(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    encoder, said = frozen(Company()), list[str]()
    images = pixels(3)
    found, used = served(tmp_path / "file" / "x", encoder, lambda look: [look(encoder, images) for _ in range(2)], said)
    assert all(equal(visual, alone(encoder, images)) for visual in found)
    assert (used["hits"], used["misses"]) == (0, 6)
    assert sum("Not a directory; nothing new is kept" in line for line in said) == 1


def test_a_model_looks_and_answers_through_the_cache(tmp_path: Path) -> None:
    model = tiny.vlm().requires_grad_(False)
    collate = tiny.collator(model)
    samples = [sample for sample in tiny.SAMPLES if sample.images]
    batch, asked = collate(samples), collate.ask(samples)
    expected = model(batch).logits, model.generate(asked, 3)
    images = batch.pixels.shape[0]
    for hits in (images, 2 * images):
        with DiskCache(str(tmp_path)).serving(model, lambda line: None) as used:
            found = model(batch).logits, model.generate(asked, 3)
        assert tiny.worst(found[0], expected[0]) < 1e-4 and found[1] == expected[1]
        assert used["cache"]["hits"] == hits  # the second time, and in answers, none is computed
    text = collate([tiny.TEXT_ONLY])
    with DiskCache(str(tmp_path)).serving(model, lambda line: None) as used:
        model(text)
    assert used["cache"]["hits"] == used["cache"]["misses"] == 0
