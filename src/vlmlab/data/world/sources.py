"""The embedded world as ``SampleSource`` classes: captions, questions, conversations, interleaved images, text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack, get_args

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.values import Count, Seed, Share
from vlmlab.data.world.base import (
    STRIDE,
    ScaledSceneKeys,
    ScaledSource,
    SceneKeys,
    Unrendered,
    WorldSource,
    check_share,
    check_size,
)
from vlmlab.data.world.captions import dense_caption, loose_caption, short_captions
from vlmlab.data.world.contrasts import contrasts
from vlmlab.data.world.loose import LooseScene, render_loose, sample_loose
from vlmlab.data.world.questions import KINDS, Kinds, check_kinds, dialogue, draw_class, single
from vlmlab.data.world.scene import Scene, Split, check_split, scene_id
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.text import (
    CAPTION_REQUEST,
    FORMS,
    PLACED_CELLS_PROMPT,
    Form,
    caption_turn,
    check_forms,
    describe,
    text_sample,
)

Contrast = Literal["dense", "coordinates", "short"]
Statement = Literal["caption", "dense", "answered", "question"]
Style = Literal["short", "dense", "mixed", "cells", "placed_cells"]
CONTRASTS: tuple[Contrast, ...] = get_args(Contrast)
STATEMENTS: tuple[Statement, ...] = get_args(Statement)
STYLES: tuple[Style, ...] = get_args(Style)
PHRASINGS = 2
"""Phrasings of every question, but for one kind."""
ONE_PHRASING = "two_hop"
_INSIST = 64
"""Compositional scenes tried for a question about a held-out pair before any question will do."""
_MOST_CONTRASTS = 8


def _text_only(sample: Sample) -> Unrendered:
    return Unrendered(sample.id, (), sample.turns)


def _caption_sample(scene: Scene, style: str) -> Unrendered:
    turn = caption_turn(scene, style, Stream(scene.id, scene.seed, "caption", style))
    return Unrendered(f"{scene.id}/{style}", (scene,), (turn,))


class WorldCaptions(ScaledSource):
    """One image and a request for a caption.

    Args:
        style: ``short`` (the answer is one of five references), ``dense`` (the re-caption), ``mixed`` (either),
            ``cells`` (four words a cell) or ``placed_cells`` (its place too: what the vision tower learns to name).
        split, size, seed, domain: as for every source of the world.
        grid, objects: the scenes' scale.

    Raises:
        UserError: for an unknown style, split or domain, a size below 1 or a scale that cannot be.
    """

    def __init__(
        self,
        style: Style,
        split: Split,
        size: Count,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(split, size, **scenes)
        if style not in STYLES:
            raise UserError(f"The world has no caption style {style!r}; set style to one of: {', '.join(STYLES)}.")
        self.style = style

    def _unrendered(self, index: int) -> Unrendered:
        style = self._stream(index, "style").choice(STYLES[:2]) if self.style == "mixed" else self.style
        return _caption_sample(self._scene(index), style)


class LooseCaptions:
    """Loose shapes, told cell by cell as ``placed_cells`` does: what the vision tower learns to see beyond the grid.

    Args:
        split: train, val or test.
        size: number of samples.
        seed: another seed gives other scenes.

    Raises:
        UserError: for an unknown split or a size below 1.
    """

    def __init__(self, split: Split, size: Count, seed: Seed = 0) -> None:
        check_split(split)
        check_size(size)
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        scene = self._scene(index)
        return Sample(scene.id, (render_loose(scene),), _described(scene), image_ids=(scene.id,))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its images."""
        return _described(self._scene(index))

    def _scene(self, index: int) -> LooseScene:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        return sample_loose(self.split, index, self.seed)


def _described(scene: LooseScene) -> tuple[Turn, ...]:
    return (Turn(PLACED_CELLS_PROMPT, loose_caption(scene), "cells_caption"),)


class QuestionKeys(ScaledSceneKeys, total=False):
    """Keys of `WorldQuestions` that those built on it share."""

    multi_turn: bool
    kinds: Kinds | None


