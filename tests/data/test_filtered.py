from __future__ import annotations

from pathlib import Path

import pytest

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.filtered import Captions, Filtered, Scored, read_scores, write_scores
from vlmlab.data.fingerprint import source_fingerprint
from vlmlab.data.world.noisy import NoisyCaptions, NoisyInstruct
from vlmlab.data.world.sources import WorldCaptions, WorldInstruct, WorldQuestions

SOURCE = WorldCaptions("short", "train", 20)
ROWS = [
    Scored(0, SOURCE[0].id, 0.5, "a cat", -0.5),
    Scored(1, SOURCE[1].id, -0.5, "a dog", 0.1),
    Scored(3, SOURCE[3].id, 0.0),
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    write_scores(tmp_path / "scores.jsonl", ROWS)
    return str(tmp_path / "scores.jsonl")


def test_a_file_of_scores_comes_back(file: str) -> None:
    assert read_scores(Path(file)) == ROWS
    Path(file).write_text('{"index": 0}\n')
    with pytest.raises(DataError, match="line 1 holds no scores"):
        read_scores(Path(file))
    with pytest.raises(DataError, match="vlmlab curate"):
        read_scores(Path("nowhere.jsonl"))


KEPT = {"given": ["0", "3"], "written": ["1/written"], "both": ["0", "1/written", "3"]}


@pytest.mark.parametrize("captions", KEPT)
def test_texts_are_kept_by_their_own_scores(file: str, captions: Captions) -> None:
    kept = Filtered(SOURCE, file, captions=captions)
    names = [
        name.replace("/short", "").replace("world-v1/train/", "") for name in (kept[i].id for i in range(len(kept)))
    ]
    assert names == KEPT[captions]
    for index in range(len(kept)):
        sample = kept[index]
        assert kept.turns(index) == sample.turns and len(sample.images) == 1
        own = SOURCE[int(kept.label(index).split("/")[0])]
        assert sample.image_ids == own.image_ids
        if sample.id.endswith("written"):
            assert (sample.turns[0].answer, sample.turns[0].references) == ("a dog", ())
            assert sample.turns[0].prompt == own.turns[0].prompt
        else:
            assert sample.turns == own.turns


def test_least_and_fingerprint(file: str) -> None:
    assert len(Filtered(SOURCE, file, least=-1.0)) == 5 and len(Filtered(SOURCE, file, least=0.2)) == 1
    facts = source_fingerprint(Filtered(SOURCE, file))
    assert facts == source_fingerprint(Filtered(SOURCE, file)) != source_fingerprint(Filtered(SOURCE, file, least=0.2))
    write_scores(Path(file), ROWS[:1])
    assert source_fingerprint(Filtered(SOURCE, file))["files"] != facts["files"]


def test_the_best_share_is_kept(file: str) -> None:
    """Of 5 texts, by score: 0, then 1 as written, 3, and the two at -0.5."""
    best = Filtered(SOURCE, file, least=None, share=0.4)
    assert [best[i].id.removeprefix("world-v1/train/") for i in range(len(best))] == ["0/short", "1/short/written"]
    assert len(Filtered(SOURCE, file, least=None)) == 5 and len(Filtered(SOURCE, file, share=0.01)) == 1
    assert len(Filtered(SOURCE, file, least=None, captions="given", share=0.5)) == 2
    facts = [source_fingerprint(Filtered(SOURCE, file, share=share)) for share in (1.0, 0.5)]
    assert facts[0] != facts[1]


def test_what_does_not_fit_is_refused(file: str) -> None:
    with pytest.raises(UserError, match="set least=null"):
        Filtered(SOURCE, file, least=9.0)
    with pytest.raises(UserError, match="choose from given, written, both"):
        Filtered(SOURCE, file, captions="all")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="beyond the 2 samples"):
        Filtered(WorldCaptions("short", "train", 2), file)
    with pytest.raises(DataError, match="made of other data"):
        Filtered(WorldQuestions("train", 20), file)[0]


def test_a_known_share_of_captions_is_another_pictures() -> None:
    plain, noisy = WorldCaptions("short", "train", 300), NoisyCaptions("short", "train", 300, noise=0.4)
    matched = [index for index in range(300) if noisy.matched(index)]
    assert 0.52 < len(matched) / 300 < 0.68
    assert all(noisy.turns(index) == plain.turns(index) for index in matched)
    others = set(range(300)) - set(matched)
    assert sum(noisy.turns(index)[0].references != plain.turns(index)[0].references for index in others) > 0.95 * len(
        others
    )
    index = min(others)
    assert (noisy[index].images[0] == plain[index].images[0]).all() and noisy[index].id == plain[index].id
    assert [NoisyCaptions("short", "train", 9, noise=0.0).turns(i) for i in range(9)] == [
        plain.turns(i) for i in range(9)
    ]
    talk, other = WorldInstruct("train", 60), NoisyInstruct("train", 60, noise=0.5)
    right = [index for index in range(60) if other.turns(index) == talk.turns(index)]
    assert right == [index for index in range(60) if other.matched(index)] and 20 < len(right) < 40
    with pytest.raises(UserError, match="noise"):
        NoisyCaptions("short", "train", 1, noise=1.5)
