"""Questions about a scene: what can be asked, its one right answer, and the chance of answering without looking.

A *class* is a template with a key: the answer, or for two-hop questions how the answer relates to the words of the
question. ``balance`` holds the target share of every class and the weights that reach it, so that neither the kind
nor the exact text of a question tells its answer. Every proposer returns ``{(template, key): [payload, ...]}``; a
payload is a tuple of integers and names from which ``_render`` writes the question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_args

from annotated_types import MinLen

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Turn
from vlmlab.data.world.balance import WEIGHTS, chance, targets
from vlmlab.data.world.scene import COLORS, HELD_OUT, SHAPES, STANDARD, Object, Scale, Scene
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import (
    COLOR,
    DIRECTIONS,
    NUMBERS,
    SHAPE,
    SIZE,
    TEXTURE,
    Lexicon,
    lexicon,
    phrase,
    with_article,
)

Kind = Literal["attribute", "existence", "count", "relation", "comparison", "position", "two_hop"]
Kinds = Annotated[Sequence[Kind], MinLen(1)]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS = ("held_out_pair", "other")
"""Parts of the compositional split: questions that turn on a pair which was never trained, and those that do not."""
BITS = {"color": COLOR, "shape": SHAPE, "size": SIZE, "texture": TEXTURE}
_FIELDS = ("color", "shape", "size", "texture")
_VALUES = {"color": COLORS, "shape": SHAPES, "size": 2, "texture": 2}
_LEVELS = ((0, COLOR, SHAPE, SIZE, TEXTURE, 3, 5, 6, 9, 10), (7, 11, 13, 14), (15,))
"""Attribute masks of a reference by length; longer ones are used only where no shorter one is unique."""
TERMS = {"shape": 2, "color": 1, "pair": 3, "size_shape": 6, "texture_shape": 10, "size_pair": 7}
_MOST_PAIRS = 3
_RARE = ("relation", "relation", "relation", "two_hop")
"""Kinds that not every scene offers: a conversation asks one of them twice as readily as the other kinds."""

Key = tuple[str, str]
Payload = tuple[Any, ...]
Classes = dict[Key, list[Payload]]
Attributes = tuple[int, int, int, int]
Weights = Mapping[str, Mapping[Key, float]]


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its answer.

    Attributes:
        kind, template, key: its class, see ``balance``.
        prompt, answer: its words.
        chance: accuracy in 0..1 of the best answer that does not look.
        group: its part of the compositional split.
    """

    kind: str
    template: str
    key: str
    prompt: str
    answer: str
    chance: float
    group: str = ""

    def turn(self) -> Turn:
        """The question as a turn of a sample."""
        return Turn(self.prompt, self.answer, self.kind, chance=self.chance, group=self.group)


