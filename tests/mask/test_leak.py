"""The leak rule put to masks when a model is built: what ships passes, what leaks is refused by a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.tiny import choices
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion
from vlmlab.contracts.tensors import Images, Kind, Layout, Role
from vlmlab.fusion.several import SeveralFusion
from vlmlab.mask.base import ground, not_later, pair, same_era, same_place
from vlmlab.mask.leak import (
    _closure,
    _forbidden,
    _scenes,
    check_fusion,
    check_mask,
    check_memory_mask,
    shows_prompt,
    written,
)
from vlmlab.mask.memory.base import begun, of_sample
from vlmlab.model.build import build_model

MASKS, MEMORY = choices("mask"), choices("memory_mask")


def built(path: Path) -> Any:
    return instantiate(OmegaConf.load(path))


# -- what ships --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_every_mask_keeps_its_word(path: Path) -> None:
    mask = built(path)
    assert shows_prompt(mask) == getattr(mask, "shows_prompt", False)
    if not getattr(mask, "leaks", False):
        return check_mask(mask, "mask")
    with pytest.raises(UserError) as caught:
        check_mask(mask, "recipe.stages.tune.mask")
    assert str(caught.value) == (
        "recipe.stages.tune.mask=vlmlab.mask.visual_rows_open.VisualRowsOpen leaks: it shows position 2 (image) the "
        "answer token 5; restrict what it opens beyond j <= i by ground() and same_era() of vlmlab.mask.base, or use "
        "mask=bidir"
    )


@pytest.mark.parametrize("path", MEMORY, ids=lambda p: p.stem)
def test_every_memory_mask_passes(path: Path) -> None:
    check_memory_mask(built(path), "fusion.sees")


def test_it_works_where_another_device_is_the_default() -> None:
    mask = built(next(path for path in MASKS if path.stem == "bidir"))
    with torch.device("meta"):
        check_mask(mask, "mask")
        check_memory_mask(built(MEMORY[0]), "sees")
        assert not shows_prompt(mask)


# -- planted masks -----------------------------------------------------------------------------------------------------


class Everything:
    """What a first attempt looks like: no rule at all."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return ground(torch.ones(1, 1, 1, dtype=torch.bool), layout, q)


class ImagesOfAllTurns:
    """Images see each other, whatever was answered between them: leaks through two layers only."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_visual, k_visual = pair(layout.visual, q)
        return ground(not_later(layout, q) | (q_visual & k_visual), layout, q)


class PrefixOfAllTurns:
    """Whatever is not an answer sees each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_answer, k_answer = pair(layout.role == Role.ANSWER, q)
        return ground(not_later(layout, q) | (~q_answer & ~k_answer), layout, q)


class LaterQuestions:
    """Answers stay hidden, yet images of a later turn, which know nothing but themselves, are shown."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_visual, k_visual = pair(layout.visual, q)
        rule = torch.where(q_visual, same_place(layout, q), not_later(layout, q) | k_visual)
        return ground(rule, layout, q)


class AnswersBothWays:
    """The words of an answer see each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_answer, k_answer = pair(layout.role == Role.ANSWER, q)
        return ground(not_later(layout, q) | (q_answer & k_answer), layout, q)


class AcrossSamples:
    """Packed samples see each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_valid, k_valid = pair(layout.valid, q)
        return (not_later(layout, q) & q_valid & k_valid) | same_place(layout, q)


class AcrossBranches:
    """The questions of a tree see each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_segment, k_segment = pair(layout.segment, q)
        q_valid, k_valid = pair(layout.valid, q)
        rule = not_later(layout, q) & (q_segment == k_segment) & q_valid & k_valid
        return rule | same_place(layout, q) & ~q_valid


class Padding:
    """Padding is read."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_segment, k_segment = pair(layout.segment, q)
        return not_later(layout, q) & ((q_segment == k_segment) | (k_segment == -1))


class Blind:
    """An image does not see itself."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return ground(not_later(layout, q), layout, q) & ~(same_place(layout, q) & pair(layout.visual, q)[0])


class NothingForPadding:
    """A softmax over nothing where padding asks."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return ground(not_later(layout, q), layout, q) & pair(layout.valid, q)[0]


class Additive:
    """Numbers to add to scores."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return ground(not_later(layout, q), layout, q).float()


class Broadcast:
    """One table for all rows."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return not_later(layout, q)


class Forgetful:
    """Another answer every time."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        self.asked += 1
        rule = not_later(layout, q) & (pair(layout.visual, q)[0] | (self.asked % 2 == 0) | same_place(layout, q))
        return ground(rule, layout, q)


class ByIndexOfTheQuery:
    """Reads where in `q` a query is, not which position it is."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        keys = torch.arange(layout.kind.shape[1])
        rule = (keys <= torch.arange(len(q))[:, None])[None] | same_place(layout, q)
        return ground(rule, layout, q)


class OfTheWholeBatch:
    """Changes with what the second row holds."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        if layout.kind[1].eq(Kind.VISUAL).any():
            return ground(not_later(layout, q), layout, q)
        return ground(same_place(layout, q), layout, q)


