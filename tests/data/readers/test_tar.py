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
    with pytest.raises(DataError, match=r"member 6.png is not a plain file"):
        TarShards(str(shard))
    source = TarShards(str(shard), max_bad_fraction=0.9)
    assert source[0].images[0].shape == (3, 1, 3) and [s.id for s in source.skipped] == ["a/6.png"]
    reasons = {1: "'/etc/hostname' is not a member", 2: "2.json is not valid JSON", 3: "is an empty file",
               4: "is not UTF-8", 5: "has 2 images", 6: "1 image tags (<image>) for 0 images"}  # fmt: skip
    for index, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            source[index]
        assert reason in str(caught.value) and "a.tar" in str(caught.value)
    assert len(TarShards(str(shard), max_bad_fraction=0.9, verify=True)) == 1
    (tmp_path / "b.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"b\.tar is cut off or not a plain tar file"):
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


def captions(folder: Path, *members: tuple[str, bytes]) -> list[tuple[str, str, list[int]]]:
    """Id, caption and the widths of the images, of every sample of a shard."""
    source = TarShards(str(write_shard(folder / "s.tar", members)))
    samples = [source[i] for i in range(len(source))]
    return [(s.id, s.turns[0].answer, [image.shape[1] for image in s.images]) for s in samples]


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    metadata = b'{"url": "http://x", "caption": "ten", "status": "success", "width": NaN, "exif": "{}"}'
    found = captions(
        tmp_path, ("0.jpg", png(1)), ("0.txt", b"ten"), ("0.json", metadata),
        ("1.jpg", png(2)), ("1.json", record("<image>", image=None)), ("1.txt", b"not this"),
    )  # fmt: skip
    assert found == [("s/0", "ten", [1]), ("s/1", "A dog.", [2])]
    with pytest.raises(DataError, match=r"no 'conversations' .keys: url, caption, status, width, exif"):
        captions(tmp_path, ("0.jpg", png(1)), ("0.json", metadata))
    with pytest.raises(DataError, match=r"0\.json is not valid JSON"):
        captions(tmp_path, ("0.jpg", png(1)), ("0.json", b"{"), ("0.txt", b"ten"))


def test_names_with_dots_and_folders(tmp_path: Path) -> None:
    """The key ends at the first dot of the base name, as in webdataset."""
    found = captions(
        tmp_path, ("000.seg.png", png(9)), ("000.jpg", png(1)), ("000.txt", b"one"), ("000.meta.json", b"{"),
        ("a.b.jpg", png(2)), ("a.b.txt", b"two"),
        ("v1.0/x.JPG", png(3)), ("v1.0/x.TXT", b"three"), ("v1.0/y.jpg", png(4)), ("v1.0/y.txt", b"four"),
        ("./z.jpg", png(5)), ("./z.txt", b"five"), ("._z.jpg", b"?"), ("._z.txt", b"?"), ("v1.0/._x.txt", b"?"),
        ("k.cls", b"3"), ("k.jpg", png(7)),
    )  # fmt: skip
    assert found == [
        ("s/000", "one", [1]), ("s/a", "two", [2]), ("s/v1.0/x", "three", [3]), ("s/v1.0/y", "four", [4]),
        ("s/./z", "five", [5]),
    ]  # fmt: skip
    with pytest.raises(
        DataError, match=r"members i\.1\.txt and i\.2\.txt are of one sample; what comes before the first"
    ):
        captions(tmp_path, ("i.1.jpg", png(1)), ("i.1.txt", b"one"), ("i.2.jpg", png(1)), ("i.2.txt", b"two"))


def test_folders_are_no_members_and_names_have_one_form(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (
            ("./d", None),
            ("./d/0.png", png(4)),
            ("./d/0.json", record("<image>", image="d//0.png")),
        ):
            facts = tarfile.TarInfo(name)
            facts.type, facts.size = (tarfile.DIRTYPE, 0) if content is None else (tarfile.REGTYPE, len(content))
            tar.addfile(facts, io.BytesIO(content or b""))
    assert TarShards(str(shard))[0].images[0].shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("data:image/png;base64," + "A" * 9000, "is a data URI"),
        ("http://x/a.jpg", "is a URL"),
        ("no.png", "not a member"),
    ],
)
def test_images_that_are_no_members(image: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        captions(tmp_path, ("0.json", record("<image>", image=image)))
    assert reason in str(caught.value) and len(str(caught.value)) <= 300


def test_no_picture_is_in_two_splits(tmp_path: Path) -> None:
    made = members(40)
    made += [(f"other{n}.json", record("<image>", image=f"{n % 40:05d}.png")) for n in range(80)]
    shard = write_shard(tmp_path / "a.tar", made)
    train, val = (TarShards(str(shard), split=split, val_fraction=0.4) for split in ("train", "val"))
    widths = [{s[i].images[0].shape[1] for i in range(len(s))} for s in (train, val)]
    assert not widths[0] & widths[1] and len(train) + len(val) == 120 and min(map(len, widths)) > 3
    both = [*members(2), ("own.png", png(9)), ("own.json", record("<image>", image="00000.png"))]
    shard = write_shard(tmp_path / "b.tar", both)
    assert len(TarShards(str(shard))[2].images) == 1  # where nothing is split it may
    source = TarShards(str(shard), split="train", val_fraction=0)
    with pytest.raises(DataError, match=r"has pictures and names '00000\.png', which is another sample's"):
        source[2]


def test_no_value_is_a_bad_sample(tmp_path: Path) -> None:
    for value in (b"NaN", b"null", b"1e999", b"[]", b'""', b"7"):
        talk = b'{"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": %s}]}' % value
        with pytest.raises(DataError, match="turn 2"):
            captions(tmp_path, ("0.png", png(1)), ("0.json", talk))