@dataclass(slots=True)
class View:
    """A scene with what the proposers ask of it.

    Attributes:
        scene, words: the scene and its domain's lexicon.
        phrasing: which of its phrasings every question has; None: drawn for each.
        attributes: (color, shape, size, texture) per object.
        focus: the objects that questions should concern, where the split asks for some; else empty.
        differences: per object, the sorted masks of attributes in which each other object differs from it.
    """

    scene: Scene
    phrasing: int | None = None
    words: Lexicon = field(init=False)
    attributes: list[Attributes] = field(init=False)
    focus: list[int] = field(init=False)
    differences: list[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        things = self.scene.objects
        self.words = lexicon(self.scene.domain)
        self.attributes = [(o.color, o.shape, o.size, o.texture) for o in things]
        held = self.scene.split == "compositional"
        self.focus = [i for i, o in enumerate(things) if o.pair in HELD_OUT] if held else []
        self.differences = [
            tuple(sorted({_difference(a, b) for j, b in enumerate(self.attributes) if j != i}))
            for i, a in enumerate(self.attributes)
        ]

    def masks(self, index: int, without: int = 0, including: int = 0) -> tuple[int, ...]:
        """Attribute masks that single the object out, without some attributes or including one."""
        return _unique_masks(self.differences[index], without, including)

    def reference(self, index: int, mask: int) -> str:
        """``the`` and the attributes of an object that the mask names."""
        return "the " + phrase(self.scene.domain, mask, self.attributes[index])

    def matching(self, mask: int, attributes: Attributes) -> int:
        """How many objects agree with the attributes named by the mask."""
        return sum(not mask & _difference(attributes, other) for other in self.attributes)


@cache
def _difference(a: Attributes, b: Attributes) -> int:
    return sum(bit for bit, x, y in zip((COLOR, SHAPE, SIZE, TEXTURE), a, b, strict=True) if x != y)


@cache
def _unique_masks(differences: tuple[int, ...], without: int, including: int) -> tuple[int, ...]:
    for level in _LEVELS:
        found = tuple(
            mask
            for mask in level
            if not mask & without and mask & including == including and all(mask & other for other in differences)
        )
        if found:
            return found
    return ()


def _attribute(view: View, stream: Stream) -> Classes:
    out: Classes = {}
    for i, values in enumerate(view.attributes):
        for name, value in zip(_FIELDS, values, strict=True):
            if view.masks(i, without=BITS[name]):
                out.setdefault((name, str(value)), []).append((i,))
    return out


def _position(view: View, stream: Stream) -> Classes:
    out: Classes = {}
    for i, thing in enumerate(view.scene.objects):
        if view.masks(i):
            out.setdefault(("row", str(thing.row)), []).append((i,))
            out.setdefault(("column", str(thing.col)), []).append((i,))
    return out


def _direction(of: Object, seen_from: Object) -> str | None:
    """Where one object lies from another along the strictly longer axis; None on a diagonal."""
    dx, dy = of.col - seen_from.col, of.row - seen_from.row
    if abs(dx) == abs(dy):
        return None
    left, right, above, below = DIRECTIONS
    if abs(dx) > abs(dy):
        return right if dx > 0 else left
    return below if dy > 0 else above


def _relation(view: View, stream: Stream) -> Classes:
    out: Classes = {}
    named = [i for i in range(len(view.attributes)) if view.masks(i)]
    for i in named:
        for j in named:
            direction = _direction(view.scene.objects[i], view.scene.objects[j]) if i != j else None
            if direction:
                out.setdefault(("relation", direction), []).append((i, j))
    return out


def _altered(view: View, stream: Stream, mask: int, values: Attributes) -> Attributes | None:
    """Attributes like an object's but for one named value, so that nothing in the scene has them; None if not found.

    Pairs held out are never asked for where they never occur: the answer would always be no.
    """
    bits = [position for position in range(4) if mask >> position & 1]
    held = view.scene.split == "compositional"
    for _ in range(4):
        changed = list(values)
        position = stream.choice(bits)
        kinds = _VALUES[_FIELDS[position]]
        changed[position] = (changed[position] + 1 + stream.below(kinds - 1)) % kinds
        term = (changed[0], changed[1], changed[2], changed[3])
        if mask & 3 == 3 and not held and term[:2] in HELD_OUT:
            continue
        if not view.matching(mask, term):
            return term
    return None


def _named(mask: int, values: Attributes) -> Attributes:
    """The attributes with those not named set to 0, so that equal terms are equal tuples."""
    color, shape, size, texture = values
    return (color * (mask & 1), shape * (mask >> 1 & 1), size * (mask >> 2 & 1), texture * (mask >> 3 & 1))


def _pick(view: View, stream: Stream) -> Attributes:
    """A random object's attributes, one of the focus where there is one."""
    return view.attributes[stream.choice(view.focus or range(len(view.attributes)))]


def _absent_pair(view: View, stream: Stream) -> Attributes | None:
    """For the compositional split: a held-out pair that the scene does not contain."""
    absent = sorted(HELD_OUT - {thing.pair for thing in view.scene.objects})
    return (*stream.choice(absent), 0, 0) if absent else None


def _existence(view: View, stream: Stream) -> Classes:
    out: Classes = {}
    for name, mask in TERMS.items():
        out[name, "yes"] = [(mask, _named(mask, _pick(view, stream)))]
        absent = _absent_pair(view, stream) if view.focus and name == "pair" else None
        absent = absent or _altered(view, stream, mask, _pick(view, stream))
        if absent:
            out[name, "no"] = [(mask, _named(mask, absent))]
    return out


def _count(view: View, stream: Stream) -> Classes:
    out: Classes = {("all", str(len(view.attributes))): [(0, (0, 0, 0, 0))]}
    for position, name in enumerate(_FIELDS):
        found = Counter(values[position] for values in view.attributes)
        for value in range(_VALUES[name]):
            term = [0, 0, 0, 0]
            term[position] = value
            out.setdefault((name, str(found[value])), []).append((BITS[name], tuple(term)))
    for pair, number in Counter(values[:2] for values in view.attributes).items():
        if number <= _MOST_PAIRS:
            out.setdefault(("pair", str(number)), []).append((COLOR | SHAPE, (*pair, 0, 0)))
    absent = _absent_pair(view, stream) if view.focus else None
    absent = absent or _altered(view, stream, COLOR | SHAPE, _pick(view, stream))
    if absent:
        out["pair", "0"] = [(COLOR | SHAPE, (*absent[:2], 0, 0))]
    return out


def _comparison(view: View, stream: Stream) -> Classes:
    out: Classes = {}
    for position, name in enumerate(_FIELDS):
        found = Counter(values[position] for values in view.attributes)
        present = sorted(found)
        absent = [value for value in range(_VALUES[name]) if value not in found]
        against = [*present, stream.choice(absent)] if absent else present
        for a in present:
            for b in against:
                if a == b:
                    continue
                order = ("first", "second", "equal")
                more = order[0] if found[a] > found[b] else order[1] if found[a] < found[b] else order[2]
                out.setdefault((name, more), []).append((position, a, b))
                if b not in found:
                    out.setdefault((name, "second"), []).append((position, b, a))
    return out


def _hops(view: View, i: int) -> list[tuple[str, int]]:
    """(hop, target) wherever exactly one object shares the row or column, or one is strictly the nearest."""
    things = view.scene.objects
    others = [j for j in range(len(things)) if j != i]
    rows = [j for j in others if things[j].row == things[i].row]
    columns = [j for j in others if things[j].col == things[i].col]
    out = []
    if len(rows) == 1:
        out.append(("row", rows[0]))
    if len(columns) == 1:
        out.append(("column", columns[0]))
    far = sorted(((things[j].row - things[i].row) ** 2 + (things[j].col - things[i].col) ** 2, j) for j in others)
    if far and (len(far) == 1 or far[0][0] < far[1][0]):
        out.append(("nearest", far[0][1]))
    return out


def _two_hop(view: View, stream: Stream) -> Classes:
    out: Classes = {}
    for i in range(len(view.attributes)):
        hops = _hops(view, i)
        if not hops:
            continue
        for position, name in enumerate(_FIELDS):
            bit = BITS[name]
            if view.masks(i, without=bit):
                out.setdefault((name, "plain"), []).extend((hop, i, j, bit, 0) for hop, j in hops)
            if (name, "same") in targets(view.scene.scale)["two_hop"] and view.masks(i, including=bit):
                for hop, j in hops:
                    same = view.attributes[i][position] == view.attributes[j][position]
                    out.setdefault((name, "same" if same else "other"), []).append((hop, i, j, 0, bit))
    return out


_PROPOSERS: dict[str, Callable[[View, Stream], Classes]] = {
    "attribute": _attribute,
    "existence": _existence,
    "count": _count,
    "relation": _relation,
    "comparison": _comparison,
    "position": _position,
    "two_hop": _two_hop,
}


def check_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds asked for, all of them for None.

    Raises:
        UserError: for an empty list or an unknown kind.
    """
    chosen = KINDS if kinds is None else tuple(kinds)
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown or not chosen:
        wrong = f"no question kind {unknown[0]!r}" if unknown else "nothing to ask with an empty list of kinds"
        raise UserError(f"The world has {wrong}; set kinds to some of: {', '.join(KINDS)}.")
    return chosen


def value_word(words: Lexicon, name: str, value: int) -> str:
    """The word of an attribute's value: ``value_word(words, "color", 0)`` is ``red``."""
    options = {"color": words.colors, "shape": words.shapes, "size": words.sizes, "texture": words.textures}
    return options[name][value]


def _compared(view: View, position: int, first: int, second: int) -> tuple[str, str, str, str]:
    """The two terms as the question names them, and as the answer does."""
    words, name = view.words, _FIELDS[position]
    if name == "shape":
        a, b = words.plurals[first], words.plurals[second]
        return a, b, a, b
    a, b = value_word(words, name, first), value_word(words, name, second)
    return a, f"{b} {words.nouns}", a, b


def _text(view: View, stream: Stream, name: str, **slots: str) -> str:
    texts = view.words.templates[name]
    drawn = stream.choice(texts)  # in any case, so that what is drawn after it stays the same
    return (drawn if view.phrasing is None else texts[view.phrasing % len(texts)]).format(**slots)


def _render(view: View, stream: Stream, kind: str, key: Key, payload: Payload) -> Question:
    """Write a question of a class."""
    template, value = key
    answer = value
    told: list[tuple[int, Attributes]] = []  # of every object or term: what the question, or its answer too, says of it

    def the(index: int, without: int = 0, including: int = 0) -> str:
        mask = stream.choice(view.masks(index, without, including))
        told.append((mask, view.attributes[index]))
        return view.reference(index, mask)

    if kind == "attribute":
        prompt = _text(view, stream, f"{kind}/{template}", ref=the(payload[0], BITS[template]))
        answer = value_word(view.words, template, int(value))
        told = [(mask | BITS[template], values) for mask, values in told]
    elif kind == "position":
        prompt = _text(view, stream, f"{kind}/{template}", ref=the(payload[0]))
        answer = NUMBERS[int(value) + 1]
    elif kind == "relation":
        first, second = (the(i) for i in payload)
        prompt = _text(view, stream, kind, ref=first, other=second)
    elif kind == "existence":
        prompt = _text(view, stream, kind, term=with_article(phrase(view.scene.domain, *payload)))
        told = [(payload[0], payload[1])]
    elif kind == "count":
        prompt = _text(view, stream, kind, terms=phrase(view.scene.domain, *payload, plural=True))
        told = [(payload[0], payload[1])]
    elif kind == "comparison":
        first, second, more, less = _compared(view, *payload)
        prompt = _text(view, stream, kind, first=first, second=second)
        answer = {"first": more, "second": less, "equal": "equal"}[value]
    else:
        hop, i, j, without, including = payload
        prompt = _text(view, stream, f"{kind}/{template}/{hop}", ref=the(i, without, including))
        answer = value_word(view.words, template, view.attributes[j][_FIELDS.index(template)])
    known = chance(view.scene.scale)[kind][template]
    return Question(kind, template, value, prompt, answer, known, _group(view, told))


def _group(view: View, told: Sequence[tuple[int, Attributes]]) -> str:
    """The part of the compositional split: whether colour and shape that are told of one object are a held-out pair.

    So a question turns on a pair where it names one, and where it asks for the colour of a shape, or the shape of a
    colour, and the answer completes one. Other splits have no parts.
    """
    if view.scene.split != "compositional":
        return ""
    held, other = GROUPS
    pairs = (values[:2] for mask, values in told if mask & (COLOR | SHAPE) == COLOR | SHAPE)
    return held if any(pair in HELD_OUT for pair in pairs) else other


def _concerns(view: View, kind: str, payload: Payload) -> bool:
    """Whether a question is about one of the view's focus objects, or asks for a held-out pair."""
    if kind in ("attribute", "position"):
        return payload[0] in view.focus
    if kind == "relation":
        return payload[0] in view.focus or payload[1] in view.focus
    if kind == "two_hop":
        return payload[1] in view.focus or payload[2] in view.focus
    if kind == "comparison":
        position, a, b = payload
        return any(view.attributes[i][position] in (a, b) for i in view.focus)
    mask, term = payload
    if mask & 3 == 3:
        return term[:2] in HELD_OUT
    return any(not mask & _difference(term, view.attributes[i]) for i in view.focus)


def _focused(view: View, kind: str, payloads: list[Payload]) -> list[Payload]:
    return [payload for payload in payloads if _concerns(view, kind, payload)] if view.focus else payloads


def _identity(kind: str, payload: Payload) -> Payload:
    """What makes two questions the same: the order of a comparison and the words of a reference do not."""
    return (payload[0], *sorted(payload[1:])) if kind == "comparison" else payload[:3]


class _Asker:
    """Asks questions of one scene, never the same one twice."""

    def __init__(self, view: View, stream: Stream, weights: Weights) -> None:
        self.view = view
        self.weights = weights
        self.stream = stream
        self.classes: dict[str, Classes] = {}
        self.asked: set[tuple[str, str, Payload]] = set()

    def available(self, kind: str) -> Classes:
        if kind not in self.classes:
            self.classes[kind] = _PROPOSERS[kind](self.view, self.stream)
        return self.classes[kind]

    def ask(self, kind: str) -> Question | None:
        """A question of this kind that has not been asked, its class chosen by the balancing weights."""
        classes, weights = self.available(kind), self.weights[kind]
        keys = [key for key in classes if key in weights]
        if not keys:
            return None
        for _ in range(4):
            key = keys[self.stream.weighted([weights[k] for k in keys])]
            payloads = classes[key]
            payload = self.stream.choice(_focused(self.view, kind, payloads) or payloads)
            if self._new(kind, key, payload):
                return self._asked(kind, key, payload)
        left = [(key, payload) for key in keys for payload in classes[key] if self._new(kind, key, payload)]
        return self._asked(kind, *self.stream.choice(left)) if left else None

    def _new(self, kind: str, key: Key, payload: Payload) -> bool:
        return (kind, key[0], _identity(kind, payload)) not in self.asked

    def _asked(self, kind: str, key: Key, payload: Payload) -> Question:
        self.asked.add((kind, key[0], _identity(kind, payload)))
        return _render(self.view, self.stream, kind, key, payload)


def dialogue(scene: Scene, stream: Stream, kinds: Sequence[str] = KINDS, weights: Weights = WEIGHTS) -> list[Question]:
    """Six to eight different questions about a scene, their kinds as evenly spread as the scene allows.

    At most a third of them are yes/no. With few ``kinds`` there may be fewer questions.

    Args:
        scene: what is asked about.
        stream: random choices.
        kinds: the kinds of question.
        weights: how a scene chooses among the classes it offers.
    """
    asker = _Asker(View(scene), stream, weights)
    wanted = 6 + stream.below(3)
    rare = stream.choice(_RARE)
    out: list[Question] = []
    counts = Counter(dict.fromkeys(kinds, 0))
    open_kinds = set(kinds)
    while len(out) < wanted and open_kinds:
        if len(kinds) > 1 and counts["existence"] >= wanted // 3:
            open_kinds.discard("existence")
        order = stream.shuffled([kind for kind in kinds if kind in open_kinds])
        order.sort(key=lambda kind: counts[kind] - (kind == rare and counts[kind] == 1))
        kind = order[0] if order else None
        if kind is None:
            break
        question = asker.ask(kind)
        if question is None:
            open_kinds.discard(kind)
            continue
        counts[kind] += 1
        out.append(question)
    return stream.shuffled(out)


def single(
    scene: Scene, stream: Stream, kind: str, key: Key, insist: bool, phrasing: int | None = None
) -> Question | None:
    """A question of one class about a scene, or None where the scene has none.

    Args:
        scene: the scene.
        stream: random choices.
        kind: the kind of question.
        key: (template, key) of the class.
        insist: on the compositional split, accept only questions that concern a held-out pair.
        phrasing: which of its phrasings it has; None: drawn.
    """
    view = View(scene, phrasing)
    payloads = _PROPOSERS[kind](view, stream).get(key)
    if not payloads:
        return None
    focused = _focused(view, kind, payloads)
    if insist and not focused:
        return None
    return _render(view, stream, kind, key, stream.choice(focused or payloads))


def draw_class(stream: Stream, kind: str, scale: Scale = STANDARD) -> Key:
    """A class of a kind, drawn by its target share: the answer is chosen before any scene is looked at."""
    classes = targets(scale)[kind]
    return list(classes)[stream.weighted([*classes.values()])]
