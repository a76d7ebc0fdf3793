"""The leak rule put to a mask: it is asked on small layouts, and refused where an answer could read what comes later.

A mask's own table is not enough: what one layer shows to an image, the next shows to the words that see the image. So
what a position *reaches* is computed, over any number of layers: the transitive closure of the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, Mask, MemoryMask
from vlmlab.contracts.tensors import Images, Kind, Layout, Role
from vlmlab.mask.memory.base import image_era, of_sample

CONVERSATIONS = (
    "su00uaau",  # a system line (or a soft prompt), an image between the user's words, an answer, the template's tail
    "ssu0u1uaau2uuau",  # two images with text between, and one of a later turn
    "00011uauuaa",  # images side by side, and a turn without one
    "u00'0''u1aa2ua",  # an image of three tiles, and an image after the words that it belongs to
    "000aaa",  # a plain prompt: an image and its caption
    "suuaauau",  # no image
    "^su^uau^^uaa^",  # images without positions: before all, in the text, two at once, after all
    "u0^uaa|1u22ua3ua|uua^|^00a",  # packed samples
)
"""One row each: s system, u user, a answer; a digit a visual token of that image, ' of its next tile; ^ an image that
takes no position; | the next packed sample; [] a question of a tree, after what it shares with the others."""

BARE = ("suuaauau",)

TREES = (
    "su00'0''11u[uuaau][uaauua][ua]",  # questions, of one turn or two, that share the images and a word
    "^su^[uuaau][uaa]",  # images without positions, one of them where the questions begin
    "u01uaau1u[uau][uuaau]",  # an earlier turn is shared, too
)
PACKED_TREES = ("su00[uuaau][uaa]|u0aau|^s^u[uaua][uuaau]",)


@dataclass(frozen=True)
class Scene:
    """Some conversations as a batch: their layout and images."""

    layout: Layout
    images: Images

    @property
    def q(self) -> Tensor:
        """(S,) all positions."""
        return torch.arange(self.layout.kind.shape[1])

    def what(self, row: int, at: int) -> str:
        """A position in words."""
        if self.layout.visual[row, at]:
            return "image"
        return Role(int(self.layout.role[row, at])).name.lower() if self.layout.valid[row, at] else "padding"


def check_mask(mask: Mask, key: str, prompt_learnt: bool = False) -> None:
    """Put a mask to the rule: no answer reads itself, a later answer or turn, another sample or branch, or padding.

    Args:
        mask: any mask.
        key: where it was chosen, for the sentence.
        prompt_learnt: whether it is for a stage that learns the prompt's words too (``prompt: text``).

    Raises:
        UserError: it breaks the rule, or is not a pure function of layout and positions with one (B, Q, S) bool result.
    """
    who = _Named(key, mask, "mask=bidir")
    with torch.device("cpu"):  # a model may be built on another one
        for scene in _scenes():
            _check(mask, who, scene)
    if prompt_learnt and shows_prompt(mask):
        said = "shows words of the prompt to those that predict them, and the stage learns them (prompt=text)"
        who.refuse(said, "set the stage's prompt=chat")


def check_memory_mask(mask: MemoryMask, key: str) -> None:
    """Put a memory mask to the rule: no position sees an image of another sample, or of a later turn.

    A connector may read what the user says in an image's turn, which comes after the answers before it.

    Args:
        mask: any memory mask.
        key: where it was chosen, for the sentence.

    Raises:
        UserError: it breaks the rule, or is not a pure function of its arguments with one (B, Q, I) bool result.
    """
    who = _Named(key, mask, "the memory mask before")
    with torch.device("cpu"):
        for scene in _scenes():
            _memory_table(mask, who, Scene(scene.layout, Images.none()))
            _check_memory(mask, who, scene)


def check_fusion(fusion: Fusion, key: str = "fusion") -> None:
    """Put the memory masks of a fusion, and of those inside it, to the rule: what they hold as `sees`.

    Raises:
        UserError: one breaks the rule, or is not a memory mask.
    """
    for name, part in fusion.named_modules():
        sees = getattr(part, "sees", None) if isinstance(part, Fusion) else None
        where = ".".join([key, *([name] if name else []), "sees"])
        if sees is not None and not callable(sees):
            raise UserError(f"{where}={sees} is not a memory mask; write memory_mask@{where}={sees}")
        if sees is not None:
            check_memory_mask(sees, where)


def shows_prompt(mask: Mask) -> bool:
    """Whether under a mask a position reaches a word of the prompt that is after it, in any number of layers."""
    with torch.device("cpu"):
        return any(_shows_prompt(mask, scene) for scene in _scenes())


@dataclass(frozen=True)
class _Named:
    """A mask as a user knows it, by its key and its class, and what to use instead."""

    key: str
    mask: object
    instead: str

    def refuse(self, said: str, remedy: str) -> NoReturn:
        """Raise the sentence."""
        kind = type(self.mask)
        raise UserError(f"{self.key}={kind.__module__}.{kind.__qualname__} {said}; {remedy}, or use {self.instead}")


def _check(mask: Mask, who: _Named, scene: Scene) -> None:
    layout, allowed = scene.layout, _table(mask, who, scene)
    seen = torch.where(layout.valid, allowed.diagonal(dim1=1, dim2=2), allowed.any(2))  # (B, S)
    for row, i in (~seen).nonzero()[:1].tolist():
        missing = "itself" if layout.valid[row, i] else "any key"
        who.refuse(f"does not show {scene.what(row, i)} position {i} {missing}", "allow (i, i) for every position")
    for row, i, j in (_closure(allowed) & _forbidden(layout)).nonzero()[:1].tolist():
        through = "" if allowed[row, i, j] else ", through other positions,"
        said = f"leaks: it shows position {i} ({scene.what(row, i)}){through} {_shown(scene, row, i, j)}"
        who.refuse(said, "restrict what it opens beyond j <= i by ground() and same_era() of vlmlab.mask.base")


def _check_memory(mask: MemoryMask, who: _Named, scene: Scene) -> None:
    layout, images = scene.layout, scene.images
    own = of_sample(layout, images, scene.q)
    later = image_era(layout, images) > layout.era[:, :, None]  # (B, S, I)
    for row, i, k in (_memory_table(mask, who, scene) & (~own | later)).nonzero()[:1].tolist():
        whose = "of a later turn" if own[row, i, k] else "of another sample"
        said = f"leaks: it shows position {i} ({scene.what(row, i)}) an image {whose}"
        who.refuse(said, "restrict it by of_sample() and not_of_later_turn() of vlmlab.mask.memory.base")


def _shows_prompt(mask: Mask, scene: Scene) -> bool:
    layout, q = scene.layout, scene.q
    word = (layout.kind == Kind.TEXT) & (layout.role != Role.ANSWER)
    later = (q[None, :] > q[:, None]) & word[:, None, :] & layout.valid[:, :, None]
    return bool((_closure(mask(layout, q)) & later).any())


def _table(mask: Mask, who: _Named, scene: Scene) -> Tensor:
    """(B, S, S) what a mask allows, once it has proved to be a function of layout and positions."""
    layout, q = scene.layout, scene.q
    allowed = mask(layout, q)
    _sound(who, allowed, (len(layout.kind), len(q), len(q)), "(B, Q, S)")
    some, rows = _some(q), (~layout.visual.any(1)).nonzero()[:, 0]  # the rows without an image
    same = _equal(mask(layout, q), allowed) and _equal(mask(layout.select(rows), some), allowed[rows][:, some])
    _pure(who, same)
    return allowed


def _memory_table(mask: MemoryMask, who: _Named, scene: Scene) -> Tensor:
    """(B, S, I) which images a mask shows, once it has proved to be a function of its arguments."""
    layout, images, q = scene.layout, scene.images, scene.q
    sees = mask(layout, images, q)
    _sound(who, sees, (len(layout.kind), len(q), len(images)), "(B, Q, I)")
    some = _some(q)
    _pure(who, _equal(mask(layout, images, q), sees) and _equal(mask(layout, images, some), sees[:, some]))
    return sees


def _some(q: Tensor) -> Tensor:
    """Half of the positions, in mixed order."""
    return (q * 7 + 3)[: len(q) // 2] % len(q)


def _sound(who: _Named, got: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if not isinstance(got, Tensor) or got.dtype != torch.bool or tuple(got.shape) != shape:
        described = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        who.refuse(f"gives {described} for {letters} = {shape}", f"return a bool tensor of shape {letters}")


def _pure(who: _Named, same: bool) -> None:
    if not same:
        said = "gives other results when asked again, or for some of the positions or rows alone"
        who.refuse(said, "make it a pure function of its arguments")


def _equal(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.equal(got, want)


def _closure(allowed: Tensor) -> Tensor:
    """(B, S, S) what every position depends on after any number of layers."""
    reached = allowed | torch.eye(allowed.shape[1], dtype=torch.bool)
    while True:
        further = (reached.float() @ reached.float()) > 0  # twice as many layers
        if torch.equal(further, reached):
            return reached
        reached = further


def _forbidden(layout: Layout) -> Tensor:
    """(B, S, S) what a real position must not reach: other samples and branches, padding, later answers and turns."""
    place = torch.arange(layout.kind.shape[1])
    answer, era = layout.role == Role.ANSWER, layout.era
    foreign = (layout.segment[:, :, None] != layout.segment[:, None, :]) | ~layout.valid[:, None, :]
    foreign |= (layout.branch[:, None, :] != -1) & (layout.branch[:, None, :] != layout.branch[:, :, None])
    later = (place[None, :] > place[:, None]) & (answer[:, None, :] | (era[:, None, :] > era[:, :, None]))
    return layout.valid[:, :, None] & (foreign | later)


def _shown(scene: Scene, row: int, i: int, j: int) -> str:
    layout = scene.layout
    if not layout.valid[row, j]:
        return f"the padding at {j}"
    if layout.segment[row, i] != layout.segment[row, j]:
        return f"another packed sample's token {j}"
    if int(layout.branch[row, j]) not in (-1, int(layout.branch[row, i])):
        return f"the token {j} of a question that it does not belong to"
    if layout.role[row, j] == Role.ANSWER:
        return f"the answer token {j}"
    return f"a later turn's {scene.what(row, j)} token {j}"


def _scenes() -> tuple[Scene, ...]:
    """Conversations padded on the right, on the left, and one alone without padding or image; then trees likewise."""
    trees = TREES + PACKED_TREES
    given = (CONVERSATIONS, False), (CONVERSATIONS, True), (BARE, False), (trees, False), (trees, True)
    return tuple(written(texts, left) for texts, left in given)


def written(texts: tuple[str, ...], left: bool) -> Scene:
    """Conversations written out as a batch."""
    rows = [_read(text) for text in texts]
    width = max(len(tokens) for tokens, _ in rows)
    table: list[list[list[int]]] = []
    images: list[list[int]] = []
    for r, (tokens, entries) in enumerate(rows):
        extra = width - len(tokens)
        padding = [[int(Kind.PAD), -1, -1, -1, int(Role.SYSTEM), 0, -1]] * extra
        table.append([*padding, *tokens] if left else [*tokens, *padding])
        images += [[r, segment, place + left * extra, *rest] for segment, place, *rest in entries]
    kind, image, tile, segment, role, position, branch = torch.tensor(table).permute(2, 0, 1).contiguous()  # (B, S)
    row, own, place, turn, part, tokens_ = torch.tensor(images, dtype=torch.long).reshape(-1, 6).T
    hw = torch.full((len(images), 2), 32)
    ids = [str(k) for k in range(len(images))]
    layout = Layout(kind, image, tile, segment, role, position, branch)
    return Scene(layout, Images(row, own, place, turn, torch.zeros_like(row), part, hw, tokens_, ids))


def _read(text: str) -> tuple[list[list[int]], list[list[int]]]:
    """One row, read from left to right.

    Returns:
        (kind, image, tile, segment, role, position, branch) of each token; (segment, place, turn, tile, tokens) of each
        image.
    """
    roles = {"s": Role.SYSTEM, "u": Role.USER, "a": Role.ANSWER}
    tokens: list[list[int]] = []
    images: list[list[int]] = []
    segment = start = turn = trunk = 0
    branch, spoke, last = -1, "", ("", -1)
    for mark, primes in re.findall(r"(\w|[|^\[])('*)", text):
        if mark == "|":
            segment, start, turn, branch, spoke = segment + 1, len(tokens), 0, -1, ""
            continue
        if mark == "[":
            trunk = len(tokens) - start if branch < 0 else trunk
            branch, start, spoke = branch + 1, len(tokens) - trunk, ""
            continue
        tile = len(primes)
        if spoke == "a" and mark != "a":
            turn += 1
        if mark == "^":
            images.append([segment, len(tokens), turn, 0, 0])
        elif mark.isdigit():
            if (mark, tile) != last:
                images.append([segment, len(tokens), turn, tile, 0])
            images[-1][-1] += 1
            tokens.append([int(Kind.VISUAL), int(mark), tile, segment, int(Role.USER), len(tokens) - start, branch])
        else:
            tokens.append([int(Kind.TEXT), -1, -1, segment, int(roles[mark]), len(tokens) - start, branch])
        spoke, last = mark, (mark, tile)
    return tokens, images
