"""``vlmlab demo``: its words and its mistakes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from tests.cli.asking import ask_words

from vlmlab.cli.demo import check_installed, demo_command, with_list
from vlmlab.contracts.errors import UserError


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("run=a,b", ["a", "b"]),
        ("run=outputs/x y,b'c", ["outputs/x y", "b'c"]),
        ("run=a,", ["a"]),
        ("run=a", "a"),
        ("run=[a,b]", ["a", "b"]),
    ],
)
def test_two_runs_are_a_list(word: str, names: object) -> None:
    words = with_list([word, "port=1", "--help"])
    assert words[1:] == ["port=1", "--help"]
    assert OverridesParser.create().parse_override(words[0]).value() == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which run? write run=<folder>, as in: vlmlab demo run=outputs/default"),
        (["run=nowhere"], "run=nowhere is not a run folder"),
        (["run=[nowhere,b]"], "run=nowhere is not a run folder"),
        (["run=[a,b,c]"], "run names 3 runs and the page has room for 2; give one or two"),
        (["run=[]"], "run names 0 runs"),
        (["run=x", "port=70000"], "port=70000 is not possible; give a whole number from 0 to 65535"),
        (["run=x", "host=5"], "host=5 is not possible"),
        (["run=x", "image=a.png"], "no key 'image'"),
    ],
)
def test_mistakes(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = ask_words("demo", words, demo_command)
    assert found[0] == 2 and found[2].startswith(f"error: {said}") and found[2].count("\n") == 1, found


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "vlmlab\[demo\]"'):
        check_installed()
