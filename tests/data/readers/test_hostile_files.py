"""Pipes, folders and devices where a file is due, records that are nested or long without end: one sentence at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlmlab.contracts.errors import DataError
from vlmlab.data.readers import records
from vlmlab.data.readers.coco_captions import CocoCaptions
from vlmlab.data.readers.karpathy import KarpathyCaptions
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.parquet import LlavaParquet
from vlmlab.data.readers.records import read_each
from vlmlab.data.readers.tar import TarShards
from vlmlab.data.readers.vqa import VqaJson

READERS = [VqaJson, LlavaJson, CocoCaptions, KarpathyCaptions, TarShards, LlavaParquet]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file(reader: Any, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    given = str(path) if kind == "pipe" else "/dev/zero"
    folder = () if reader in (TarShards, LlavaParquet) else (str(tmp_path),)
    with pytest.raises(DataError, match=r"is not a file|is a pipe or a device, not a file") as found:
        reader(given, *folder)
    assert len(str(found.value)) <= 300


def test_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[" * 500_000, '{"a":' * 500_000, "[" * 500_000 + "]" * 500_000, "9" * 10_000):
        path.write_text(text)
        with pytest.raises(DataError, match="is not valid JSON") as found:
            list(read_each(path))
        assert len(str(found.value)) <= 300


def test_a_line_without_end_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"a": 1}), json.dumps({"a": "x" * 1000}), "", json.dumps({"a": "x" * 90}), json.dumps({"a": 2})]
    path.write_text("\n".join(lines))
    rows = list(read_each(path))
    assert [row.number if isinstance(row, records.Row) else str(row) for row in rows] == [
        1, f"{path}, line 2: has more than 100 characters; give each object a line of its own", 4, 5,
    ]  # fmt: skip


def test_lines_that_are_no_words(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        list(read_each(path))
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="is empty"):
        list(read_each(path))
