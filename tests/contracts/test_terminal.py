"""Nothing reaches a terminal but through one function, and no control character through it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from vlmlab.analyse.text import plain_table
from vlmlab.cli.entry import fail
from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.terminal import tell, visible

EVIL = "\x1b]0;title\x07\x1b[2J\rover\x08\x9b31m\u202eright\x00\tend"
SOURCES = Path(__file__).parents[2] / "src"


def test_control_characters_are_seen_and_not_obeyed() -> None:
    shown = visible(EVIL)
    assert "".join(c for c in shown if not c.isprintable()) == "" and "title" in shown and "\u241b" in shown
    assert visible("plain\ntext") == "plain\ntext" and visible("größer 日本 😀") == "größer 日本 😀"
    out = io.StringIO()
    tell(f"{EVIL}\nnext", out)
    assert out.getvalue() == f"{shown}\nnext\n"


def test_errors_and_tables_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (UserError, DataError):
        assert str(kind(f"row {EVIL}")) == f"row {visible(EVIL)}"
    assert fail(f"{EVIL} is wrong", 2) == 2
    tell(plain_table(["a"], [[EVIL]], keys=1)[-1])
    said = capsys.readouterr()
    assert all(c.isprintable() for c in (said.err + said.out).replace("\n", ""))


def test_nothing_else_prints() -> None:
    prints = re.compile(r"^[^\n#]*?(?<![\w.])(?:print|traceback\.print_exc)\(", re.M)
    found = {file.relative_to(SOURCES).as_posix() for file in SOURCES.rglob("*.py") if prints.search(file.read_text())}
    own_usage, docstring, snippet = "vlmlab/cli/main.py", "vlmlab/loading.py", "vlmlab/published/card.py"
    assert found == {"vlmlab/contracts/terminal.py", own_usage, docstring, snippet}
