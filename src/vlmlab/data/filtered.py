"""Captions that a trained model has looked at: those it finds to match, and what it has written itself (CapFilt).

BLIP (arXiv 2201.12086, section 3.3) lets a captioner write a text for every image of the web and a filter drop those,
found or written, that it takes for unmatched. ``vlmlab curate`` has a run do both and writes what it found to a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, SampleSource, Turn, turns_of
from vlmlab.contracts.values import Share, Text
from vlmlab.data.fingerprint import Facts, files_fingerprint, source_fingerprint
from vlmlab.data.overlap import Stored
from vlmlab.data.skipped import Skipped, label

Captions = Literal["given", "written", "both"]
CAPTIONS: tuple[Captions, ...] = get_args(Captions)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model found of one sample.

    Attributes:
        index: its number in the source.
        id: its id, which has to be the same where the file is read.
        score: how much better its own image explains its text than the best of others, in nats a token.
        written: the model's own text for the image; empty where it wrote none.
        written_score: likewise of that text.
    """

    index: int
    id: str
    score: float
    written: str = ""
    written_score: float = 0.0


def write_scores(path: Path, rows: Sequence[Scored]) -> None:
    """Write a file of scores, one row of JSON a line."""
    lines = [json.dumps({name: getattr(row, name) for name in Scored.__slots__}, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_scores(path: Path) -> list[Scored]:
    """The rows of a file of scores.

    Raises:
        DataError: there is no such file, or a line is none of its rows.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; make it by vlmlab curate run=<folder> out={path}.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            raw: Any = json.loads(line)
            row = Scored(**{name: raw[name] for name in Scored.__slots__})
            rows.append(replace(row, index=int(row.index), score=float(row.score)))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} line {number} holds no scores; make the file anew by vlmlab curate.") from error
    return rows


class Filtered:
    """The samples of a source whose text a trained model finds to match, its own texts among them.

    Args:
        source: the samples, as they were scored.
        path: the file that ``vlmlab curate`` wrote; samples without a row there are left out.
        least: texts with a smaller score are dropped; 0: the image has to explain its text better than all others did;
            null: none is.
        share: of the texts that are left the best so many, in 0..1, as Align2LLaVA keeps a tenth (its ranking is a
            reward model's that people taught; here it is the score).
        captions: ``given`` texts, those the model has ``written``, or ``both``, each kept by its own score.

    Raises:
        DataError: no such file, or one that was made of other data.
        UserError: an unknown word, or nothing is left.
    """

    def __init__(
        self,
        source: SampleSource,
        path: Text,
        least: float | None = 0.0,
        captions: Captions = "both",
        share: Share = 1.0,
    ) -> None:
        if captions not in CAPTIONS:
            raise UserError(f"captions={captions!r} is unknown; choose from {', '.join(CAPTIONS)}.")
        self.source, self.path, self.least, self.captions, self.share = source, str(path), least, captions, share
        rows = read_scores(Path(path).expanduser())
        if rows and not all(0 <= row.index < len(source) for row in rows):
            raise DataError(f"{path} has rows beyond the {len(source)} samples of its source; it is of other data.")
        given = [(row.score, row, "") for row in rows if captions != "written"]
        own = [(row.written_score, row, row.written) for row in rows if captions != "given" and row.written]
        fitting = [text for text in (*given, *own) if least is None or text[0] >= least]
        best = sorted(fitting, key=lambda text: (-text[0], text[1].index, text[2] != ""))
        kept = [text[1:] for text in best[: math.ceil(share * len(best))]]
        if not kept:
            raise UserError(
                f"No text in {path} is kept by least={least} and share={share}; set least=null or raise share."
            )
        self._kept = sorted(kept, key=lambda text: (text[0].index, text[1] != ""))
        self.skipped: list[Skipped] = list(getattr(source, "skipped", []))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        row, written = self._kept[index]
        sample = self.source[row.index]
        if sample.id != row.id:
            raise DataError(
                f"Sample {sample.id} is {row.id} in {self.path}, which was made of other data; make it anew."
            )
        return replace(sample, id=f"{sample.id}/written", turns=_said(sample.turns, written)) if written else sample

    def turns(self, index: int) -> Sequence[Turn]:
        """The turns of a sample, as its source or the model tells them."""
        row, written = self._kept[index]
        turns = turns_of(self.source, row.index)
        return _said(turns, written) if written else turns

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        row, written = self._kept[index]
        return f"{label(self.source, row.index)}/written" if written else label(self.source, row.index)

    def stored(self, most: int) -> Iterator[Stored]:
        """The images of its source."""
        if (told := getattr(self.source, "stored", None)) is not None:
            yield from told(most)

    def fingerprint(self) -> Facts:
        """That of its source, the content of the file, and what is kept."""
        facts = files_fingerprint([Path(self.path)])
        return {
            **facts,
            "source": source_fingerprint(self.source),
            "least": self.least,
            "captions": self.captions,
            "share": self.share,
        }


def _said(turns: Sequence[Turn], text: str) -> tuple[Turn, ...]:
    return (replace(turns[0], answer=text, references=()), *turns[1:])
