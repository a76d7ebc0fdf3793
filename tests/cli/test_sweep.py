"""``vlmlab sweep show | table | report`` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.asking import outcome

from vlmlab.cli import main as console
from vlmlab.cli.sweep import run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for mask, score in (("bidir", 0.5), ("causal", 0.4)):
        folder = tmp_path / f"it's 50%, done/mask-{mask}"
        folder.mkdir(parents=True)
        (folder / "overrides.json").write_text(f'["mask={mask}"]')
        (folder / "result.json").write_text(f'{{"metrics": {{"quiz/vqa_accuracy": {score}}}, "cost": {{"params": 3}}}}')
    return tmp_path / "it's 50%, done"


def call(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    return outcome(lambda: run(words), "sweep", [], monkeypatch, capsys)


def test_looking_at_a_sweep(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(["show", str(sweep)], monkeypatch, capsys)
    assert (code, err) == (0, "") and out.startswith(f"{sweep}: 2 cells: 2 done\n") and "mask-causal" in out
    code, out, _ = call(["table", str(sweep), "form=csv"], monkeypatch, capsys)
    assert code == 0 and out == (sweep / "table.csv").read_text() and out.startswith("mask,n,state")
    code, out, _ = call(["table", str(sweep), "form=markdown"], monkeypatch, capsys)
    assert code == 0 and out == (sweep / "table.md").read_text() and out.startswith("| mask |")
    code, out, _ = call(["report", str(sweep)], monkeypatch, capsys)
    assert code == 0 and out == f"{sweep / 'report.html'}\n"
    assert "No answers side by side: " in (sweep / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["show"], 2, "which sweep? write its folder, as in: vlmlab sweep show sweeps/<name>"),
        (["table", "nowhere"], 2, "sweep=nowhere is not a folder; give an existing one, as in: vlmlab sweep table"),
        (["table", "{sweep}", "form=pdf"], 2, "form=pdf"),
        (["report", "{sweep}", "cells=[a,b]"], 2, "cells: a is not a cell of "),
        (["report", "{sweep}", "cost=hours"], 1, "cost=hours is not of every finished cell; choose from params"),
        (["show", "{sweep}", "metrik=1"], 2, "did you mean metric?"),
        (["show", "sweep={sweep}/x"], 2, "/x is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str],
    code: int,
    sentence: str,
    sweep: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, out, err = call([word.format(sweep=sweep) for word in words], monkeypatch, capsys)
    assert found == code and out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_the_console_command_sends_each_word_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(console.os, "execv", lambda _, words: started.append(words[2:]))
    for line in ("sweep show a", "sweep compare a baseline=b", "sweep name=show", "sweep"):
        console.main(line.split())
    assert started == [
        ["vlmlab.cli.sweep", "show", "a"],
        ["vlmlab.cli.compare", "a", "baseline=b"],
        ["vlmlab.cli.train", "--multirun", "name=show"],
        ["vlmlab.cli.train", "--multirun"],
    ]