LEAKS: list[tuple[Callable[[], Any], str]] = [
    (Everything, r"leaks: it shows position \d+ \(system\) the answer token \d+"),
    (ImagesOfAllTurns, r"leaks: it shows position \d+ \(image\), through other positions, the answer token \d+"),
    (PrefixOfAllTurns, r"leaks: it shows position \d+ \(\w+\), through other positions, the answer token \d+"),
    (LaterQuestions, r"leaks: it shows position \d+ \(\w+\) a later turn's image token \d+"),
    (AnswersBothWays, r"leaks: it shows position \d+ \(answer\) the answer token \d+"),
    (AcrossSamples, r"leaks: it shows position \d+ \(image\) another packed sample's token \d+"),
    (AcrossBranches, r"leaks: it shows position \d+ \(user\) the token \d+ of a question that it does not belong to"),
    (Padding, r"leaks: it shows position \d+ \(system\) the padding at \d+"),
    (Blind, r"does not show image position \d+ itself; allow \(i, i\) for every position"),
    (NothingForPadding, r"does not show padding position \d+ any key"),
    (Additive, r"gives torch.float32 \(\d+, \d+, \d+\) for \(B, Q, S\) = .*; return a bool tensor of shape"),
    (Broadcast, r"gives torch.bool \(1, \d+, \d+\) for \(B, Q, S\)"),
    (Forgetful, "gives other results when asked again"),
    (ByIndexOfTheQuery, "gives other results when asked again, or for some of the positions or rows alone"),
    (OfTheWholeBatch, "gives other results when asked again, or for some of the positions or rows alone"),
]


@pytest.mark.parametrize(("kind", "words"), LEAKS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_mask_is_refused_in_one_sentence(kind: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_mask(kind(), "mask")
    said = str(caught.value)
    assert said.startswith(f"mask=tests.mask.test_leak.{kind.__name__} ") and said.endswith(", or use mask=bidir")  # type: ignore[attr-defined]
    assert re.search(words, said), said
    assert "\n" not in said


class PrefixOfOneTurn:
    """The same with the leak rule."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_answer, k_answer = pair(layout.role == Role.ANSWER, q)
        return ground(not_later(layout, q) | (~q_answer & ~k_answer & same_era(layout, q)), layout, q)


class Diagonal:
    """No position sees anything else."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return same_place(layout, q).expand(len(layout.kind), -1, -1)


@pytest.mark.parametrize("mask", [PrefixOfOneTurn(), Diagonal()])
def test_a_foreign_mask_that_keeps_the_rule_passes(mask: Any) -> None:
    check_mask(mask, "mask")


def test_a_foreign_mask_is_refused_where_a_model_is_built() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(MASKS[0].parents[1]), version_base="1.3"):
        cfg = compose("train", ["fusion=none", "lm=scratch", f"mask._target_={__name__}.Everything"])
    with pytest.raises(
        UserError, match=rf"^mask={__name__}.Everything leaks: it shows position \d+ \(system\) the answer"
    ):
        build_model(cfg)


@pytest.mark.parametrize("path", MASKS, ids=lambda p: p.stem)
def test_a_stage_that_learns_the_prompt_refuses_what_shows_it(path: Path) -> None:
    mask = built(path)
    if getattr(mask, "shows_prompt", False):
        with pytest.raises(UserError, match=r"shows words of the prompt|leaks"):
            check_mask(mask, "mask", prompt_learnt=True)
    else:
        check_mask(mask, "mask", prompt_learnt=True)


# -- how it is found ---------------------------------------------------------------------------------------------------


def test_the_closure_is_that_of_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(3, 12, 12, generator=generator) < 0.12
    got = _closure(allowed)
    for b in range(3):
        for i in range(12):
            reached, new = {i}, {i}
            while new:
                new = {j for k in new for j in range(12) if allowed[b, k, j]} - reached
                reached |= new
            assert {j for j in range(12) if got[b, i, j]} == reached


def test_the_scenes_hold_what_the_rule_is_about() -> None:
    """Several turns and images, side by side and in the text; packed samples; padding; tiles; images without places."""
    right, left, bare, *trees = _scenes()
    layout, images = right.layout, right.images
    assert (~layout.valid[:, -1]).any() and (~left.layout.valid[:, 0]).any() and layout.valid[:, 0].all()
    assert bare.layout.valid.all() and not bare.layout.visual.any() and len(bare.images) == 0
    assert layout.segment.max() == 3 and layout.era.max() >= 2 and layout.tile.max() == 2
    assert (images.tokens == 0).any() and images.turn.max() == 2
    at = images.place.clamp(max=len(right.q) - 1)
    visual = images.tokens > 0
    assert torch.equal(layout.tile[images.row, at][visual], images.tile[visual])
    assert torch.equal(layout.segment[images.row, at][visual], images.segment[visual])
    assert (layout.segment[images.row, at] != images.segment).any(), "an image ends its sample"
    assert layout.visual.sum() == images.tokens.sum()
    assert left.layout.visual.sum() == left.images.tokens.sum()
    assert (left.images.place == len(left.q)).any(), "an image ends the row"
    row = layout.segment[7].tolist()
    assert [layout.position[7, row.index(s)] for s in range(4)] == [0] * 4
    assert all(int(layout.branch.max()) == -1 for layout in (right.layout, left.layout, bare.layout))
    assert all(len(scene.layout.branch.unique()) == 4 and scene.layout.segment.max() == 2 for scene in trees)


def test_a_tree_is_written_as_its_rows() -> None:
    """Positions go on after what is shared, and each question counts its own answers after the shared ones."""
    layout = written(("u0ua[uaua][ua]", "s[u][a]|0[ua][ua]"), left=False).layout
    assert layout.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5], [0, 1, 1, 0, 1, 2, 1, 2, 0, 0]]
    assert layout.branch.tolist() == [[-1] * 4 + [0] * 4 + [1] * 2, [-1, 0, 1, -1, 0, 0, 1, 1, -1, -1]]
    assert layout.era[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 1, 1]
    assert layout.era[1, :8].tolist() == [0] * 8


