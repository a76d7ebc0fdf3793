"""``vlmlab score`` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.asking import ask_words

from vlmlab.cli.score import score_command, with_key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which run? write run=<folder>, as in: vlmlab score run=outputs/default"),
        (["run=nowhere"], "run=nowhere is not a run folder"),
        (["run=x", "metrics=3"], "metrics=3 is not possible"),
        (["run=x", "metric=[a]"], "no key 'metric'"),
        (["it's/not here"], "run=it's/not here is not a run folder"),
        (["no/where/predictions/world_test.shuffled.jsonl"], "run=no/where is not a run folder"),
    ],
)
def test_mistakes(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err, _ = ask_words("score", with_key(words), score_command)
    assert code == 2 and err.startswith(f"error: {said}") and err.count("\n") == 1, err


def test_a_file_of_answers_is_one_benchmark_of_its_run() -> None:
    words = ["outputs/x/predictions/pope.no_image.jsonl", "trust=true"]
    assert with_key(words) == ["run='outputs/x'", "benchmarks=['pope']", "trust=true"]
