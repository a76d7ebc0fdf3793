"""MetaCLIP's balancing against a loop, and against its expected counts."""

from __future__ import annotations

import numpy as np
import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.metadata import MetadataBalanced

ENTRIES = ["cat", "red dog", "cow"]
TEXTS = ["A cat.", "the red  dog, asleep", "a cat and a cow", "redo dogs", "cats", "nothing", "Cow!"]


def pool(texts: list[str], times: int = 1) -> list[Sample]:
    return [Sample(str(i), (), (Turn("", text),)) for i, text in enumerate(texts * times)]


def test_what_matches_is_whole_words() -> None:
    found = MetadataBalanced(pool(TEXTS), ENTRIES, t=100)  # type: ignore[arg-type]
    assert found.matches == {"cat": 2, "red dog": 1, "cow": 2}
    assert [found[i].id for i in range(len(found))] == ["0", "1", "2", "6"]  # all that match, in order
    assert [found.turns(i)[0].answer for i in range(len(found))][1] == "the red  dog, asleep"
    with pytest.raises(UserError, match="none of 7 samples has one of 1 entries"):
        MetadataBalanced(pool(TEXTS), ["horse"], t=1)  # type: ignore[arg-type]


def test_it_is_the_loop() -> None:
    samples = pool(TEXTS, 20)
    found = MetadataBalanced(samples, ENTRIES, t=7, seed=3)  # type: ignore[arg-type]
    draw, want = np.random.Generator(np.random.PCG64(3)), []
    own = [["cat"], ["red dog"], ["cat", "cow"], [], [], [], ["cow"]] * 20
    counts = {entry: sum(entry in entries for entries in own) for entry in ENTRIES}
    for index, entries in enumerate(own):
        kept = [draw.random() < min(1, 7 / counts[entry]) for entry in entries]
        if any(kept):
            want.append(str(index))
    assert [found[i].id for i in range(len(found))] == want and 0 < len(want) < 60


def test_common_entries_come_down_to_t_and_rare_ones_stay() -> None:
    samples = pool(["a cat"] * 97 + ["a cow"] * 2 + ["a red dog"], 100)
    found = MetadataBalanced(samples, ENTRIES, t=300)  # type: ignore[arg-type]
    kept = [found.turns(i)[0].answer for i in range(len(found))]
    # 9,700 matches, each kept with probability 300 / 9700: standard deviation about 17
    assert abs(kept.count("a cat") - 300) < 70 and kept.count("a cow") == 200 and kept.count("a red dog") == 100
    other = MetadataBalanced(samples, ENTRIES, t=300, seed=1)  # type: ignore[arg-type]
    assert [found.label(i) for i in range(300)] != [other.label(i) for i in range(300)]
