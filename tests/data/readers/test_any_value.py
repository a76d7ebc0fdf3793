"""Any JSON value in any place of a record: every reader uses it or leaves the row out and says why; none breaks."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from vlmlab.cli.conf import conf_folder
from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Sample
from vlmlab.data.readers.coco_captions import CocoCaptions
from vlmlab.data.readers.karpathy import KarpathyCaptions
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.parquet import LlavaParquet, VqaParquet
from vlmlab.data.readers.tar import TarShards, write_shard
from vlmlab.data.readers.vqa import VqaJson
from vlmlab.runs.config import leaves

Path_ = tuple[str | int, ...]
GOOD, WRONG = 2, 12
"""Rows of a file as they should be, followed by those with another value somewhere."""


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(file, "png")
    return file.getvalue()


# -- records, of which each reader has a valid one -------------------------------------------------------------------


def vqa(n: int) -> dict[str, Any]:
    return {"question_id": n, "image": f"{n}.png", "question": "q?", "answer": "red", "answer_type": "colour"}


def answers(n: int) -> dict[str, Any]:
    many = ["red", {"answer": "blue"}, 3]
    return {"question_id": str(n), "image": f"{n}.png", "question": "q?", "answers": many, "split": "train"}


def llava(n: int) -> dict[str, Any]:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    return {"id": str(n), "image": [f"{n}.png"], "conversations": turns}


def parts(n: int) -> dict[str, Any]:
    asked = [{"type": "image_url", "image_url": {"url": f"{n}.png"}}, {"type": "text", "text": "q?"}]
    answered = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    return {"id": n, "video": None, "messages": [{"role": "user", "content": asked}, answered]}


def karpathy(n: int) -> dict[str, Any]:
    sentences = [{"raw": "A dog.", "sentid": 1000 + 3 * n}, {"raw": "A cat.", "sentid": 1001 + 3 * n}]
    return {"filename": f"{n}.png", "filepath": ".", "split": "train", "cocoid": n, "sentences": sentences}


def table(n: int) -> dict[str, Any]:
    return {
        "raw": ["A dog.", "A cat."],
        "sentids": [1000 + 2 * n, 1001 + 2 * n],
        "split": "train",
        "filename": f"{n}.png",
    }


def coco(n: int) -> dict[str, Any]:
    note = {"id": n, "image_id": n, "caption": "A dog."}
    return {"images": {"id": n, "file_name": f"{n}.png"}, "annotations": note}


def talk(n: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    return {"id": str(n), "image": {"bytes": png(n), "path": f"{n}.png"}, "conversations": turns}


def asked(n: int) -> dict[str, Any]:
    return {"image": {"bytes": png(n), "path": f"{n}.png"}, "question": "q?", "answer": "red", "answer_type": "colour"}


# -- their files -----------------------------------------------------------------------------------------------------


def listed(name: str, folder: Path, rows: list[Any]) -> str:
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    return str(folder / name)


def under(keys: tuple[str, ...], folder: Path, rows: list[Any]) -> str:
    whole = {key: [row[key] if isinstance(row, dict) and key in row else row for row in rows] for key in keys}
    (folder / "whole.json").write_text(json.dumps(whole if len(keys) > 1 else {keys[0]: rows}))
    return str(folder / "whole.json")


def tabled(folder: Path, rows: list[Any]) -> str:
    with (folder / "table.csv").open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.DictWriter(file, list(table(0)))
        writer.writeheader()
        for row in (row for row in rows if isinstance(row, dict) and row.keys() <= table(0).keys()):
            cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
            writer.writerow({k: v.encode("utf-8", "replace").decode() for k, v in cells.items()})
    return str(folder / "table.csv")


def sharded(folder: Path, rows: list[Any]) -> str:
    members = [(f"{n}.{end}", content) for n, row in enumerate(rows) for end, content in
               (("png", png(n)), ("json", json.dumps(row).encode()))]  # fmt: skip
    return str(write_shard(folder / "s.tar", members))


def columns(folder: Path, rows: list[Any]) -> str:
    """A file for the good rows and one for each other, which may have columns of other types."""
    pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (pip install 'vlmlab[parquet]')")
    pq = pytest.importorskip("pyarrow.parquet")
    place = folder / "parquet"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for number, chosen in enumerate([rows[:GOOD], *([row] for row in rows[GOOD:])]):
        if isinstance(chosen[0], dict) and rows[0].keys() <= chosen[0].keys():
            with contextlib.suppress(pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):  # none holds it
                pq.write_table(pa.Table.from_pylist(chosen), place / f"{number:02d}.parquet")
    return str(place)


Make = Callable[[Path, list[Any]], str]
KINDS: dict[str, tuple[Any, Callable[[int], dict[str, Any]], Make, bool]] = {
    "vqa": (VqaJson, vqa, partial(listed, "v.json"), True),
    "vqa of many answers": (VqaJson, answers, partial(listed, "v.jsonl"), True),
    "llava": (LlavaJson, llava, partial(listed, "l.json"), True),
    "llava in parts": (LlavaJson, parts, partial(listed, "l.jsonl"), True),
    "karpathy": (KarpathyCaptions, karpathy, partial(under, ("images",)), True),
    "karpathy table": (KarpathyCaptions, table, tabled, True),
    "coco": (CocoCaptions, coco, partial(under, ("images", "annotations")), True),
    "tar": (TarShards, llava, sharded, False),
    "tar in parts": (TarShards, parts, sharded, False),
    "llava parquet": (LlavaParquet, talk, columns, True),
    "vqa parquet": (VqaParquet, asked, columns, False),
}
"""Reader, record, file, whether it takes an image folder."""

TYPED = {"vlmlab.data.readers.hub.HubRecords", "vlmlab.data.readers.hub_stream.HubStream"}
"""Readers whose columns `datasets` gives one type each; their rows are in `test_hub.py`."""


def test_every_reader_of_conf_is_here() -> None:
    used = {
        str(value)
        for file in (conf_folder() / "data").rglob("*.yaml")
        for key, value in leaves(OmegaConf.to_container(OmegaConf.load(file)), deep=True)  # type: ignore[arg-type]
        if key.endswith("_target_") and ".readers." in str(value)
    }
    assert used - TYPED == {f"{kind.__module__}.{kind.__name__}" for kind, *_ in KINDS.values()}


# -- what is there instead -------------------------------------------------------------------------------------------

WORDS = ["", " ", "a", "<image>", "\0", "\ud800", "\x1b[31m", "\u2028", "../x", "/etc/passwd", "nan", "x" * 5000]
KEYS = ["a", "value", "path", "bytes", "url", "text", "type", "answer", "raw", ""]
NUMBERS = [0, -1, 3, 10**30, 1.5, float("nan"), float("inf"), -0.0, True, False, None]
scalars = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(st.characters(codec=None), max_size=4))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
)


def places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place of a record, outer ones too."""
    if path:
        yield path
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def replaced(record: Any, path: Path_, value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(record)
    changed[path[0]] = replaced(record[path[0]], path[1:], value)
    return changed


# -- the property ----------------------------------------------------------------------------------------------------


def is_usable(sample: Sample) -> None:
    for turn in sample.turns:
        for text in (sample.id, turn.prompt, turn.answer, *turn.references, sample.system):
            assert isinstance(text, str) and "\0" not in text
            text.encode()
        assert turn.prompt.strip() and turn.answer.strip()
    assert all(image.ndim == 3 for image in sample.images)


def read(source: Any) -> tuple[list[str], list[str]]:
    """The ids of a source's usable rows, and why the others are not, skipped before or met now."""
    labels, reasons = [], [one.reason for one in source.skipped]
    source.fingerprint()
    for index in range(len(source)):
        source.label(index).encode()
        try:
            is_usable(source[index])
            source.turns(index)
            labels.append(source.label(index))
        except DataError as error:
            reasons.append(str(error))
    return labels, reasons


def check(name: str, folder: Path, wrong: Sequence[tuple[Path_, Any]], split: str | None) -> None:
    kind, record, make, has_folder = KINDS[name]
    rows: list[Any] = [record(n) for n in range(GOOD)]
    rows += [replaced(record(GOOD + n), path, value) for n, (path, value) in enumerate(wrong)]
    file = make(folder, rows)
    more: dict[str, Any] = {"images": str(folder)} if has_folder else {}
    more |= {"split": split, "val_fraction": 0.0} | (
        {} if kind in (LlavaJson, LlavaParquet) else {"test_fraction": 0.0}
    )
    labels, reasons = read(kind(file, max_bad_fraction=0.99, **more))
    assert len(labels) >= GOOD and len(set(labels)) == len(labels) and len(reasons) <= 2 * WRONG
    try:
        _, strict = read(kind(file, **more))
    except DataError as error:
        strict = [str(error)]
    assert bool(strict) == bool(reasons), (strict, reasons)
    for reason in (*strict, *reasons):
        assert len(reason) <= 300 and "\n" not in reason and "; " in reason, reason
        reason.encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    for n in range(GOOD + WRONG):
        (made / f"{n}.png").write_bytes(png(n))
    return made


def drawn(name: str) -> st.SearchStrategy[tuple[list[tuple[Path_, Any]], str | None]]:
    found = [*sorted(places(KINDS[name][1](GOOD)), key=str), ()]
    wrong = st.lists(st.tuples(st.sampled_from(found), values), min_size=WRONG, max_size=WRONG)
    return st.tuples(wrong, st.sampled_from([None, "train"]))


def holds(name: str, folder: Path, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(drawn(name))
    def every_file(what: tuple[list[tuple[Path_, Any]], str | None]) -> None:
        check(name, folder, *what)

    every_file()


@pytest.mark.parametrize("name", KINDS)
def test_any_value_anywhere(name: str, folder: Path) -> None:
    holds(name, folder, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_any_value_anywhere_at_length(name: str, folder: Path) -> None:
    holds(name, folder, 60)
