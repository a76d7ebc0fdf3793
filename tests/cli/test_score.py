"""``vlmlab score`` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.asking import ask_words

from vlmlab.cli.score import score_command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which run? write run=<folder>, as in: vlmlab score run=outputs/default"),
        (["run=nowhere"], "run=nowhere is not a run folder"),
        (["run=x", "metrics=3"], "metrics=3 is not possible"),
        (["run=x", "metric=[a]"], "no key 'metric'"),
    ],
)
def test_mistakes(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err, _ = ask_words("score", words, score_command)
    assert code == 2 and err.startswith(f"error: {said}") and err.count("\n") == 1, err