class WorldQuestions(ScaledSource):
    """Questions about an image.

    With ``multi_turn`` a sample is six to eight questions about one scene. Without it a sample is one question; kinds
    take turns, and the answer is chosen before the scene, so that every answer is equally frequent within a template.

    Args:
        split, size, seed, domain: as for every source of the world.
        multi_turn: several questions a sample, for training; False for benchmarks.
        kinds: the kinds of question, all for None.
        grid, objects: the scenes' scale.

    Raises:
        UserError: for an unknown split, domain or kind, a size below 1 or a scale that cannot be.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        multi_turn: bool = False,
        kinds: Kinds | None = None,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(split, size, **scenes)
        self.multi_turn = multi_turn
        self.kinds = check_kinds(kinds)

    def _unrendered(self, index: int) -> Unrendered:
        return self._dialogue(index, self.kinds) if self.multi_turn else self._single(index)

    def _single(self, index: int, phrasing: int | None = None) -> Unrendered:
        kind = self.kinds[index % len(self.kinds)]
        stream = self._stream(index, f"single/{kind}")
        key = draw_class(stream, kind, self._scale)
        for attempt in range(STRIDE):
            scene = self._scene(index * STRIDE + attempt)
            question = single(scene, stream, kind, key, insist=attempt < _INSIST, phrasing=phrasing)
            if question:
                return Unrendered(f"{scene.id}/{index}", (scene,), (question.turn(),))
        raise UserError(
            f"No scene with grid={self.grid} and objects={[*self.objects]} has a question of kind {kind} "
            f"({key[0]}: {key[1]}); leave the kind out of kinds, or give another range of objects."
        )


class WorldPhrasings(WorldQuestions):
    """``WorldQuestions``, each single question in both of its phrasings, one after the other.

    As in "What color is the ring?" and "Which color does the ring have?", which training has both of. The phrasing is
    the question's group, for ``vlmlab.evaluate.metrics.sensitivity.Sensitivity``. `size` counts questions, so that
    there are twice as many samples.

    Args:
        split, size, seed, domain, grid, objects: as for `WorldQuestions`.
        kinds: likewise; all but two_hop, which has one phrasing, for None.

    Raises:
        UserError: as for `WorldQuestions`, or for ``multi_turn`` or two_hop.
    """

    def __init__(self, split: Split, size: Count, **asked: Unpack[QuestionKeys]) -> None:
        super().__init__(split, size, **asked)
        if self.multi_turn:
            raise UserError("WorldPhrasings asks single questions; leave multi_turn out.")
        if asked.get("kinds") is None:
            self.kinds = tuple(kind for kind in KINDS if kind != ONE_PHRASING)
        elif ONE_PHRASING in self.kinds:
            raise UserError(f"Questions of kind {ONE_PHRASING} have one phrasing; leave it out of kinds.")

    def __len__(self) -> int:
        return self.size * PHRASINGS

    def _within(self, index: int) -> Unrendered:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        question, phrasing = divmod(index, PHRASINGS)
        asked = self._single(question, phrasing)
        name = f"phrasing_{phrasing + 1}"
        (turn,) = asked.turns
        return replace(asked, id=f"{asked.id}/{name}", turns=(replace(turn, group=name),))


class InstructKeys(ScaledSceneKeys, total=False):
    """Keys of `WorldInstruct` that those built on it share."""

    caption_fraction: Share
    kinds: Kinds | None


class WorldInstruct(ScaledSource):
    """Instruction tuning: conversations of six to eight questions, mixed with requests for captions of both styles.

    Args:
        split, size, seed, domain: as for every source of the world.
        caption_fraction: share of caption samples, half of them short, in 0..1.
        kinds: kinds of question asked; all of them for None.
        grid, objects: the scenes' scale.

    Raises:
        UserError: for an unknown split, domain or kind, a size below 1, a fraction outside 0..1 or an impossible
            scale.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        caption_fraction: Share = 0.15,
        kinds: Kinds | None = None,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(split, size, **scenes)
        check_share("caption_fraction", caption_fraction)
        self.caption_fraction = caption_fraction
        self.kinds = check_kinds(kinds)

    def _unrendered(self, index: int) -> Unrendered:
        stream = self._stream(index, "instruct")
        if stream.chance(self.caption_fraction):
            return _caption_sample(self._scene(index), stream.choice(STYLES[:2]))
        return self._dialogue(index, self.kinds)


class WorldInterleaved(WorldSource):
    """Two or three images in one prompt and a question which of them has more of something.

    The position of the answer is drawn first, so every answer is equally frequent for each number of images.

    Args:
        split, size, seed, domain: as for every source of the world.

    Raises:
        UserError: for an unknown split or domain, or a size below 1.
    """

    def _unrendered(self, index: int) -> Unrendered:
        return self._interleaved(index)


