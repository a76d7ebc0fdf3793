"""Every mode and depth of image has its one right value in RGB, or is a bad row with one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.collate import resized
from vlmlab.data.images import MAX_SIDE, decode_image, load_image
from vlmlab.data.pixels import from_pillow, value_range

WHITE = [255, 255, 255]


def png(
    bits: int, kind: int, width: int, row: bytes, clear: bytes | None = None, palette: bytes | None = None
) -> bytes:
    """A PNG of one row, by the letter of its specification."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    made = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0))
    made += chunk(b"PLTE", palette) if palette else b""
    made += chunk(b"tRNS", clear) if clear is not None else b""
    return made + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def words(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}H", *numbers)


def pixels(data: bytes, values: Any = "auto") -> list[list[int]]:
    found: list[list[int]] = decode_image(io.BytesIO(data), "a", value_range(values))[0].tolist()
    return found


PALETTE = bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])
PNGS: dict[str, tuple[bytes, list[list[int]]]] = {
    "1 bit": (png(1, 0, 2, b"\x80"), [WHITE, [0] * 3]),
    "1 bit, black clear": (png(1, 0, 2, b"\x80", words(0)), [WHITE, WHITE]),
    "2 bits, grey 1 clear": (png(2, 0, 3, bytes([0b11011000]), words(1)), [WHITE, WHITE, [170] * 3]),
    "4 bits, grey 1 clear": (png(4, 0, 2, b"\x12", words(1)), [WHITE, [34] * 3]),
    "8 bits, grey 7 clear": (png(8, 0, 2, bytes([7, 8]), words(7)), [WHITE, [8] * 3]),
    "16 bits, one grey clear": (png(16, 0, 2, words(0x1234, 0x1235), words(0x1234)), [WHITE, [18] * 3]),
    "grey and alpha": (png(8, 4, 3, bytes([0, 255, 0, 0, 0, 128])), [[0] * 3, WHITE, [127] * 3]),
    "16 bit grey and alpha": (png(16, 4, 2, words(0x1234, 65535, 0x1234, 0)), [[18] * 3, WHITE]),
    "colour": (png(8, 2, 2, bytes([1, 2, 3, 4, 5, 6])), [[1, 2, 3], [4, 5, 6]]),
    "one colour clear": (png(8, 2, 2, bytes([1, 2, 3, 4, 5, 6]), words(1, 2, 3)), [WHITE, [4, 5, 6]]),
    "16 bit colour": (png(16, 2, 1, words(0x0180, 0x8000, 0xFFFF)), [[1, 128, 255]]),
    "16 bit colour, one clear": (
        png(16, 2, 3, words(9, 9, 9, 9, 9, 10, 0x0100, 9, 9), words(9, 9, 9)), [WHITE, [0] * 3, [1, 0, 0]],
    ),
    "16 bit colour and alpha": (png(16, 6, 2, words(256, 512, 768, 65535, 0, 0, 0, 0)), [[1, 2, 3], WHITE]),
    "palette": (png(8, 3, 3, bytes([0, 1, 2]), palette=PALETTE), [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
    "palette, clear by bytes": (
        png(8, 3, 3, bytes([0, 1, 2]), bytes([0, 255]), PALETTE), [WHITE, [40, 50, 60], [70, 80, 90]],
    ),
    "2 bit palette, half clear": (png(2, 3, 2, bytes([0b00010000]), bytes([255, 0]), PALETTE), [[10, 20, 30], WHITE]),
}  # fmt: skip


@pytest.mark.parametrize("name", PNGS)
def test_png(name: str) -> None:
    data, want = PNGS[name]
    assert pixels(data) == want


def test_twelve_bits_in_sixteen_by_their_range() -> None:
    grey = png(16, 0, 4, words(0, 1024, 4095, 65535))
    assert pixels(grey) == [[0] * 3, [4] * 3, [16] * 3, WHITE]
    assert pixels(grey, [0, 4095]) == [[0] * 3, [64] * 3, WHITE, WHITE]
    assert pixels(grey, [1024, 4095])[0] == [0] * 3 == pixels(grey, [1024, 4095])[1]
    assert pixels(png(16, 0, 2, words(4095, 7), words(7)), [0, 4095]) == [WHITE, WHITE]  # and the clear grey
    assert pixels(png(16, 2, 2, words(0, 2048, 4095, 9, 9, 9), words(9, 9, 9)), [0, 4095]) == [[0, 128, 255], WHITE]
    assert pixels(png(16, 4, 1, words(2048, 65535)), [0, 4095]) == [[128] * 3]
    assert pixels(png(16, 6, 1, words(0, 2048, 4095, 65535)), [0, 4095]) == [[0, 128, 255]]
    assert pixels(PNGS["colour"][0], [0, 4095]) == PNGS["colour"][1]  # 8 bits stay as they are


@pytest.mark.parametrize(
    "given", ["wide", [0], [0, 1, 2], [5, 5], [9, 1], [0, float("nan")], [0, float("inf")], 7, ["a", "b"], [True, 9]]
)
def test_a_range_that_is_none(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.image_range=.* is not a range; give \[low, high\]"):
        load_image("a.png", tmp_path, given)


def tiff(folder: Path, values: np.ndarray, **tags: int) -> list[list[int]]:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag[1:])] = value
    Image.fromarray(values).save(folder / "a.tif", tiffinfo=info)
    found: list[list[int]] = load_image("a.tif", folder)[0].tolist()
    return found


def test_tiff_of_many_kinds_of_numbers(tmp_path: Path) -> None:
    assert tiff(tmp_path, np.array([[0, 25700, 65535]], np.uint16)) == [[0] * 3, [100] * 3, WHITE]
    assert tiff(tmp_path, np.array([[0, 25700, 65535]], np.int32)) == [[0] * 3, [100] * 3, WHITE]
    assert tiff(tmp_path, np.array([[0, 0.2, 1]], np.float32)) == [[0] * 3, [51] * 3, WHITE]
    for bad in (np.array([[-1, 5]], np.int32), np.array([[70000]], np.int32), np.array([[np.inf]], np.float32)):
        with pytest.raises(DataError, match=r"a\.tif cannot be decoded \(its pixels"):
            tiff(tmp_path, bad)
    Image.fromarray(np.array([[-1000, 0, 1000, 3000]], np.int32)).save(tmp_path / "ct.tif")  # Hounsfield units
    assert load_image("ct.tif", tmp_path, [-1000, 1000])[0, :, 0].tolist() == [0, 128, 255, 255]


def test_a_tiff_in_which_nothing_is_white(tmp_path: Path) -> None:
    """TIFF 6.0, PhotometricInterpretation 0; Pillow turns 8 bits around and leaves 16 as they are."""
    raw = struct.pack("<HH", 0, 65535)
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 0), (273, 4, 8), (277, 3, 1), (278, 3, 1),
            (279, 4, 4)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 12) + raw + ifd)
    assert load_image("a.tif", tmp_path)[0].tolist() == [WHITE, [0] * 3]


