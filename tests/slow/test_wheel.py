"""The wheel: built from the tree, installed where nothing else of it is, used from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

from tests.slow.runs import ROOT

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A command without the tree on its path; its output is in the failure message."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=environment | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
        text=True, capture_output=True, timeout=timeout, check=False,
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-6000:])
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as ``pip install .`` builds it: pip fetches the build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    done = call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("vlmlab-*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment with the wheel in it. It sees the libraries of this one, by a .pth: downloading
    torch once more would take minutes. pip still resolves and checks them, since it looks for them on the path too."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--no-index")
    # by force, and without its libraries: the one seen by the .pth may be of the same version
    done = call(*pip, "--no-deps", "--force-reinstall", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    done = call(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    where = call(python, "-c", "import vlmlab, hydra_plugins as h; print(*vlmlab.__path__, *h.__path__)", cwd=folder)
    assert where.stdout.split() == [str(site / "vlmlab"), str(site / "hydra_plugins")]
    return folder / "bin"


def test_everything_a_run_needs_is_inside(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    conf = {f"vlmlab/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert conf == {name for name in inside if name.startswith("vlmlab/conf/")}
    package = {p for folder in ("vlmlab", "hydra_plugins") for p in (ROOT / "src" / folder).rglob("*") if p.is_file()}
    files = {path.relative_to(ROOT / "src").as_posix() for path in package if "__pycache__" not in path.parts}
    assert inside == conf | files
    assert {f"vlmlab/embedded/{tower}/model.safetensors" for tower in ("lm", "text", "vision")} < inside
    assert "hydra_plugins/vlmlab_pool_launcher/launcher.py" in inside
    assert wheel.stat().st_size < 20e6


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "usage: vlmlab <verb>"),
        (["--help"], 0, "usage: vlmlab <verb>"),
        (["trian"], 2, "error: vlmlab has no verb 'trian' (did you mean train?)"),
        (["train", "--help"], 0, "preset: "),
        (["train", "connector=mpl"], 2, "error: connector has no choice 'mpl' (did you mean mlp?)"),
        (["sweep", "seed=x,-1"], 2, "error: seed=x is not possible; give a whole number"),
    ],
)
def test_the_command_answers(words: list[str], code: int, said: str, bin_folder: Path, tmp_path: Path) -> None:
    begin = time.perf_counter()
    done = call(bin_folder / "vlmlab", *words, cwd=tmp_path)
    print(f"{time.perf_counter() - begin:.2f} s")
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_train_and_score_again_from_an_empty_folder(bin_folder: Path, tmp_path: Path) -> None:
    done = call(bin_folder / "vlmlab", "train", "budget=test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["world_test/vqa_accuracy/count"] > 0 and (run / "report.html").is_file()
    again = call(bin_folder / "vlmlab", "evaluate", f"run={run.relative_to(tmp_path)}", cwd=tmp_path)
    assert again.returncode == 0 and "numbers equal those of result.json" in again.stdout, again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_two_ranks_are_started_by_the_same_verb(bin_folder: Path, tmp_path: Path) -> None:
    """Lightning starts the second rank by executing the command line again; without its verb that rank would fail."""
    line = ("budget=test", "name=two", "recipe=joint", "trainer.devices=2", "trainer.accelerator=cpu")
    done = call(bin_folder / "vlmlab", "train", *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "two" / "state.json").read_text())["state"] == "done"
    assert done.stdout.count("run folder: ") == 1  # rank 0 alone writes and speaks
