"""Several sources as one, in given shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, SampleSource, Turn, turns_of
from vlmlab.contracts.values import Count, NotNegative, Positive, Seed
from vlmlab.data.fingerprint import Facts, source_fingerprint
from vlmlab.data.overlap import Stored
from vlmlab.data.sampler import block_of
from vlmlab.data.skipped import Skipped, label


class Mixture:
    """Several sources as one; which sample an index means follows from the arguments alone.

    Every source gets its share of the places exactly (to one), the places are shuffled by seed, and a source's samples
    come in passes: each once before any comes again.

    Args:
        sources: the data sets.
        weights: their shares, in any unit; null: their sizes, so that each sample comes once.
        size: samples of the mixture; null: those of all sources together.
        seed: of the places and of what is left out of a source that is not used up.
        temperature: shares are the sizes to the power 1 / temperature, so that small sources come more often (T5, arXiv
            1910.10683, section 3.5.2): 1 leaves them, 2 takes square roots (InstructBLIP, arXiv 2305.06500, section
            2.4), and the larger it is the more equal they become.

    Attributes:
        skipped: what the sources have left out.

    Raises:
        UserError: no source, a source without samples or a stream, weights that do not fit, or a temperature beside
            weights.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        weights: Sequence[NotNegative] | None = None,
        size: Count | None = None,
        seed: Seed = 0,
        temperature: Positive = 1.0,
    ) -> None:
        sizes = [len(source) for source in sources]
        if not sizes or min(sizes) < 1:
            raise UserError("A mixture needs sources with samples; remove the empty ones from sources.")
        if any(block_of(source) for source in sources):
            raise UserError(
                "A mixture goes back and forth in its sources, and one of them is a stream, which is read in order; "
                "read that set whole, as by data=hub, or train on it alone."
            )
        if weights is not None and temperature != 1:
            raise UserError(
                f"temperature={temperature} is about the sources' sizes and weights={[*weights]} leave them aside; "
                "give one of the two."
            )
        shares = flattened(sizes, temperature) if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(sizes) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
            raise UserError(f"weights={shares} do not fit {len(sizes)} sources; give one number from 0 for each.")
        total = sum(sizes) if size is None else size
        if total < 1:
            raise UserError(f"size={size} leaves no sample of the mixture; use a positive number or null for all.")
        self.sources = list(sources)
        self.turns_in_memory = all(getattr(source, "turns_in_memory", False) for source in sources)
        draw = np.random.Generator(np.random.PCG64(seed))
        counts = _counts(shares, total)
        self._source = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
        rows = [
            np.resize(draw.permutation(n), count) if count else np.zeros(0, np.int64)
            for n, count in zip(sizes, counts, strict=True)
        ]
        places = draw.permutation(total)
        self._source, self._row = self._source[places], np.concatenate(rows)[places]
        self.skipped: list[Skipped] = [s for source in sources for s in getattr(source, "skipped", [])]

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Sample:
        return self.sources[self._source[index]][int(self._row[index])]

    def turns(self, index: int) -> Sequence[Turn]:
        """The turns of a sample, as its source tells them."""
        return turns_of(self.sources[self._source[index]], int(self._row[index]))

    def stored(self, most: int) -> Iterator[Stored]:
        """The images of its sources that keep any."""
        for source in self.sources:
            if (told := getattr(source, "stored", None)) is not None:
                yield from told(most)

    def fingerprint(self) -> Facts:
        """Those of its sources, and the places they have here."""
        places = hashlib.sha256(self._source.tobytes() + self._row.tobytes()).hexdigest()[:32]
        return {"sources": [source_fingerprint(source) for source in self.sources], "places": places}

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return label(self.sources[self._source[index]], int(self._row[index]))


def flattened(sizes: Sequence[int], temperature: float) -> list[float]:
    """Sizes to the power 1 / temperature, the largest being 1; the sizes themselves at temperature 1.

    Raises:
        UserError: the temperature is not a positive number.
    """
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature} cannot flatten sizes; give a positive number, 1 to leave them.")
    if temperature == 1:
        return [float(size) for size in sizes]
    return [(size / max(sizes)) ** (1 / temperature) for size in sizes]


def _counts(shares: Sequence[float], total: int) -> list[int]:
    """`total` places by shares: whole parts first, the rest to the largest remainders."""
    wanted = [share / sum(shares) * total for share in shares]
    counts = [int(number) for number in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - wanted[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
