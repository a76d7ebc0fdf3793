"""What the environment said is not written down, wherever the configuration takes it from there."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from vlmlab.runs.config import plain
from vlmlab.runs.withheld import filled, fits, hidden, literal, marks, present, stored

CFG: dict[str, Any] = {
    "root": "${oc.env:A_ROOT}",
    "data": {"path": "${root}/a.json", "copies": [{"path": "${data.path}"}, "${oc.env:A_ROOT}"], "n": 3},
    "stage": "${data}",
    "fallback": "${oc.env:NOBODY_SETS_THIS,there}",
    "number": "${oc.decode:${oc.env:A_NUMBER}}",
    "list": "${oc.decode:${oc.env:A_LIST}}",
    "plain": "no reference",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A_ROOT": "/private", "A_NUMBER": "12", "A_LIST": "[/private, 2]"}.items():
        monkeypatch.setenv(name, value)


def test_every_way_to_a_variable_is_withheld() -> None:
    cfg = OmegaConf.create(CFG)
    known, written = plain(cfg), stored(cfg)
    assert "/private" in str(known) and "/private" not in str(written)
    assert written["data"] == written["stage"]
    assert written["data"]["path"] == "${oc.env:A_ROOT}/a.json"
    assert (written["number"], written["plain"], written["data"]["n"]) == (12, "no reference", 3)
    assert written["list"] == "${oc.decode:${oc.env:A_LIST}}" and "fallback" in written
    found = marks(written, known)
    assert {"root", "data.path", "data.copies.0.path", "data.copies.1", "list"} <= set(found)
    assert filled(written, known, found) == known
    other = known | {"root": "/elsewhere"}
    assert filled(written, other, found) == known | {"root": "${oc.env:A_ROOT}"}
    assert hidden({"x": ["/private", "/private/a.json", 1]}, written, known) == {
        "x": ["${oc.env:A_ROOT}", "${oc.env:A_ROOT}/a.json", 1]
    }


def test_without_the_environment_nothing_changes() -> None:
    cfg = OmegaConf.create({"a": {"b": 1}, "c": "${a.b}", "hydra": {"x": "???"}})
    assert stored(cfg) == plain(cfg) == {"a": {"b": 1}, "c": 1}


def test_marks_are_salted() -> None:
    one, two = (marks({"a": "${oc.env:A_ROOT}"}, {"a": "/private"})["a"] for _ in range(2))
    assert one != two and fits(one, "/private") and fits(two, "/private") and not fits(one, "/other")
    assert not fits(None, "x") and not fits("", "x") and not fits(3, "x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:A_ROOT}/x", "/private/x"),
        ("${oc.env:NOBODY_SETS_THIS,there}", "there"),
        ("${oc.env:NOBODY_SETS_THIS}", None),
        ("${oc.env:A_ROOT}${other}", None),
        ("${oc.decode:${oc.env:A_LIST}}", None),
        ("nothing", None),
    ],
)
def test_only_plain_variables_are_taken(text: str, value: str | None) -> None:
    assert present(text) == value


@pytest.mark.parametrize("text", ["${x}", r"\${x}", r"\\${x}", "a${b}c${d}", "$x", "\\", "{a}", "${", "${a.b:c}\\"])
def test_a_literal_text_is_itself(text: str) -> None:
    assert OmegaConf.create({"a": literal(text)}).a == text
