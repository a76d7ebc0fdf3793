"""``MetadataBalanced``: a pool of captioned images without the surplus of its commonest things (MetaCLIP)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, SampleSource, Turn, references, turns_of
from vlmlab.contracts.values import Count, Names, Seed
from vlmlab.data.fingerprint import Facts, source_fingerprint
from vlmlab.data.skipped import Skipped, label


class MetadataBalanced:
    """A source cut down by a list of entries, as MetaCLIP's curation does (arXiv 2309.16671, algorithm 1).

    A sample matches the entries that are in its captions, whole words apart from case and punctuation. An entry with
    n matches in the pool keeps each of them with probability min(1, t / n), each by itself; a sample stays if any of
    its entries keeps it, and one that matches none goes. The order stays; what is kept follows from the seed.

    Args:
        source: the pool.
        metadata: the entries.
        t: most matches that an entry is meant to keep (20,000 in the paper for 400 million pairs).
        pool: only so many samples of the source, from the first; null: all.
        seed: of what is kept.

    Attributes:
        matches: entry -> n in the pool.

    Raises:
        UserError: nothing is left.
    """

    def __init__(
        self, source: SampleSource, metadata: Names, t: Count, pool: Count | None = None, seed: Seed = 0
    ) -> None:
        self.source, self.t = source, t
        self.turns_in_memory = getattr(source, "turns_in_memory", False)
        self.skipped: list[Skipped] = list(getattr(source, "skipped", []))
        entries = {entry: f" {_words(entry)} " for entry in dict.fromkeys(metadata)}
        size = len(source) if pool is None else min(pool, len(source))
        matched = [_matched(turns_of(source, index), entries) for index in range(size)]
        self.matches = {entry: sum(entry in found for found in matched) for entry in entries}
        draw = np.random.Generator(np.random.PCG64(seed))
        self._rows = [index for index, found in enumerate(matched) if self._stays(found, draw)]
        if not self._rows:
            raise UserError(f"MetadataBalanced: none of {size} samples has one of {len(entries)} entries; give others.")

    def _stays(self, found: Sequence[str], draw: np.random.Generator) -> bool:
        """Whether any of a sample's entries keeps it; every entry draws, whatever the others drew."""
        return any([draw.random() < self.t / self.matches[entry] for entry in found])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._rows[index]]

    def turns(self, index: int) -> Sequence[Turn]:
        """The turns of a sample, as its source tells them."""
        return turns_of(self.source, self._rows[index])

    def fingerprint(self) -> Facts:
        """Those of its source, and which samples are left."""
        return {"source": source_fingerprint(self.source), "rows": digest_of(self._rows)}

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return label(self.source, self._rows[index])


def digest_of(rows: Sequence[int]) -> str:
    """32 hexadecimal digits that change with the rows."""
    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()[:32]


def _words(text: str) -> str:
    """Lower case, words apart by one blank."""
    return " ".join(re.findall(r"[\w'-]+", text.lower()))


def _matched(turns: Sequence[Turn], entries: dict[str, str]) -> list[str]:
    """The entries that are in any caption of a sample."""
    said = [f" {_words(text)} " for turn in turns for text in references(turn)]
    return [entry for entry, words in entries.items() if any(words in text for text in said)]
