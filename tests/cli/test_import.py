"""``vlmlab import`` as typed: a published folder becomes a run that ``evaluate`` scores; mistakes are one sentence."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from asking import ask
from hydra.core.global_hydra import GlobalHydra
from tests.published import models

from vlmlab.cli.import_model import import_run

FEW = (
    "budget.eval_limit=2 evaluation.baselines=[] evaluation.held_out=[] evaluation.lookup_samples=null "
    "~data.benchmarks.world_captions ~data.benchmarks.world_compositional data.benchmarks.world_test.max_new_tokens=2"
)


def typed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["import", *line.split()])
    GlobalHydra.instance().clear()
    try:
        code = import_run(sys.argv[1:])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_is_made_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(f"path={models.llava()} to=runs/llava {FEW}", monkeypatch, capsys)
    assert (code, err) == (0, ""), err
    run = tmp_path / "runs" / "llava"
    assert "LlavaForConditionalGeneration, " in out and f"python evaluate.py run={run}" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:5] == ["python", "train.py", f"init_from={run}", "encoder=hf", f"encoder.path='{run}/encoder'"]
    assert "lm.image_token='<|image|>'" in command, "quoted for the shell and for Hydra"
    code, said, err, _ = ask(f"evaluate run={run} device=cpu")
    assert code == 0 and "world_test (2 items)" in said, err
    assert "world_test/vqa_accuracy" in json.loads((run / "evaluate" / "metrics.json").read_text())
    overrides = json.loads((run / "env.json").read_text())["overrides"]
    assert {"connector=mlp", "budget.eval_limit=2"} <= {*overrides} and f"path={models.llava()}" not in overrides


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("", 2, r"which model\? write path=<folder or hub id>, as in: vlmlab import path="),
        ("to=x", 2, r"path is needed; write path=\.\.\., as in"),
        ("path={p}", 2, r"to is needed; write to="),
        ("path={p} to=.", 2, r"to=\. has files in it"),
        ("path={p} to=x image_size=0", 2, r"image_size=0 is not possible"),
        ("path=nowhere to=x", 1, r"path=nowhere is neither a local folder nor a hub id within reach"),
        ("path={p} to=x connector=qformer", 2, r"connector=\.\.\. is decided by the published model; leave it out"),
        ("path={p} to=x preset=llava", 2, r"preset=\.\.\. composes another model than the published one"),
        ("path={p} to=x lm.dtyp=bfloat16", 2, r"no key 'lm.dtyp' .*did you mean lm.dtype"),
        ("path={p} to=x mask=visual_rows_open", 2, r"mask"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    line: str,
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    got, _, err = typed(line.replace("{p}", str(models.llava())), monkeypatch, capsys)
    assert got == code and re.match(f"error: .*{sentence}", err) and err.count("\n") == 1, err
    assert {path.name for path in tmp_path.iterdir()} == {"afile"}


def test_help_is_answered_without_torch(tmp_path: Path) -> None:
    code = (
        "import atexit, runpy, sys\natexit.register(lambda: print('torch' in sys.modules))\n"
        "sys.argv = ['import', '--help']\nrunpy.run_module('vlmlab.cli.import_model', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "vlmlab import path=<folder or hub id> to=outputs/<name>" in done.stdout, (
        done.stderr
    )
    assert done.stdout.endswith("False\n") and not list(tmp_path.iterdir())