def test_a_pgm_of_twelve_bits(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + words(0, 2048, 4095))
    assert load_image("a.pgm", tmp_path)[0, :, 0].tolist() == [0, 128, 255]
    assert load_image("a.pgm", tmp_path, [0, 4095])[0, :, 0].tolist() == [0, 128, 255]
    assert load_image("a.pgm", tmp_path, [0, 2048])[0, :, 0].tolist() == [0, 255, 255]


def drawn(mode: str) -> Image.Image:
    return Image.new("RGB", (2, 1), (200, 100, 50)).convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_in_memory(mode: str) -> None:
    image = drawn("L").convert("LA").convert("La") if mode == "La" else drawn("P").convert("PA") if mode == "PA" else (
        drawn("RGBA").convert("RGBa") if mode == "RGBa" else drawn(mode)
    )  # fmt: skip
    grey = np.asarray(drawn("L"))[0, 0]
    want = {"1": [WHITE, [0] * 3], "L": [grey] * 3, "LA": [grey] * 3, "La": [grey] * 3}.get(mode, [200, 100, 50])
    found = from_pillow(image)[0]
    if mode == "1":
        assert found.tolist() in ([WHITE, WHITE], [WHITE, [0] * 3], [[0] * 3, WHITE])
    else:
        assert np.abs(found.astype(int) - want).max() <= (4 if mode in ("YCbCr", "HSV", "P", "PA") else 0), found


def test_lab_goes_by_the_colours_it_names(tmp_path: Path) -> None:
    Image.new("LAB", (2, 1), (138, 166, 174)).save(tmp_path / "a.tif")  # sRGB 200, 100, 50 by the CIE's formulas
    assert np.abs(load_image("a.tif", tmp_path).astype(int) - [200, 100, 50]).max() <= 1


@pytest.mark.parametrize("kind", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_in_either_order(kind: str) -> None:
    order = ">u2" if kind.endswith("B") else "<u2"
    image = Image.frombytes(kind, (2, 1), np.array([257, 65535], order).tobytes())
    assert from_pillow(image)[0].tolist() == [[1] * 3, WHITE]


def test_cmyk_jpeg_many_pages_and_animations(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(load_image("a.jpg", tmp_path).astype(int) - [255, 0, 0]).max() <= 2
    first, second = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (5, 9), "blue")
    for name in ("a.tif", "a.webp", "a.png"):
        more = second if name == "a.tif" else second.crop((0, 0, 3, 2))
        lossless = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[more], **lossless)
        assert load_image(name, tmp_path).shape == (2, 3, 3) and load_image(name, tmp_path)[0, 0].tolist() == [
            255,
            0,
            0,
        ]


def test_lines_that_are_too_long_and_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    long = io.BytesIO()
    Image.new("1", (MAX_SIDE + 1, 1)).save(long, "png")
    with pytest.raises(DataError, match="65,535 in a line"):
        decode_image(long, "a")

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with pytest.raises(DataError, match="Sample s: its image of 3 x 2 pixels does not fit the memory"):
        resized(out_of_memory, np.zeros((2, 3, 3), np.uint8), "s")  # type: ignore[arg-type]
    monkeypatch.setattr(Image.Image, "load", out_of_memory)
    with pytest.raises(DataError, match="Image a does not fit the memory"):
        decode_image(io.BytesIO(PNGS["1 bit"][0]), "a")


def test_bad_files_are_one_short_sentence() -> None:
    cut: Sequence[bytes] = [b"", b"\x89PNG\r\n\x1a\n", PNGS["colour"][0][:50], b"GIF89a", b"II*\0" * 9]
    for data in cut:
        with pytest.raises(DataError) as caught:
            decode_image(io.BytesIO(data), "x" * 5000)
        assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
