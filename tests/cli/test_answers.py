"""Help, configuration and mistakes are answered in one sentence, by a process that never imports torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

ASK = """
import contextlib, io, json, sys
import hydra
from hydra.core.global_hydra import GlobalHydra
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import guard, run_command
from vlmlab.cli.evaluate import evaluate_command
from vlmlab.cli.train import train_command

tasks = {"train": train_command, "evaluate": evaluate_command}
answers = {}
for line in json.loads(sys.argv[1]):
    verb, *arguments = line.split(" ")
    sys.argv = [verb, *arguments]
    GlobalHydra.instance().clear()
    main = hydra.main(config_path=str(conf_folder()), config_name=verb, version_base="1.3")(guard(tasks[verb]))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(main, conf_folder(), verb)
        except SystemExit as end:
            code = end.code
    answers[line] = (code, out.getvalue(), err.getvalue())
heavy = [m for m in ("torch", "transformers", "lightning", "matplotlib") if m in sys.modules]
sys.stdout.write(json.dumps({"answers": answers, "heavy": heavy}))
"""

MISTAKES = {
    "train connector=mpl": r"error: connector has no choice 'mpl' \(did you mean mlp\?\): choose one of .*mlp.*qformer",
    "train hydra/launcher=pol": r"error: hydra/launcher has no choice 'pol' .*pool",
    "train conector=mlp": r"error: no key 'conector' .*did you mean connector\?",
    "train trainer.device=2": r"error: no key 'trainer.device' .*did you mean trainer.devices\?",
    "train connector=qformer connector.querys=4": r"error: no key .*did you mean connector.queries\?",
    "train connector=mlp,qformer": r"error: Ambiguous value .*connector=mlp,qformer.* add -m to sweep",
    "train +seed=2": r"error: .*already at 'seed'",
    "train trainer.devices=[1": r"error: the override 'trainer.devices=\[1' cannot be read",
    "train data=vqa": r"error: data.path is needed; write data.path=",
    "train data=vqa data.path=/no/such/file": r"error: data\.[a-z.]*path=/no/such/file does not exist",
    "train seed=-1": r"error: seed=-1 is not possible",
    "train precision=fp16 trainer.accelerator=cpu": r"error: precision=fp16 needs a GPU",
    "train recipe.stages.coarse_align.steps=-5": r"error: recipe.stages.coarse_align.steps=-5 is not possible",
    "train -m mask=bidir,cousal": r"error: mask has no choice 'cousal' \(did you mean causal\?\)",
    "evaluate": r"error: which run\? write run=<folder>",
    "evaluate run=nowhere": r"error: run=nowhere is not a run folder",
    "evaluate runn=x": r"error: no key 'runn' .*did you mean run\?",
}
HELP = ["train --help", "train --cfg job", "train --cfg job -p connector", "evaluate --help", "train --hydra-help"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("asked")
    lines = [*HELP, *MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(lines)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    return {**json.loads(done.stdout), "folder": folder}


def test_torch_is_not_imported(asked: dict[str, Any]) -> None:
    assert asked["heavy"] == []


def test_help_names_the_groups_and_the_commands(asked: dict[str, Any]) -> None:
    code, out, err = asked["answers"]["train --help"]
    assert (code, err) == (0, "")
    for word in ("python train.py -m", "evaluate.py run="):
        assert word in out
    shown = {group: choices.split(", ") for group, choices in re.findall(r"^ *([\w/]+): (.*)$", out, re.MULTILINE)}
    for group in ("encoder", "connector", "lm", "mask", "fusion", "adapter", "objective", "recipe", "preset"):
        assert shown[group] == sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    assert max(len(line) for line in out.splitlines() if line.split(":")[0].strip() not in shown) <= 120


def test_the_configuration_is_shown(asked: dict[str, Any]) -> None:
    code, out, _ = asked["answers"]["train --cfg job"]
    assert code == 0 and "coarse_align" in out and "hydra" not in out
    assert "vlmlab.connector.mlp" in asked["answers"]["train --cfg job -p connector"][1]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(asked: dict[str, Any], line: str) -> None:
    code, out, err = asked["answers"][line]
    assert (code, out) == (2, "")
    assert re.fullmatch(MISTAKES[line] + r".*\n", err), err


def test_a_refused_run_leaves_nothing_behind(asked: dict[str, Any]) -> None:
    assert [path.name for path in asked["folder"].rglob("*") if path.name not in ("outputs", "sweeps")] == [] or [
        str(path) for path in asked["folder"].rglob("*")
    ]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_the_scripts_answer(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "evaluate.py run=" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_console_command_runs_the_verbs(tmp_path: Path) -> None:
    def vlmlab(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vlmlab.cli", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={**os.environ})

    assert vlmlab("train", "mask=x").stderr.startswith("error: mask has no choice 'x'")
    sweep = vlmlab("sweep", "mask=x,bidir")
    assert sweep.returncode == 2 and "mask has no choice 'x'" in sweep.stderr
    wrong = vlmlab("trian")
    said = (
        "error: vlmlab has no verb 'trian' (did you mean train?); choose one of train, sweep, evaluate, inspect, plan"
    )
    rest = "cost, compare, generate, chat, demo, score, export, import, curate, wandb"
    assert (wrong.returncode, wrong.stderr) == (2, f"{said}, {rest}\n")


@pytest.mark.parametrize(
    ("words", "code", "start"),
    [
        ([], 0, "usage: vlmlab <verb> [group=choice]"),
        (["--help"], 0, "usage: vlmlab <verb> [group=choice]"),
        (
            ["xyz"],
            2,
            "error: vlmlab has no verb 'xyz'; choose one of train, sweep, evaluate, inspect, plan, cost, compare, gen",
        ),
        (
            ["mask=causal", "seed=1"],
            2,
            "error: vlmlab wants a verb before 'mask=causal'; write vlmlab train mask=causal",
        ),
        (["-m", "seed=0,1"], 2, "error: vlmlab wants a verb before '-m'; write vlmlab sweep seed=0,1"),
        (["--cfg", "job"], 2, "error: vlmlab wants a verb before '--cfg'; write vlmlab train --cfg job"),
    ],
)
def test_without_a_verb_the_console_command_says_how(
    words: list[str], code: int, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmlab.cli.main import main

    assert main(words) == code
    said = capsys.readouterr()
    assert (said.out + said.err).startswith(start) and "" in (said.out, said.err)


def test_a_mistake_inside_instantiate_is_still_one_sentence():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from vlmlab.cli.entry import guard
    from vlmlab.contracts.errors import user_error_in

    bad = OmegaConf.create(
        {"_target_": "vlmlab.data.world.sources.WorldCaptions", "style": "odd", "split": "train", "size": 1}
    )
    with pytest.raises(SystemExit) as ended:
        guard(instantiate)(bad)
    assert ended.value.code == 1
    assert user_error_in(ended.value) is not None and "no caption style" in str(user_error_in(ended.value))
    assert user_error_in(ValueError("other")) is None
