"""``vlmlab compare`` as typed: a folder without a key, rows with commas and equals signs, mistakes in a sentence."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hydra
import pytest
from tests.cli.asking import outcome

from vlmlab.cli.compare import compare_command, spelled
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import guard, run_command


def call(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    main = hydra.main(config_path=str(conf_folder()), config_name="compare", version_base="1.3")(guard(compare_command))
    run = partial(run_command, main, conf_folder(), "compare")
    return outcome(run, "compare", spelled(words), monkeypatch, capsys)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for mask, score in (("bidir", 0.5), ("causal", 0.4)):
        for seed in range(2):
            folder = tmp_path / f"it's 50%, done/mask-{mask}_seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "overrides.json").write_text(f'["mask={mask}", "seed={seed}"]')
            (folder / "result.json").write_text(f'{{"metrics": {{"quiz/vqa_accuracy": {score + seed / 100}}}}}')
    return tmp_path / "it's 50%, done"


def test_a_comparison(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(sweep), "baseline=mask=bidir", "metric=quiz/vqa_accuracy", f"out={sweep.parent}"]
    code, out, err = call(words, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "causal against bidir: not distinguishable: -0.100, interval -0.100 to -0.100, n = 2, p = 0.5" in out
    assert "note: with 2 seeds and 1 comparison nothing can be significant at 0.05" in out
    assert (sweep.parent / "difference_quiz-vqa_accuracy_to_bidir.csv").is_file()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "which sweep? write sweep=..., as in: vlmlab compare sweeps/<name> baseline=mlp,bidir"),
        (["nowhere", "baseline=mlp"], 2, "sweep=nowhere is not a folder"),
        (["{sweep}"], 2, "which baseline? write baseline=..."),
        (["{sweep}", "baseline=mlp,bidir"], 1, "baseline=mlp,bidir names no row of the sweep; give one of: bidir"),
        (["{sweep}", "baseline=bidir", "until=loss<x"], 1, "until=loss<x is not a threshold"),
        (["{sweep}", "baseline=bidir", "out=no/where"], 2, "out=no/where is not a folder"),
        (["{sweep}", "basline=bidir"], 2, "did you mean baseline?"),
    ],
)
def test_mistakes(
    words: list[str],
    code: int,
    sentence: str,
    sweep: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    got, _, err = call([word.format(sweep=sweep) for word in words], monkeypatch, capsys)
    assert got == code and sentence in err and err.startswith("error: ") and len(err.splitlines()) == 1