class WorldInterleavedInstruct(WorldInstruct):
    """Instruction tuning in which some samples have two or three images; the others are those of ``WorldInstruct``.

    Args:
        split, size, seed, domain: as for every source of the world.
        caption_fraction: share of caption samples among those of one image, half of them short, in 0..1.
        kinds: kinds of question asked of one image; all of them for None.
        interleaved_fraction: share of samples of several images, see ``WorldInterleaved``, in 0..1.
        grid, objects: the scenes' scale.

    Raises:
        UserError: as for ``WorldInstruct``.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        interleaved_fraction: Share = 0.5,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        check_share("interleaved_fraction", interleaved_fraction)
        self.interleaved_fraction = interleaved_fraction

    def _unrendered(self, index: int) -> Unrendered:
        if self._stream(index, "instruct/interleaved").chance(self.interleaved_fraction):
            return self._interleaved(index)
        return super()._unrendered(index)


CAPTIONED = ("caption", "dense_caption")
"""Kinds of turn that ask for a caption."""


def with_task_words(sample: Unrendered) -> Unrendered:
    """Every prompt after a word for its task, as MiniGPT-v2 has it (arXiv 2310.09478)."""
    words = ("[caption]" if turn.kind in CAPTIONED else "[vqa]" for turn in sample.turns)
    turns = tuple(replace(turn, prompt=f"{word} {turn.prompt}") for word, turn in zip(words, sample.turns, strict=True))
    return replace(sample, turns=turns)


class WorldTaskCaptions(WorldCaptions):
    """``WorldCaptions`` after ``[caption]``; arguments and refusals are the same."""

    def _unrendered(self, index: int) -> Unrendered:
        return with_task_words(super()._unrendered(index))


class WorldTaskQuestions(WorldQuestions):
    """``WorldQuestions`` after ``[vqa]``; arguments and refusals are the same."""

    def _unrendered(self, index: int) -> Unrendered:
        return with_task_words(super()._unrendered(index))


class WorldTaskInstruct(WorldInstruct):
    """``WorldInstruct``, each turn after ``[vqa]`` or ``[caption]``; arguments and refusals are the same."""

    def _unrendered(self, index: int) -> Unrendered:
        return with_task_words(super()._unrendered(index))


class WorldText(WorldSource):
    """Text-only samples for the language model: no image, the scene told in words.

    Args:
        split, size, seed, domain: as for every source of the world.
        forms: how scenes are told, see ``text.FORMS``; each sample uses one of them; the usual five for None.
        focus: kinds of question that every other conversation asks for alone, as those that are learnt last; none for
            None.
        caption_fraction: share of the conversations that also ask for a caption, in 0..1.

    Raises:
        UserError: for an unknown split, domain, form or kind, a size below 1 or a fraction outside 0..1.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        forms: Sequence[Form] | None = None,
        focus: Kinds | None = None,
        caption_fraction: Share = CAPTION_REQUEST,
        **address: Unpack[SceneKeys],
    ) -> None:
        super().__init__(split, size, **address)
        check_share("caption_fraction", caption_fraction)
        self.forms = check_forms(forms)
        self.focus = () if focus is None else check_kinds(focus)
        self.caption_fraction = caption_fraction

    def _unrendered(self, index: int) -> Unrendered:
        form = self._stream(index, "form").choice(self.forms)
        return _text_only(text_sample(self._scene(index), form, self.focus, self.caption_fraction))


TOLD_FORMS: tuple[Form, ...] = ("dense", "coordinates", "told")
"""How scenes are told in words where samples with and without an image are mixed: as text, without cells."""


class WorldTextInstruct(WorldInstruct):
    """Instruction tuning in which some samples have no image, the scene told in words; the others are unchanged.

    What text-only conversations are to a system trained on both, as LaVIN (arXiv 2305.15023, section 4) and LLaVA-1.5
    (arXiv 2310.03744, table 7) are.

    Args:
        split, size, seed, domain: as for every source of the world.
        caption_fraction: share of caption samples among those with an image, half of them short, in 0..1.
        kinds: kinds of question asked about an image; all of them for None.
        text_fraction: share of samples without an image, in 0..1.
        grid, objects: the scenes' scale.

    Raises:
        UserError: as for ``WorldInstruct``.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        text_fraction: Share = 0.25,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        check_share("text_fraction", text_fraction)
        self.text_fraction = text_fraction

    def _unrendered(self, index: int) -> Unrendered:
        stream = self._stream(index, "instruct/text")
        if stream.chance(self.text_fraction):
            return _text_only(text_sample(self._scene(index), stream.choice(TOLD_FORMS)))
        return super()._unrendered(index)


class WorldStatements(WorldSource):
    """One image and a text about it, as the text tower beside the vision tower reads texts.

    ``caption`` and ``dense`` are the two caption styles, every other time after a request for one; ``answered`` is two
    questions with their answers, ``question`` one question alone, which says what it takes for granted.

    Args:
        split, size, seed, domain: as for every source of the world.
        forms: the forms that texts have, all equally often; all for None.

    Raises:
        UserError: for an unknown split, domain or form, or a size below 1.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        forms: Sequence[Statement] | None = None,
        **address: Unpack[SceneKeys],
    ) -> None:
        super().__init__(split, size, **address)
        chosen = STATEMENTS if forms is None else tuple(forms)
        unknown = [form for form in chosen if form not in STATEMENTS]
        if unknown or not chosen:
            wrong = f"no statements of form {unknown[0]!r}" if unknown else "no statements of no form"
            raise UserError(f"The world has {wrong}; set forms to some of: {', '.join(STATEMENTS)}.")
        self.forms = chosen

    def _unrendered(self, index: int) -> Unrendered:
        scene, stream = self._scene(index), self._stream(index, "statement")
        form = stream.choice(self.forms)
        turn = Turn("", _statement(scene, form, stream), form)
        return Unrendered(f"{scene.id}/{form}", (scene,), (turn,))


