"""``vlmlab export`` as typed: a run that was trained by the real command, read again as others would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from asking import ask
from tests import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

import vlmlab

RUN = (
    "recipe=joint budget.max_steps=1 budget.eval_limit=2 recipe.stages.joint.batch_size=4 adapter=lora "
    "trainer.accelerator=cpu trainer.progress=false evaluation.baselines=[] evaluation.held_out=[] "
    "~data.benchmarks.world_captions ~data.benchmarks.world_compositional"
)


def test_a_run_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, out = tmp_path / "run", tmp_path / "out"
    code, _, err, _ = ask(f"train {RUN} hydra.run.dir={run}")
    assert code == 0, err
    code, said, err, _ = ask(f"export run={run} to={out} form=parts")
    assert (code, err) == (0, "")
    assert [line.split() for line in said.splitlines()] == [
        ["lm", str(out / "lm")],
        ["encoder", str(out / "encoder")],
        ["connector", str(out / "connector.safetensors")],
    ]
    for kind, part in ((AutoModelForCausalLM, "lm"), (SiglipVisionModel, "encoder")):
        _, info = kind.from_pretrained(out / part, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out / "lm").chat_template
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    weights = [*run.rglob("*.safetensors"), *out.rglob("*.safetensors")]
    assert len(weights) == 4
    for path in weights:  # others of the lab read them where they may read the folder
        assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ask(f"export run={run} to={out}")[::2] == (
        2,
        f"error: to={out} has files in it; give a new or empty folder\n",
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    _whole(run, tmp_path)


def _whole(run: Path, place: Path) -> None:
    """As one model of transformers, which is what is written unless something else is said; and as a run."""
    pixels = tiny.picture(1)
    want = vlmlab.load(run, device="cpu").generate(pixels, "how many", max_new_tokens=4)
    code, said, err, _ = ask(f"export run={run} to={place / 'hf'}")
    assert (code, err) == (0, "") and [line.split()[0] for line in said.splitlines()] == ["hf", "card"]
    assert isinstance(AutoModelForImageTextToText.from_pretrained(place / "hf"), LlavaForConditionalGeneration)
    card = (place / "hf" / "README.md").read_text()
    assert re.search(r"\| world_test \| vqa_accuracy \| \d\.\d+ \| \d\.\d+ to \d\.\d+ \|", card)
    assert "license: apache-2.0" in card and "`generate` alone would leave that out" in card
    code, said, err, _ = ask(f"export run={run} to={place / 'own'} form=run")
    assert (code, err) == (0, "") and "vlmlab.load" in (place / "own" / "README.md").read_text()
    moved = (place / "own").rename(place / "elsewhere")
    assert not list(moved.rglob("last.ckpt")) and str(run) not in (moved / "env.json").read_text()
    assert vlmlab.load(moved, device="cpu").generate(pixels, "how many", max_new_tokens=4) == want


def test_help_is_answered_without_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['export', '--help']\nrunpy.run_module('vlmlab.cli.export', run_name='__main__')"
    )
    code = f"import atexit\natexit.register(lambda: print('torch' in __import__('sys').modules))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "vlmlab export run=outputs/<name> to=<folder>" in done.stdout, done.stderr
    assert done.stdout.endswith("False\n") and not list(tmp_path.iterdir())
