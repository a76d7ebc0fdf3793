"""The same questions in several wordings of their instruction, to see how much a score depends on the words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, SampleSource, Turn, turns_of
from vlmlab.data.fingerprint import Facts, source_fingerprint
from vlmlab.data.overlap import Stored
from vlmlab.data.questions import FRONT
from vlmlab.data.skipped import Skipped, label

QUESTION = "{question}"


class Wordings:
    """Every question of a source in each wording, one after the other; scores are also reported by wording.

    MultiInstruct (arXiv 2212.10773, section 4) asks every task by several instructions, and
    ``vlmlab.evaluate.metrics.sensitivity.Sensitivity`` is its score of them.

    Args:
        source: samples whose last turn is the question; earlier turns stay as they are.
        wordings: name -> words around ``{question}``. A name takes the place of the question's group.

    Attributes:
        skipped: what the source has left out.

    Raises:
        UserError: fewer than two wordings, or one without ``{question}``.
    """

    def __init__(self, source: SampleSource, wordings: Mapping[str, str]) -> None:
        if len(wordings) < 2:
            raise UserError(f"wordings has {len(wordings)} of them; give two or more to compare.")
        if bad := next((name for name, words in wordings.items() if words.count(QUESTION) != 1), None):
            raise UserError(f"wordings.{bad} needs {QUESTION} once, where the question's own words go.")
        self.source = source
        self.turns_in_memory = getattr(source, "turns_in_memory", False)
        self.skipped: list[Skipped] = list(getattr(source, "skipped", []))
        self.wordings = tuple((str(name), str(words)) for name, words in wordings.items())

    def __len__(self) -> int:
        return len(self.source) * len(self.wordings)

    def __getitem__(self, index: int) -> Sample:
        at, name, words = self._place(index)
        sample = self.source[at]
        return replace(sample, id=f"{sample.id}/{name}", turns=_worded(sample.turns, name, words))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its images."""
        at, name, words = self._place(index)
        return _worded(turns_of(self.source, at), name, words)

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        at, name, _ = self._place(index)
        return f"{label(self.source, at)}/{name}"

    def stored(self, most: int) -> Iterator[Stored]:
        """The source's images."""
        if (told := getattr(self.source, "stored", None)) is not None:
            yield from told(most)

    def fingerprint(self) -> Facts:
        """That of its source, and the words."""
        return {"source": source_fingerprint(self.source), "wordings": str(self.wordings)}

    def _place(self, index: int) -> tuple[int, str, str]:
        """The number of the question, and the name and words of the wording."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at, which = divmod(index, len(self.wordings))
        return at, *self.wordings[which]


def _worded(turns: Sequence[Turn], name: str, words: str) -> tuple[Turn, ...]:
    """The turns, the last of them in these words; image tags at its beginning stay there."""
    *before, last = turns
    found = FRONT.match(last.prompt)
    tags = found.group() if found else ""
    return (*before, replace(last, prompt=tags + words.replace(QUESTION, last.prompt[len(tags) :]), group=name))
