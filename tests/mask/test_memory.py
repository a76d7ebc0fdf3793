"""Every memory mask of conf/memory_mask: a plain double loop over positions and images, by hand, and by Hydra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.tiny import ADJACENT, SAMPLES, TEXT_ONLY, TWO_IMAGES, chat, choices, picture, tokenizer
from torch import Tensor

from vlmlab.contracts.parts import MemoryMask
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Images, Kind, Layout, Role
from vlmlab.data.collate import Collator

MASKS = choices("memory_mask")
AT_THE_END = Sample("end", (picture(8),), (Turn("what is red<image>", "blue"),))
SCENES = [*SAMPLES, AT_THE_END]
Where = tuple[Layout, Images]


def mask(path: Path) -> MemoryMask:
    return instantiate(OmegaConf.load(path))


def collated(tokens: int, pack_length: int | None, left: bool = False) -> Where:
    """The scenes as the collator writes them, with `tokens` positions an image."""
    collate = Collator(
        encoder=chat(tokens),
        resize=lambda x: x.transpose(2, 0, 1),
        pad_id=tokenizer().pad_token_id,
        pack_length=pack_length,
    )
    alone = [[i] for i in range(len(SCENES))]
    encoded = [collate.encoder.train(sample) for sample in SCENES]
    batch = collate._batch(SCENES, encoded, alone, left=True) if left else collate(SCENES)
    return batch.layout, batch.images


def placed(place: list[int], length: int, answers: list[int], segments: list[int], images: list[int]) -> Where:
    """One row of text with images at these places: which positions are answers, whose they are, and whose images."""
    role = torch.tensor([[Role.ANSWER if i in answers else Role.USER for i in range(length)]])
    none = torch.full_like(role, -1)
    segment = torch.tensor([segments])
    kind = torch.where(segment < 0, int(Kind.PAD), int(Kind.TEXT))
    layout = Layout(kind, none, none, segment, role, torch.arange(length)[None])
    zero = torch.zeros(len(place), dtype=torch.long)
    hw = torch.full((len(place), 2), 8)
    ids = [str(i) for i in range(len(place))]
    return layout, Images(zero, torch.tensor(images), torch.tensor(place), zero, zero, zero, hw, zero, ids)


def wheres() -> dict[str, Where]:
    edges = placed([0, 2, 2, 3, 6], 6, [1, 3], [0, 0, 0, 0, 0, 0], [0] * 5)  # also before all, and after an answer
    packed = placed([3, 3, 5, 7], 8, [2, 4], [0, 0, 0, 1, 1, -1, -1, -1], [0, 1, 1, 1])  # an image ends the first
    layout, images = collated(0, None, left=True)
    return {
        "tokens": collated(3, None),
        "tokens, left": collated(2, None, left=True),
        "tokens, packed": collated(2, 1000),
        "no tokens": collated(0, None),
        "no tokens, left": (layout, images),
        "no tokens, packed": collated(0, 1000),
        "generated": (layout.extended(layout.kind.shape[1] + 3), images),
        "edges": edges,
        "packed edges": packed,
        "no image": (edges[0], Images.none()),
    }


WHERES = wheres()


# -- the rules once more, for one position i and one image k -----------------------------------------------------------


class Scene:
    """A batch as plain lists."""

    def __init__(self, layout: Layout, images: Images) -> None:
        self.kind, self.segment, self.role = (getattr(layout, n).tolist() for n in ("kind", "segment", "role"))
        self.row, self.place, self.owner, self.tile, self.frame = (
            getattr(images, n).tolist() for n in ("row", "place", "segment", "tile", "frame")
        )

    def own(self, b: int, i: int, k: int) -> bool:
        return self.kind[b][i] != Kind.PAD and self.row[k] == b and self.segment[b][i] == self.owner[k]

    def answered_between(self, b: int, i: int, k: int) -> bool:
        """Whether one of the tokens from i up to the one before the image is an answer."""
        return any(self.role[b][m] == Role.ANSWER for m in range(i, self.place[k]))

    def same_picture(self, first: int, second: int) -> bool:
        """Whether all after the first up to the second go on with what it began."""
        return all(self.tile[k] or self.frame[k] for k in range(first + 1, second + 1))


def before(scene: Scene, b: int, i: int, k: int) -> bool:
    return scene.own(b, i, k) and scene.place[k] <= i


def latest(scene: Scene, b: int, i: int, k: int) -> bool:
    begun = [m for m in range(len(scene.row)) if before(scene, b, i, m)]
    return k in begun and scene.same_picture(k, begun[-1])


def sample(scene: Scene, b: int, i: int, k: int) -> bool:
    return scene.own(b, i, k) and not scene.answered_between(b, i, k)


RULES: dict[str, Callable[[Scene, int, int, int], bool]] = {"before": before, "latest": latest, "sample": sample}


def loop(name: str, layout: Layout, images: Images) -> Tensor:
    assert name in RULES, f"{name} has no rule here"
    scene, (rows, length) = Scene(layout, images), layout.kind.shape
    out = torch.zeros(rows, length, len(images), dtype=torch.bool)
    for b in range(rows):
        for i in range(length):
            for k in range(len(images)):
                out[b, i, k] = RULES[name](scene, b, i, k)
    return out


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_matrix_equals_the_double_loop(path: Path, where: str) -> None:
    layout, images = WHERES[where]
    got = mask(path)(layout, images, torch.arange(layout.kind.shape[1]))
    assert got.dtype == torch.bool
    assert torch.equal(got, loop(path.stem, layout, images))


@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_tiles_and_frames_of_one_picture_are_seen_together(path: Path) -> None:
    layout, images = placed([1, 1, 2, 2, 4, 4], 6, [3], [0] * 6, [0] * 6)
    for changed in ("tile", "frame"):
        parts = replace(images, **{changed: torch.tensor([0, 1, 0, 1, 0, 1])})
        got = mask(path)(layout, parts, torch.arange(6))
        assert torch.equal(got, loop(path.stem, layout, parts))
        if path.stem == "latest":
            assert got[0].sum(1).tolist() == [0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_rows_of_any_queries_equal_those_of_the_whole(path: Path) -> None:
    for layout, images in WHERES.values():
        whole = mask(path)(layout, images, torch.arange(layout.kind.shape[1]))
        q = torch.tensor([5, 0, 3])
        assert torch.equal(mask(path)(layout, images, q), whole[:, q])


GOLDEN = {  # user, image 0 | user, answer | images 1 and 2, user, answer, user | image 3 after it
    "before": ["x...", "x...", "xxx.", "xxx.", "xxx."],
    "latest": ["x...", "x...", "..x.", "..x.", "..x."],
    "sample": ["x...", "x...", "xxx.", "xxx.", "xxxx"],
}


@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_golden_tables(path: Path) -> None:
    layout, images = placed([0, 2, 2, 5], 5, [1, 3], [0] * 5, [0] * 4)
    got = mask(path)(layout, images, torch.arange(5))[0]
    assert ["".join("x" if cell else "." for cell in row) for row in got] == GOLDEN[path.stem]


def test_adjacent_images_and_text_alone() -> None:
    """Through the collator: of two images side by side ``latest`` shows the second; a text sample sees none."""
    layout, images = WHERES["no tokens"]
    shown = {path.stem: mask(path)(layout, images, torch.arange(layout.kind.shape[1])) for path in MASKS}
    row = SCENES.index(ADJACENT)
    assert shown["before"][row].sum(1).max() == 2 and shown["latest"][row].sum(1).max() == 1
    assert [images.ids[k] for k in shown["latest"][row].any(0).nonzero()[:, 0]] == [f"{ADJACENT.id}#1"]
    assert all(not table[SCENES.index(TEXT_ONLY)].any() for table in shown.values())
    assert shown["sample"][SCENES.index(TWO_IMAGES)].sum() > shown["before"][SCENES.index(TWO_IMAGES)].sum()


# -- how a fusion's file chooses one -----------------------------------------------------------------------------------

FUSION = """\
defaults:
  - /memory_mask@sees: before
  - _self_
_target_: builtins.dict
size: 3
"""


@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_a_fusion_chooses_by_its_defaults(path: Path, tmp_path: Path) -> None:
    (tmp_path / "fusion").mkdir()
    (tmp_path / "fusion" / "probe.yaml").write_text(FUSION)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(MASKS[0].parents[1]), version_base="1.3"):
        search = [f"hydra.searchpath=[{tmp_path}]", "fusion=probe"]
        plain = compose("train", search, return_hydra_config=False)
        chosen = compose("train", [*search, f"memory_mask@fusion.sees={path.stem}"])
    assert instantiate(plain.fusion)["sees"].__class__.__name__ == "ImagesBefore"
    assert instantiate(chosen.fusion)["sees"].__class__ is mask(path).__class__
    assert set(chosen.fusion) == {"_target_", "sees", "size"} and "memory_mask" not in chosen
