"""Image files that would be read for minutes or for ever are refused within a second or two, in one sentence."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from vlmlab.contracts.errors import DataError
from vlmlab.data import images
from vlmlab.data.images import load_image


def saved(kind: str, size: tuple[int, int] = (8, 6), **how: object) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)).save(
        out, kind, **how
    )
    return out.getvalue()


def with_hole(path: Path, head: bytes, size: int = 3 * 2**30) -> None:
    """A file of gigabytes that takes no room on the disk."""
    path.write_bytes(head)
    os.truncate(path, size)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(extra: bytes) -> bytes:
    whole = saved("PNG")
    return whole[:33] + extra + whole[33:]


def refused(path: Path, seconds: float = 5) -> str:
    began = time.process_time()
    with pytest.raises(DataError) as found:
        load_image(path.name, path.parent)
    assert time.process_time() - began < seconds and len(str(found.value)) <= 300
    return str(found.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM"])
def test_gigabytes_behind_a_small_image(tmp_path: Path, kind: str) -> None:
    with_hole(tmp_path / "a.img", saved(kind))
    assert "3,221,225,472 bytes are too many for 48 pixels" in refused(tmp_path / "a.img")


def test_a_file_that_is_read_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_AT_ONCE", 1_000_000)
    with_hole(tmp_path / "a.webp", saved("WEBP"))
    assert "has more than 1,000,000 bytes" in refused(tmp_path / "a.webp")


def test_a_long_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_READS", 20_000)
    (tmp_path / "a.ppm").write_bytes(b"P6\n#" + b"x" * 50_000 + b"\n2 2\n255\n" + bytes(12))
    assert "has more than 20,000 pieces" in refused(tmp_path / "a.ppm")


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9)),
        chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50_000_000), 9)),
    ],
    ids=["text", "profile"],
)
def test_bombs_in_the_notes_of_a_png(tmp_path: Path, extra: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png_with(extra))
    began = time.process_time()
    try:
        assert load_image("a.png", tmp_path).shape == (6, 8, 3)  # a broken profile around sound pixels
    except DataError as error:
        assert len(str(error)) <= 300
    assert time.process_time() - began < 2


def test_more_scans_than_a_camera_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(saved("JPEG", (64, 64), progressive=True))
    assert load_image("a.jpg", tmp_path).shape == (64, 64, 3)
    monkeypatch.setattr(images, "MOST_SCANS", 1e-4)
    assert "it has 10 scans" in refused(tmp_path / "a.jpg")


def test_many_frames_cost_what_the_first_does(tmp_path: Path) -> None:
    frames = [Pillow.new("L", (4, 4), n % 256) for n in range(300)]
    for kind in ("GIF", "TIFF", "WEBP"):
        frames[0].save(tmp_path / f"a.{kind}", kind, save_all=True, append_images=frames[1:])
        assert load_image(f"a.{kind}", tmp_path).shape == (4, 4, 3)


def test_a_table_of_millions_of_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BigTIFF may count its entries in 64 bits."""
    monkeypatch.setattr(images, "MOST_READS", 20_000)
    entries = struct.pack("<HHQQ", 65000, 1, 1, 0) * 50_000
    head = b"II" + struct.pack("<HHHQ", 43, 8, 0, 16) + struct.pack("<Q", 50_000)
    (tmp_path / "a.tif").write_bytes(head + entries + bytes(8))
    assert "has more than 20,000 pieces" in refused(tmp_path / "a.tif")


def test_millions_of_decimal_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P3 2 1 255\n" + b"1 2 3 4 5 6\n")
    assert load_image("a.ppm", tmp_path).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    monkeypatch.setattr(images, "MOST_PLAIN", 5)
    assert "more than 5 decimal numbers" in refused(tmp_path / "a.ppm")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert "is not a file" in refused(tmp_path / "a.png") and "is not a file" in refused(tmp_path / "b.png")