class WorldContrasts(WorldSource):
    """Several images, each with a whole caption: scenes that differ in one thing, which a contrast has to tell apart.

    Turn i is the caption of image i. ``dense`` and ``coordinates`` name every object with its attributes and its cell,
    and their scenes are nearly the same; ``short`` is what people say, of scenes that have nothing to do with one
    another, since two that differ in one thing may share it.

    Args:
        split, size, seed, domain: as for every source of the world.
        scenes: images a sample, 2 to 8.
        forms: the forms that captions have, all equally often where none is named twice.

    Raises:
        UserError: for an unknown split, domain or form, a size below 1, or scenes outside 2 to 8.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        scenes: Count = 4,
        forms: Sequence[Contrast] = CONTRASTS,
        **address: Unpack[SceneKeys],
    ) -> None:
        super().__init__(split, size, **address)
        unknown = [form for form in forms if form not in CONTRASTS]
        if unknown or not forms:
            wrong = f"no contrasts of form {unknown[0]!r}" if unknown else "no contrasts of no form"
            raise UserError(f"The world has {wrong}; set forms to some of: {', '.join(CONTRASTS)}.")
        if not 2 <= scenes <= _MOST_CONTRASTS:
            raise UserError(f"A contrast needs 2 to {_MOST_CONTRASTS} scenes, not {scenes}; set scenes.")
        self.scenes = scenes
        self.forms = tuple(forms)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        ids = tuple(f"{sample.id}-{i}" for i in range(self.scenes))  # the scenes of a contrast share their own
        return replace(sample, image_ids=ids)

    def _unrendered(self, index: int) -> Unrendered:
        stream = self._stream(index, "contrasts")
        form, first = stream.choice(self.forms), index * self.scenes
        if form == "short":
            scenes = [self._scene(first + i) for i in range(self.scenes)]
        else:
            scenes = contrasts(self._scene(first), self.scenes, stream)
        turns = tuple(Turn("", _caption(scene, form, stream), form) for scene in scenes)
        name = scene_id(self.domain, self.split, first, self.seed)
        return Unrendered(f"{name}/contrasts", tuple(scenes), turns)


def _caption(scene: Scene, form: str, stream: Stream) -> str:
    if form == "short":
        return stream.choice(short_captions(scene))
    return dense_caption(scene) if form == "dense" else describe(scene, form, stream)


def _statement(scene: Scene, form: str, stream: Stream) -> str:
    if form in ("caption", "dense"):
        asked = caption_turn(scene, "short" if form == "caption" else form, stream)
        return f"{asked.prompt} {asked.answer}" if stream.chance(0.5) else asked.answer
    told = stream.shuffled(dialogue(scene, stream))[: 2 if form == "answered" else 1]
    if form == "question":
        return told[0].prompt
    return " ".join(f"{question.prompt} {question.answer}." for question in told)


__all__ = [
    "CONTRASTS",
    "FORMS",
    "STATEMENTS",
    "STYLES",
    "LooseCaptions",
    "WorldCaptions",
    "WorldContrasts",
    "WorldInstruct",
    "WorldInterleaved",
    "WorldInterleavedInstruct",
    "WorldPhrasings",
    "WorldQuestions",
    "WorldStatements",
    "WorldTaskCaptions",
    "WorldTaskInstruct",
    "WorldTaskQuestions",
    "WorldText",
    "WorldTextInstruct",
]
