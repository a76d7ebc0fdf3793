"""``vlmlab demo`` as its user meets it: in a browser, by keyboard, with a picture of one's own and with wrong files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.slow.runs import trained

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="needs the extra demo")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SHORT = (
    "budget=test", "budget.max_steps=1", "budget.eval_limit=4", "data.benchmarks.world_test.max_new_tokens=3",
    "evaluation.held_out=[]", "evaluation.baselines=[]", "trainer.accelerator=cpu", "recipe=frozen",
    "~data.benchmarks.world_captions", "~data.benchmarks.world_compositional",
)  # fmt: skip


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The page of two tiny runs, which ends by Ctrl-C in one line."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    trained(*SHORT, cwd=tmp_path)
    shutil.copytree(tmp_path / "outputs" / "run", tmp_path / "outputs" / "other")
    words = ["-m", "vlmlab.cli", "demo", "run=outputs/run,outputs/other", "port=0", "max_new_tokens=4"]
    errors, own = (tmp_path / "errors").open("w+"), tmp_path / "own"
    own.mkdir()
    server = subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "TMPDIR": str(own)},
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"demo of run and other: (http://127\.0\.0\.1:\d+)  \(Ctrl-C ends it\)\n", line)
        errors.seek(0)
        assert found, (line, errors.read())
        yield found[1]
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=30)[0] == "demo ended\n" and server.returncode == 0
        errors.seek(0)
        assert errors.read() == ""
        assert not list(own.glob("vlmlab-demo-*"))  # what was uploaded is gone
    finally:
        server.kill()


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """It, in a browser; everything that it asks for is from the server itself, and nothing fails in it."""
    asked: list[str] = []
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#ask")
        yield page
        assert not wrong
        assert asked and not [one for one in asked if not one.startswith((url, "data:", "blob:"))]
        browser.close()


def answered(page: Any) -> None:
    """Wait until all four answers are there."""
    page.wait_for_function("document.querySelectorAll('.card.done').length == 4")


def test_keyboard_upload_and_wrong_files(page: Any, tmp_path: Path) -> None:
    field = page.locator("#question textarea")
    assert field.input_value() and page.locator(".pictures figure.right img").count() == 1
    field.focus()
    page.keyboard.press("Enter")  # asks
    answered(page)
    cards = page.locator(".card")
    assert [card.locator("h3").inner_text() for card in cards.all()] == ["A run", "B other", "A run", "B other"]
    assert "right picture" in cards.nth(0).inner_text() and "wrong" in cards.nth(2).inner_text()
    shown = cards.nth(0).locator(".heat:visible")
    assert shown.count() == 1 and shown.bounding_box()["width"] > 100
    cards.nth(0).locator("input[type=radio]").first.focus()
    page.keyboard.press("ArrowRight")  # the map of the first token
    assert cards.nth(0).locator(".heat:visible").get_attribute("class") == "heat m1"
    page.get_by_label("Attention of which layer?").click()
    page.get_by_role("option", name="1", exact=True).click()
    page.wait_for_selector("text=layer 1 of")

    for name, content in (("notes.png", b"no picture"), ("bomb.png", bomb(tmp_path / "small.png"))):
        (tmp_path / name).write_bytes(content)
        upload(page, "#right-file", tmp_path / name)
        page.wait_for_selector(f"#pictures .problem:has-text('{name}')")
        assert page.locator("#pictures .problem").inner_text().startswith("This file cannot be used as a picture.")
        field.press("Enter")
        page.wait_for_selector("#answers .problem")
        assert page.locator(".card").count() == 0
        page.locator("#right-file").get_by_label(re.compile("clear|remove", re.IGNORECASE)).first.click()
        page.wait_for_selector("#pictures .problem", state="detached")

    Image.fromarray(np.full((50, 90, 3), 200, np.uint8)).save(tmp_path / "mine.jpg")
    upload(page, "#right-file", tmp_path / "mine.jpg", by_keyboard=True)
    page.wait_for_selector("text=uploaded: mine.jpg")
    page.locator("#ask").press("Enter")
    answered(page)
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def upload(page: Any, where: str, file: Path, by_keyboard: bool = False) -> None:
    """Choose a file as a user does."""
    button = page.locator(f"{where} button:has(input[type=file]), {where} button").first
    with page.expect_file_chooser() as chooser:
        if by_keyboard:
            button.focus()
            page.keyboard.press("Enter")
        else:
            button.click()
    chooser.value.set_files(file)


def bomb(place: Path) -> bytes:
    """A small PNG that claims 60,000 x 60,000 pixels."""
    Image.new("RGB", (8, 8)).save(place)
    data = bytearray(place.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)
