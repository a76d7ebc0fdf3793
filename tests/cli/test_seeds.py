"""``vlmlab plan -m`` as typed: cells are composed and none is trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from vlmlab.cli.seeds import launched, run_seeds


def call(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> tuple[int, str, str]:
    words = line.split(" ")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    GlobalHydra.instance().clear()
    try:
        code = run_seeds(words)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = call("-m mask=bidir,causal effect=0.03", monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("2 compositions with 1 seed each: 2 cells, 1 comparison with one baseline\nwith 1 seed and")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("-m mask=bidir,causal effect=-1", "effect=-1 is not possible; give a difference above 0"),
        ("-m mask=bidir,causal power=1", "power=1 is not possible; give a share between 0 and 1"),
        ("-m mask=bidir,causal pilot=nowhere", "pilot=nowhere is not there; give the folder of a finished sweep"),
        ("-m mask=bidir,causal device=h100", "device=h100 is about one composition"),
        ("-m mask=bidir,casual", "did you mean causal?"),
    ],
)
def test_mistakes(
    line: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = call(line, monkeypatch, capsys, tmp_path)
    assert code in (1, 2) and sentence in err and len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_words_of_the_claim_are_the_launchers() -> None:
    words = launched(["-m", "mask=a,b", "effect=3e-2", "metric=x/y, z"], Path("s"))
    assert words == [
        "-m", "mask=a,b", "hydra.launcher.effect=0.03", "hydra.launcher.metric='x/y, z'", "hydra/launcher=seeds",
        "hydra.sweep.dir='s'",
    ]  # fmt: skip
