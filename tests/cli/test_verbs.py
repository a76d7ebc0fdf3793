"""``vlmlab inspect``, ``plan`` and ``cost`` as typed: wrong words are one sentence, right ones print and write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from vlmlab.cli.cost import cost_command
from vlmlab.cli.inspect import inspect_command
from vlmlab.cli.plan import plan_command
from vlmlab.cli.verb import run_cells, run_verb

TASKS = {"inspect": inspect_command, "plan": plan_command, "cost": cost_command}


def call(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> tuple[int, str, str]:
    verb, *words = line.split(" ")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [verb, *words])
    GlobalHydra.instance().clear()
    try:
        code = run_cells(verb, words) if verb == "cost" and words[0] == "-m" else run_verb(verb, TASKS[verb])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("inspect stage=tune", "stage=tune is not a stage of this recipe; choose one of coarse_align,"),
        ("inspect n=0", "n=0 is not possible; give a whole number of at least 1"),
        ("inspect check=all", "check=all is not possible"),
        ("inspect -m n=1,2", "-m is for several trainings and this command looks at one"),
        ("plan --multirun seed=1,2", "-m is for several trainings and this command looks at one"),
        ("inspect n=1 n=2", "n is given twice, as 1 and as 2"),
        ("inspect ~n", "n is not in the configuration and a run needs it"),
        ("inspect out=.", "out=. is a folder"),
        ("inspect --cfg job -p nothing", "--package 'nothing' not found"),
        ("inspect hydra.run.dir=x", "hydra.run.dir=x would have no effect"),
        ("plan --package seed", "add --cfg job"),
        ("plan device=[1]", "device=[1] is not possible; give a text"),
        ("plan out=no/plan.json", "out=no/plan.json: there is no folder no"),
        ("inspect data=vqa", "data.path is needed"),
        ("inspect connector=mpl", "connector has no choice 'mpl' (did you mean mlp?)"),
        ("inspect out=no/page.html check=1 n=1", "out=no/page.html: there is no folder no"),
        ("plan device=v100", "device=v100 is unknown; choose one of a100,"),
        ("plan mfu=2", "mfu=2 is not possible; give a number above 0 and of at most 1"),
        ("plan memory=0", "memory=0 is not possible"),
        ("plan sample=0", "sample=0 is not possible"),
        ("plan lengths={tune:[1,2]}", "lengths.tune is not a stage of this recipe; choose from coarse_align,"),
        ("plan lengths={coarse_align:[1]}", "lengths.coarse_align=[1] is not a pair; give tokens before the answer"),
        ("plan samples.coarse_align=-3", "samples.coarse_align=-3 is not possible"),
        ("plan lengths=3", "lengths=3 is not possible; give a mapping"),
        ("plan lengths={coarse_align:[1,x]}", 'lengths.coarse_align=[1,"x"] is not possible; give a list'),
        ("plan mask=visual_rows_open", "mask=visual_rows_open leaks"),
        ("cost images=-1", "images=-1 is not possible; give a whole number from 0 to 1024"),
        ("cost answer=0", "answer=0 is not possible"),
        ("cost out=no/c.json", "out=no/c.json: there is no folder no"),
        ("cost -m images=0,-1", "images=-1 is not possible"),
        ("cost -m fusion=concat,lavy", "did you mean lavi?"),
        ("cost -m images=1 images=2", "images is given twice"),
        ("cost -m out=a.json,b.json", "out has several values and no cost depends on it"),
        ("cost -m images=1,40000 tokens=1", "images=40000 is not possible"),
    ],
)
def test_mistakes(
    line: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = call(line, monkeypatch, capsys, tmp_path)
    assert code in (1, 2) and err.startswith("error: ") and sentence in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["inspect", "plan", "cost"])
def test_options_work_as_for_training(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before and after the keys; with the verb's own keys, and files of one's own."""
    own, value = {"inspect": ("check", "30"), "plan": ("mfu", "0.3"), "cost": ("answer", "7")}[verb]
    (tmp_path / "mine" / "connector").mkdir(parents=True)
    (tmp_path / "mine" / "connector" / "wide.yaml").write_text(
        "_target_: vlmlab.connector.mlp.MlpConnector\nhidden: 77\n"
    )
    for line, said in (
        (f"--cfg job {own}={value} seed=7", (f"{own}: {value}\n", "seed: 7\n")),
        (f"{own}={value} connector=wide --config-dir mine --cfg job", (f"{own}: {value}\n", "hidden: 77\n")),
        ("--cfg=job", (f"{own}: ", "seed: 0\n")),
        ("-cd mine connector=wide -c job --package connector --resolve", ("hidden: 77\n",)),
        ("--help -cd mine", (f"vlmlab {verb} ", "wide")),
    ):
        code, out, err = call(f"{verb} {line}", monkeypatch, capsys, tmp_path)
        assert (code, err) == (0, "") and all(words in out for words in said), line
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_inspect_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = call("inspect stage=coarse_align n=2 check=3 out=p.html", monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, "") and out.endswith("\np.html\n") and "nothing is wrong with them" in out
    assert (tmp_path / "p.html").read_text().count("data:image/png;base64,") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


