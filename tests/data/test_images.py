from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlmlab.contracts.errors import DataError
from vlmlab.data.images import MAX_PIXELS, ImageFolder, load_image

REFUSED = {
    "decompression_bomb.gif": "more than",
    "decompression_bomb.ico": "more than",
    "png_header_60000x60000.png": "more than",
    "broken.png": "not a readable image",
    "truncated_image.png": "truncated",
    "unknown_compression_method.png": "not a readable image",
    "text_file.jpg": "not a readable image",
    "hopper_bad_checksum.msp": "not a readable image",
    "negative_size.ppm": "not a readable image",
    "not_enough_data.jp2": "not a readable image",
    "zero_byte.jpg": "empty file",
    "zero_width.gif": "not a readable image",
    "jpeg_cut_in_half.jpg": "truncated",
    "truncated_jpeg.jpg": "truncated",
}
CONVERTED_BY_RULE = {  # where a plain conversion would clip, drop transparency: mean of R, G, B by our rules
    "12bit.cropped.tif": (0.1, 0.1, 0.1),
    "gray_16bit.png": (84.6, 84.6, 84.6),
    "uint16_1_4660.tif": (18, 18, 18),
    "different_transparency.gif": (255.0, 188.7, 188.7),
    "p_trns_single.png": (127.9, 176.3, 162.7),
    "rgb_trns.png": (127.9, 176.3, 162.7),
    "transparent.webp": (210.9, 202.7, 204.2),
    "tRNS_null_1x1.png": (255, 255, 255),
}


def save(folder: Path, name: str, image: Image.Image, **options: object) -> str:
    image.save(folder / name, **options)
    return name


def gradient(height: int = 5, width: int = 7) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def test_every_nasty_file_has_its_decision(shared_data: Path) -> None:
    root = shared_data / "nasty_images"
    files = json.loads((root / "manifest.json").read_text())["files"]
    refused = set()
    for entry in files:
        name = Path(entry["file"]).name
        try:
            pixels = load_image(entry["file"], root)
        except DataError as error:
            refused.add(name)
            assert name in str(error) and REFUSED[name] in str(error) and "\n" not in str(error)
            continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.flags.c_contiguous
        expected = CONVERTED_BY_RULE.get(name, entry["pillow"]["mean_of_plain_convert_rgb"])
        assert np.allclose(pixels.reshape(-1, 3).mean(0), expected, atol=0.15), name
    assert refused == set(REFUSED) and len(files) == 54


def test_orientation_of_real_files_is_applied(shared_data: Path) -> None:
    root = shared_data / "nasty_images/files"
    turned = ["hopper_orientation_2.jpg", "hopper_orientation_4.jpg", "hopper_orientation_6.jpg"]
    turned += ["hopper_orientation_8.jpg", "exif_imagemagick_orientation.png", "g4_orientation_6.tif"]
    for name in turned:
        with Image.open(root / name) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(load_image(name, root), expected), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_equal_pillow(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(gradient())
    exif = image.getexif()
    exif[0x0112] = orientation
    save(tmp_path, "a.png", image, exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(load_image("a.png", tmp_path), expected)
    assert (expected.shape[0] == 7) == (orientation >= 5)


def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    save(tmp_path, "a.png", Image.fromarray(values))
    assert load_image("a.png", tmp_path)[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(("top", "stored"), [(1.0, [0, 128, 255]), (255.0, [0, 128, 255]), (65535.0, [0, 128, 255])])
def test_floating_point_by_its_range(tmp_path: Path, top: float, stored: list[int]) -> None:
    values = np.array([[0, 0.5 * top, top]], dtype=np.float32)
    save(tmp_path, "a.tif", Image.fromarray(values))
    assert load_image("a.tif", tmp_path)[0, :, 1].tolist() == stored


@pytest.mark.parametrize("bad", [np.nan, -1.0, 70000.0])
def test_floating_point_without_a_meaning_is_refused(tmp_path: Path, bad: float) -> None:
    save(tmp_path, "a.tif", Image.fromarray(np.array([[0.0, bad]], dtype=np.float32)))
    with pytest.raises(DataError, match=r"a\.tif cannot be decoded"):
        load_image("a.tif", tmp_path)


def test_transparency_lies_on_white_and_first_frame_counts(tmp_path: Path) -> None:
    clear, red = Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("RGBA", (2, 2), (255, 0, 0, 255))
    save(tmp_path, "clear.png", clear)
    save(tmp_path, "frames.gif", red, save_all=True, append_images=[Image.new("RGBA", (2, 2), (0, 0, 255, 255))])
    assert (load_image("clear.png", tmp_path) == 255).all()
    assert load_image("frames.gif", tmp_path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    save(tmp_path, "a.tif", image)
    assert (load_image("a.tif", tmp_path) >= 254).all() and load_image("a.tif", tmp_path).shape == (2, 3, 3)


def test_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    save(tmp_path, "wide.png", Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)))  # small file, one pixel row too many
    with pytest.raises(DataError, match="more than 89,478,485 pixels"):
        load_image("wide.png", tmp_path)


def test_paths_may_not_leave_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    save(tmp_path, "out.png", Image.fromarray(gradient()))
    save(root, "in.png", Image.fromarray(gradient()))
    os.symlink(tmp_path / "out.png", root / "link.png")
    os.symlink(tmp_path, root / "folder")
    os.symlink(root / "in.png", root / "sub" / "inner.png")
    os.symlink(root / "nowhere.png", root / "dangling.png")
    refused = {
        "../out.png": "leaves",
        "sub/../../out.png": "leaves",
        "..\\out.png": "leaves",
        str(root / "in.png"): "absolute",
        "C:\\out.png": "absolute",
        "link.png": "is a link",
        "folder/out.png": "linked folder",
        "dangling.png": "is a link",
        "sub/inner.png": "is a link",  # links that stay inside as well: what they mean may change between two runs
        "sub": "is not a file",
        "": "not a file name",
        "a\0.png": "not a file name",
        "in.png/x": "is not in",
        "x" * 5000: "is not in",
    }
    for name, reason in refused.items():
        with pytest.raises(DataError, match=reason):
            load_image(name, root)
    os.symlink(root, tmp_path / "alias")  # the folder itself may be a link
    assert load_image("in.png", tmp_path / "alias").shape == (5, 7, 3)


def test_missing_file_names_the_folder_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    save(tmp_path / "images", "a.png", Image.fromarray(gradient()))
    assert f"but it is in {tmp_path}" in str(ImageFolder(tmp_path / "images").check("images/a.png"))
    assert f"but it is in {tmp_path / 'images'}" in str(ImageFolder(tmp_path).check("a.png"))
    with pytest.raises(DataError, match=r"set data\.images"):
        ImageFolder(tmp_path / "absent")


def test_no_decoder_that_starts_a_program(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(DataError, match="not a readable image"):
        load_image("a.png", tmp_path)