def test_what_is_forbidden_by_a_double_loop() -> None:
    for scene in _scenes():
        layout, got = scene.layout, _forbidden(scene.layout)
        rows, length = layout.kind.shape
        for b in range(rows):
            era = layout.era[b].tolist()
            for i in range(length):
                for j in range(length):
                    real, own = bool(layout.valid[b, i]), bool(layout.segment[b, i] == layout.segment[b, j])
                    own &= int(layout.branch[b, j]) in (-1, int(layout.branch[b, i]))
                    answer = bool(layout.role[b, j] == Role.ANSWER)
                    want = real and (not own or (j > i and (answer or era[j] > era[i])))
                    assert bool(got[b, i, j]) == want


# -- memory masks ------------------------------------------------------------------------------------------------------


class AllOfSample:
    """Images of later turns as well."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        return of_sample(layout, images, q)


class AllOfRow:
    """Images of other packed samples as well."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        row = torch.arange(len(layout.kind))[:, None, None] == images.row
        return row & begun(layout, images, q) & layout.valid[:, q, None]


class OfOtherRows:
    """Images of every row."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        return begun(layout, images, q) & layout.valid[:, q, None]


class SeenByPadding:
    """Padding sees what is in its row."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        row = torch.arange(len(layout.kind))[:, None, None] == images.row
        return (row & ~layout.valid[:, q, None]) | of_sample(layout, images, q) & begun(layout, images, q)


class WithoutRows:
    """One table for all rows."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        return begun(layout, images, q)


class ByIndex:
    """Reads where in `q` a query is."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        return of_sample(layout, images, q) & begun(layout, images, q) & (torch.arange(len(q)) % 2 == 0)[:, None]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (AllOfSample, r"leaks: it shows position \d+ \(\w+\) an image of a later turn; restrict it by of_sample\(\)"),
        (AllOfRow, r"leaks: it shows position \d+ \(\w+\) an image of another sample"),
        (OfOtherRows, r"leaks: it shows position \d+ \(\w+\) an image of another sample"),
        (SeenByPadding, r"leaks: it shows position \d+ \(padding\) an image of another sample"),
        (WithoutRows, r"gives torch.bool \(1, \d+, \d+\) for \(B, Q, I\)"),
        (ByIndex, "gives other results when asked again, or for some of the positions"),
    ],
)
def test_a_planted_memory_mask_is_refused(kind: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_memory_mask(kind(), "fusion.sees")
    said = str(caught.value)
    assert said.startswith(f"fusion.sees=tests.mask.test_leak.{kind.__name__} ")  # type: ignore[attr-defined]
    assert re.search(words, said), said
    assert "\n" not in said and said.endswith("or use the memory mask before")


class Looking(Fusion):
    """A fusion that holds a memory mask."""

    in_sequence = False
    starts_as = "text_only"

    def __init__(self, sees: Any) -> None:
        super().__init__()
        self.sees = sees


def test_the_memory_masks_of_a_fusion_are_found_wherever_they_are() -> None:
    sound = Looking(built(MEMORY[0]))
    check_fusion(SeveralFusion({"a": sound, "b": Looking(built(MEMORY[1]))}))
    with pytest.raises(UserError, match=r"^fusion\.parts\.b\.sees=.*AllOfRow leaks"):
        check_fusion(SeveralFusion({"a": sound, "b": Looking(AllOfRow())}))
    with pytest.raises(
        UserError, match=r"^fusion\.sees=latest is not a memory mask; write memory_mask@fusion\.sees=latest$"
    ):
        check_fusion(Looking("latest"))


def test_a_mask_without_a_class_is_named_as_well() -> None:
    with pytest.raises(UserError, match=r"mask=builtins\.function leaks"):
        check_mask(lambda layout, q: Everything()(layout, q), "mask")