def test_inspect_writes_the_page_of_data_that_training_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"question_id": n, "image": f"{n}.png", "question": "q", "answer": "a"} for n in range(9)]
    for content in (json.dumps(rows), "{"):
        (tmp_path / "a.json").write_text(content)
        code, _, err = call(
            "inspect recipe=joint data=vqa data.path=a.json n=1 out=p.html", monkeypatch, capsys, tmp_path
        )
        assert code == 1 and err.startswith("error: ") and "a.json" in err and len(err.splitlines()) == 1
        assert "a.json" in (tmp_path / "p.html").read_text() and len(err) <= 310
        (tmp_path / "p.html").unlink()


def test_plan_prints_tables_and_writes_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = "plan recipe=joint device=h100 trainer.devices=2 sample=2 mfu=0.5 samples.joint=320 out=p.json"
    code, out, err = call(line, monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, ""), err
    assert out.startswith("2 x NVIDIA H100 SXM 80GB (84.9 GB, 989.4 TFLOP/s in 16 bit) at 50% utilisation: ")
    (stage,) = json.loads((tmp_path / "p.json").read_text())["stages"]
    assert stage["samples"] == 320 and stage["fits"] > 0 and max(map(len, out.splitlines())) <= 120


def test_cost_of_one_composition(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = call("cost images=2 tokens=10 answer=5 out=c.json", monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, ""), err
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["prompt"] == 2 * found["visual_tokens"] + 10 and found["answering"] > found["first"] > 0
    assert out.split("\n")[3].split()[:2] == ["2", "10"] and max(map(len, out.splitlines())) <= 120


def test_cost_of_several_sets_each_against_the_first_of_its_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = "cost -m fusion=concat,lavi images=1,3 tokens=10 out=c.json"
    code, out, err = call(line, monkeypatch, capsys, tmp_path)
    assert (code, err) == (0, ""), err
    found = json.loads((tmp_path / "c.json").read_text())
    assert [(one["overrides"]["fusion"], one["images"]) for one in found] == [
        ("concat", 1), ("concat", 3), ("lavi", 1), ("lavi", 3)
    ]  # fmt: skip
    rows = [row.split() for row in out.split("of concat")[-1].splitlines()[2:6]]
    wanted = [f"{one['first'] / found[k % 2]['first']:.3f}" for k, one in enumerate(found)]
    assert [row[2] for row in rows] == wanted and wanted[:2] == ["1.000", "1.000"]
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_plan_says_that_generated_scenes_are_no_measure_of_real_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = "lm.architecture.num_hidden_layers=1 lm.architecture.vocab_size=2000 sample=2"
    _, out, _ = call(f"plan recipe=joint lm=qwen2_0_5b {small}", monkeypatch, capsys, tmp_path)
    assert "those of generated scenes" in out and "in tokens of the embedded LM" in out
    assert max(map(len, out.splitlines())) <= 120
    stated = f"plan recipe=joint lm=qwen2_0_5b {small} lengths={{joint:[20,30]}}"
    for line in ("plan recipe=joint sample=2", stated):
        code, out, _ = call(line, monkeypatch, capsys, tmp_path)
        assert code == 0 and "generated" not in out and "embedded" not in out


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_help_and_configuration_are_answered_without_torch(verb: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv = ['{verb}', *sys.argv[1:]]\n"
        f"from vlmlab.cli.{verb} import {verb}_command\nfrom vlmlab.cli.verb import run_verb\n"
        f"code = run_verb('{verb}', {verb}_command)\n"
        "sys.exit(code or int('torch' in sys.modules))"
    )
    for word, said in (("--help", f"vlmlab {verb} "), ("--cfg=job", "seed: 0")):
        command = [sys.executable, "-c", code, word]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
        assert done.returncode == 0 and said in done.stdout, done.stderr
