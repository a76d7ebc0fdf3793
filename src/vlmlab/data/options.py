"""Answers to choose from: a question's options as answers to it, and questions whose kind of answer is closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import MinLen

from vlmlab.contracts.errors import DataError, UserError, listed
from vlmlab.contracts.sample import Sample, SampleSource, Turn, turns_of
from vlmlab.contracts.values import Names
from vlmlab.data.chat import IGNORE, ChatEncoder, Encoded
from vlmlab.data.fingerprint import Facts, source_fingerprint
from vlmlab.data.overlap import Stored
from vlmlab.data.skipped import Skipped, label

Sets = Annotated[Sequence[Names], MinLen(1)]


def answered(encoder: ChatEncoder, sample: Sample) -> list[Encoded]:
    """The sample once for each option of its last turn, with the option as the answer; it alone is supervised.

    The end of the answer is part of it: the likelihoods are those of whole answers, as ``generate`` gives them, so that
    "red" is not likelier than "red and blue" for being its beginning.

    Raises:
        DataError: no options, an empty one, or a sample that cannot be used.
    """
    last = sample.turns[-1]
    if not last.options:
        raise DataError(
            f"Sample {sample.id} has no options, and scoring=likelihood chooses from some; use scoring=generate, or "
            "give them by vlmlab.data.options.ClosedAnswers."
        )
    if not all(option.strip() for option in last.options):
        raise DataError(f"Sample {sample.id} has an empty option; fill it in or remove the row.")
    said = (replace(sample, turns=(*sample.turns[:-1], replace(last, answer=option))) for option in last.options)
    return [_last_answer(encoder.train(one)) for one in said]


def _last_answer(encoded: Encoded) -> Encoded:
    """Up to the end of the last answer, which alone is supervised."""
    stop = max(i for i, token in enumerate(encoded.labels) if token != IGNORE) + 1
    start = next((i + 1 for i in range(stop - 1, -1, -1) if encoded.labels[i] == IGNORE), 0)
    return replace(
        encoded,
        ids=encoded.ids[:stop],
        labels=[IGNORE] * start + encoded.labels[start:stop],
        roles=encoded.roles[:stop],
        image=encoded.image[:stop],
    )


def prompt_length(parts: Sequence[Encoded], name: str) -> int:
    """How many tokens are before each of the answers to one question.

    Raises:
        UserError: the prompts are not the same.
    """
    starts = [next(i for i, token in enumerate(part.labels) if token != IGNORE) for part in parts]
    first = parts[0]
    if any(part.ids[:start] != first.ids[: starts[0]] for part, start in zip(parts, starts, strict=True)):
        raise UserError(
            f"Sample {name}: the chat template has another prompt before another answer, so that their likelihoods do "
            "not compare; give another template by lm.chat_template."
        )
    return starts[0]


class ClosedAnswers:
    """The questions of a source whose right answer is in one of some closed sets, with that set to choose from.

    ``[[yes, no]]`` are the yes-or-no questions of any records. Several sets have to be apart from each other; which one
    a question gets tells what kind of answer is wanted, as the options of any multiple choice do. Right is the answer
    that is learnt, as the option is written, whatever single annotators say beside it.

    Args:
        source: samples of one question, or whose last turn is the question.
        sets: the closed sets, in the order in which options are listed.
        kinds: kinds of question that are kept; null: all.

    Attributes:
        skipped: what the source has left out.

    Raises:
        UserError: an answer is in two sets or twice in one, or no question is left.
    """

    def __init__(self, source: SampleSource, sets: Sets, kinds: Names | None = None) -> None:
        self.source = source
        self.turns_in_memory = getattr(source, "turns_in_memory", False)
        self.skipped: list[Skipped] = list(getattr(source, "skipped", []))
        self.sets = tuple(tuple(map(str, one)) for one in sets)
        self.kinds = None if kinds is None else tuple(kinds)
        every = [option for one in self.sets for option in one]
        if twice := next((option for option in every if every.count(option) > 1), None):
            raise UserError(f"ClosedAnswers: {twice!r} is twice in sets; name every answer once.")
        turns = ((index, turns_of(source, index)[-1]) for index in range(len(source)))
        self._rows = [(index, options) for index, turn in turns if (options := self._options(turn))]
        if not self._rows:
            known = listed(every, 80)
            raise UserError(f"ClosedAnswers: no question of {len(source)} has an answer among {known}; give others.")

    def _options(self, turn: Turn) -> tuple[str, ...]:
        """The set of a turn's right answer; empty where the turn is left out."""
        if self.kinds is not None and turn.kind not in self.kinds:
            return ()
        return next((one for one in self.sets if _as_option(turn, one) is not None), ())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        at, options = self._rows[index]
        sample = self.source[at]
        return replace(sample, turns=_with(sample.turns, options))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its images."""
        at, options = self._rows[index]
        return _with(turns_of(self.source, at), options)

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return label(self.source, self._rows[index][0])

    def stored(self, most: int) -> Iterator[Stored]:
        """The source's images, those of questions that were left out as well."""
        if (told := getattr(self.source, "stored", None)) is not None:
            yield from told(most)

    def fingerprint(self) -> Facts:
        """That of its source, and what is kept of it."""
        return {"source": source_fingerprint(self.source), "sets": str(self.sets), "kinds": str(self.kinds)}


def _as_option(turn: Turn, options: Sequence[str]) -> str | None:
    """The option that the answer of a turn is, apart from case; None: none of them."""
    said = turn.answer.strip().lower()
    return next((option for option in options if option.lower() == said), None)


def _with(turns: Sequence[Turn], options: tuple[str, ...]) -> tuple[Turn, ...]:
    """The turns, of which the last has options to choose from, and one right answer."""
    right = _as_option(turns[-1], options)
    assert right is not None
    return (*turns[:-1], replace(turns[-1], answer=right, references=(), options=options))
