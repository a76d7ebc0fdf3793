from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmlab.contracts.errors import DataError
from vlmlab.data.readers.tar import INDEX, TarShards, write_index, write_shard


def png(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 3)).save(file, "png")
    return file.getvalue()


def record(question: str, **more: Any) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    return json.dumps({"conversations": turns, **more}).encode()


def members(count: int) -> list[tuple[str, bytes]]:
    made: list[tuple[str, bytes]] = []
    for n in range(count):
        made += [(f"{n:05d}.png", png(n + 1)), (f"{n:05d}.json", record("<image>\nWhat?"))]
    return made


def test_captions_records_and_many_images(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "a.tar",
        [
            ("0.png", png(1)), ("0.txt", b" A cat. \n"),
            ("x/1.0.png", png(2)), ("x/1.1.png", png(3)), ("x/1.json", record("<image> or <image>?")),
            ("2.json", record("Hi")),
            ("3.json", record("<image>", image="0.png")),
            ("alone.png", png(9)),
        ],
    )  # fmt: skip
    source = TarShards(str(shard), prompt="Describe.")
    assert (
        [source[i].id for i in range(len(source))]
        == ["a/0", "a/x/1", "a/2", "a/3"]
        == [source.label(i) for i in range(4)]
    )
    assert (source[0].turns[0].prompt, source[0].turns[0].answer) == ("Describe.", "A cat.")
    assert [source.turns(i) for i in range(len(source))] == [source[i].turns for i in range(len(source))]
    assert [[image.shape[1] for image in source[i].images] for i in range(4)] == [[1], [2, 3], [], [1]]


def test_the_index_is_used_and_must_fit(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", members(5))
    index = shard.with_name("a.tar" + INDEX)
    first = TarShards(str(shard))
    index.unlink()
    second = TarShards(str(shard))
    assert all(np.array_equal(first[i].images[0], second[i].images[0]) for i in range(5)) and len(first) == len(second)
    write_index(shard)
    with shard.open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(DataError, match=r"a.tar.index.json is not that of a.tar; delete it"):
        TarShards(str(shard))
    again = write_shard(tmp_path / "b.tar", members(5)).read_bytes()
    assert again == write_shard(tmp_path / "c.tar", members(5)).read_bytes()


def test_folder_glob_and_split(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", members(30))
    write_shard(tmp_path / "train-1.tar", members(30))
    write_shard(tmp_path / "test-0.tar", members(4))
    sizes = [len(TarShards(str(tmp_path), split=split, val_fraction=0.2)) for split in ("train", "val", "test")]
    assert sizes[2] == 4 and sizes[0] + sizes[1] == 60 and sizes[1] > 3
    assert len(TarShards(str(tmp_path / "train-*.tar"))) == 60


def test_links_tricks_and_damage_are_refused(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in [
            ("../0.png", png(1)), ("../0.json", record("<image>")),  # only a name here: nothing is unpacked
            ("1.json", record("<image>", image="/etc/hostname")),
            ("2.json", b"{"), ("3.json", record("<image>")), ("3.png", b""),
            ("4.txt", "ü".encode("latin-1")), ("4.png", png(1)),
            ("5.txt", b"two"), ("5.a.png", png(1)), ("5.b.png", png(1)),
        ]:  # fmt: skip
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))
        link = tarfile.TarInfo("6.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        facts = tarfile.TarInfo("6.json")
        facts.size = len(record("<image>"))
        tar.addfile(facts, io.BytesIO(record("<image>")))
    with pytest.raises(DataError, match=r"member 6.png is no plain file"):
        TarShards(str(shard))
    source = TarShards(str(shard), max_bad_fraction=0.9)
    assert source[0].images[0].shape == (3, 1, 3) and [s.id for s in source.skipped] == ["a/6.png"]
    reasons = {1: "'/etc/hostname' is no member", 2: "2.json is not valid JSON", 3: "is an empty file",
               4: "is not UTF-8", 5: "has 2 images", 6: "1 image tags (<image>) for 0 images"}  # fmt: skip
    for index, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            source[index]
        assert reason in str(caught.value) and "a.tar" in str(caught.value)
    assert len(TarShards(str(shard), max_bad_fraction=0.9, verify=True)) == 1
    (tmp_path / "b.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"b\.tar is cut off or no plain tar file"):
        TarShards(str(tmp_path / "b.tar"))


def test_a_shard_cut_short(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", members(20))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"is not that of a\.tar"):
        TarShards(str(shard))
    shard.with_name("a.tar" + INDEX).unlink()
    with pytest.raises(DataError, match=r"a\.tar is cut off"):
        TarShards(str(shard))
