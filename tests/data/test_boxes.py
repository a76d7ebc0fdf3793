from __future__ import annotations

import random

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.boxes import BOXES, Box, Boxes, box_text, of_pixels, overlap, to_pixels

TOLD = {
    "qwen_vl": "<box>(250,500),(750,999)</box>",
    "minigpt_v2": "{<25><50><75><100>}",
    "shikra": "[0.250,0.500,0.750,1.000]",
    "paligemma": "<loc0512><loc0256><loc1023><loc0768>",
    "kosmos2": "<box><loc_520><loc_1015></box>",
}
"""Half the width, and the lower half, of a picture."""


def drawn(rng: random.Random) -> tuple[Box, tuple[int, int]]:
    """A box of at least a pixel in a picture of some size."""
    height, width = rng.randint(8, 900), rng.randint(8, 900)
    x0, y0 = rng.randint(0, width - 1), rng.randint(0, height - 1)
    return (x0, y0, rng.randint(x0 + 1, width), rng.randint(y0 + 1, height)), (height, width)


@pytest.mark.parametrize("boxes", BOXES)
def test_a_box_as_the_paper_writes_it(boxes: Boxes) -> None:
    text = box_text(boxes)
    assert text.write((0.25, 0.5, 0.75, 1.0)) == TOLD[boxes]
    read = text.read(f"It is at {TOLD[boxes]}, I think.")
    assert read is not None and overlap(read, (0.25, 0.5, 0.75, 1.0)) > 0.87
    assert text.read("row one column two") is None and text.read("") is None
    assert text.without(f"{text.named('the circle')}{TOLD[boxes]} .") == "the circle ."


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("bins", [None, 64])
def test_there_and_back_within_a_step(boxes: Boxes, bins: int | None) -> None:
    """Half a step, and a whole one at the far edge where the largest number lies before it; of cells two halves."""
    text, rng = box_text(boxes, bins), random.Random(0)
    steps = bins or {"qwen_vl": 1000, "minigpt_v2": 100, "shikra": 1000, "paligemma": 1024, "kosmos2": 32}[boxes]
    for _ in range(400):
        box, size = drawn(rng)
        shares = of_pixels(box, size)
        read = text.read(text.write(shares))
        assert read is not None
        for value, back in zip(shares, read, strict=True):
            cut = value * steps > steps - 0.5 and boxes in ("qwen_vl", "paligemma")
            most = 1.0 if cut or boxes == "kosmos2" else 0.5
            assert abs(value - back) * steps <= most + (0.04 if boxes == "shikra" else 1e-9)
        assert text.write(read) == text.write(shares) or boxes == "kosmos2"


def test_pixels_survive_any_resizing() -> None:
    """10,000 pictures: the box of the picture in another size is that box in that size, within half a pixel."""
    text, rng = box_text("qwen_vl"), random.Random(1)
    for _ in range(10_000):
        box, size = drawn(rng)
        back = to_pixels(of_pixels(box, size), size)
        assert back == pytest.approx(box)
        other = (rng.randint(8, 450), rng.randint(8, 450))
        read = text.read(text.write(of_pixels(box, size)))
        assert read is not None
        there, wanted = to_pixels(read, other), to_pixels(of_pixels(box, size), other)
        assert all(abs(a - b) <= 0.5 for a, b in zip(there, wanted, strict=True))


def test_location_tokens_are_those_of_transformers() -> None:
    from transformers.models.kosmos2 import processing_kosmos2 as theirs

    text, rng = box_text("kosmos2"), random.Random(2)
    for _ in range(300):
        box, size = drawn(rng)
        shares = of_pixels(box, size)
        first, last = theirs.coordinate_to_patch_index(shares, 32)
        told = f"<box><loc_{first}><loc_{last}></box>"
        assert text.write(shares) == told
        assert text.read(told) == pytest.approx(theirs.patch_index_to_coordinate(first, last, 32))
    assert text.read("<box><loc_5><loc_5000></box>") is None


def test_overlap_by_counting_pixels() -> None:
    rng = random.Random(3)
    for _ in range(50):
        (a, _), (b, _) = ((tuple(sorted(rng.sample(range(12), 2)) * 2), 0) for _ in range(2))
        first, second = (a[0], a[2], a[1], a[3]), (b[0], b[0], b[1], b[1])
        cells = [
            {(x, y) for x in range(int(c[0]), int(c[2])) for y in range(int(c[1]), int(c[3]))} for c in (first, second)
        ]
        if all(cells):
            assert overlap(first, second) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))
    assert overlap((0, 0, 0, 1), (0, 0, 0, 1)) == overlap((1, 1, 0, 0), (0, 0, 1, 1)) == 0


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(UserError, match="choose from qwen_vl"):
        box_text("yolo")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bins=1 "):
        box_text("qwen_vl", 1)
