from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG, SampleSource
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.world.sources import WorldInterleaved, WorldText, WorldTextInstruct
from vlmlab.data.world.written import WorldWritten
from vlmlab.data.writer import write_llava

SOURCES = {
    "written": WorldWritten("train", 12),
    "interleaved": WorldInterleaved("train", 4),
    "with text": WorldTextInstruct("train", 8, text_fraction=0.5),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    source: SampleSource = SOURCES[name]
    path = write_llava(source, tmp_path / "out")
    back = LlavaJson(str(path), str(path.parent), split="train", val_fraction=0.0)
    assert len(back) == len(source)
    read = {sample.id: sample for sample in (back[index] for index in range(len(back)))}
    for index in range(len(source)):
        sample = source[index]
        again = read[sample.id]
        assert [t.answer for t in again.turns] == [t.answer for t in sample.turns] and again.system == sample.system
        words = [[t.prompt.replace(IMAGE_TAG, "").strip() for t in one.turns] for one in (again, sample)]
        assert words[0] == words[1] and len(again.images) == len(sample.images)
        assert all(np.array_equal(a, b) for a, b in zip(again.images, sample.images, strict=True))


def test_an_image_is_written_once_and_nothing_is_overwritten(tmp_path: Path) -> None:
    write_llava(WorldWritten("train", 12), tmp_path, n=5)
    assert len(list((tmp_path / "images").iterdir())) == 5
    with pytest.raises(UserError, match="new or empty"):
        write_llava(WorldWritten("train", 12), tmp_path)
    with pytest.raises(DataError, match="no prompt or no answer"):
        write_llava(WorldText("train", 9, forms=["caption"]), tmp_path / "text")
