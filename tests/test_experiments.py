"""Pages of recorded experiments say what their records say."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.test_conf import composed
from vlmlab.analyse.combination import combinations
from vlmlab.analyse.compare import compare
from vlmlab.analyse.results import read_record
from vlmlab.runs.cells_csv import CellsCsv, data_hash, overrides_of, read_cells
from vlmlab.runs.config import config_hash, plain
from vlmlab.runs.folder import RunFolder

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import answer  # noqa: E402  # scripts beside the package
import claims  # noqa: E402
import sweeps  # noqa: E402

CONF = EXPERIMENTS.parent / "conf"
BEGIN, END = "<!-- from cells.csv -->", "<!-- /from cells.csv -->"
RECORDED = sorted(EXPERIMENTS.glob("*/cells.csv"))
NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
COMMAND = re.compile(r"^    python experiments/((?:answer|claims)\.py.*)$", re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_a_page(name: str) -> None:
    """With its command, what makes its table, and, where nothing was trained yet, the word that it was not."""
    readme = (EXPERIMENTS / name / "README.md").read_text()
    assert f"    python train.py -m +experiment={name}\n" in readme and "**Question.**" in readme
    command = COMMAND.search(readme)
    assert command is not None and shlex.split(command[1])[:2] in (["answer.py", name], ["claims.py"])
    assert readme.count(BEGIN) == readme.count(END) == 1
    recorded = (EXPERIMENTS / name / "cells.csv").is_file()
    assert recorded != ("**Not run yet**" in readme)
    if not recorded:
        assert not readme.partition(BEGIN)[2].partition(END)[0].strip()


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_a_sweep_of_different_cells(name: str) -> None:
    """Named as its file, recorded beside its page; the baseline of its page is one of its rows."""
    choice = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    assert choice.name == name and choice.hydra.launcher.record == f"experiments/{name}/cells.csv"
    params = {str(key): str(value) for key, value in choice.hydra.sweeper.params.items()}
    assert re.fullmatch(r"range\([58]\)", params.pop("seed"))
    values = [value.split(",") for value in params.values()]
    assert all(len(set(each)) == len(each) > 1 for each in values)
    for key, each in zip(params, values, strict=True):
        group = CONF / key.lstrip("+")
        assert not group.is_dir() or all((group / f"{value}.yaml").is_file() for value in each)
    baseline = re.search(r"--baseline (\S+)", (EXPERIMENTS / name / "README.md").read_text())
    assert baseline is None or all(word in each for word, each in zip(baseline[1].split(","), values, strict=True))


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record.parent.name)
def test_a_page_is_what_its_record_gives(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (record.parent / "README.md").read_text()
    command = COMMAND.search(readme)
    assert command is not None, "the page does not say how it is made"
    monkeypatch.setattr(sys, "argv", [*shlex.split(command[1]), "--check"])
    assert (claims if command[1].startswith("claims") else answer).main() == 0


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record.parent.name)
def test_a_recorded_cell_is_what_its_command_would_train_now(record: Path) -> None:
    """Or all of them would be trained again; a new key belongs into ``runs.config.BEFORE``."""
    rows = read_cells(record)
    for row in {row["cell"]: row for row in (rows[0], rows[-1])}.values():
        config = plain(composed(*overrides_of(row)))
        assert (config_hash(config), data_hash(config)) == (row["config"], row["data"]), row["cell"]


def test_every_claim_is_about_cells_that_experiments_train() -> None:
    entries = claims.read_claims(EXPERIMENTS / "claims" / "claims.yaml")
    assert len(entries) == len({entry.id for entry in entries}) >= 15
    own = set()
    for entry in entries:
        assert entry.expect in ("higher", "same") and entry.cells[0] != entry.cells[1]
        for experiment, row in entry.cells:
            params = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
            (values,) = (str(value).split(",") for key, value in params.items() if key != "seed")
            assert row in values, entry.id
            own |= {row} if experiment == claims.OWN else set()
        for metric in entry.metrics:
            assert metric.split("/")[0] in ("world_test", "world_shifted"), entry.id
    trained = OmegaConf.load(CONF / "experiment" / "claims.yaml").hydra.sweeper.params["+cell/claims"].split(",")
    assert own == set(trained), "cells that no claim needs"


@pytest.mark.parametrize(
    ("expect", "scores", "floor", "verdict"),
    [
        ("higher", ([0.50, 0.52, 0.51], [0.40, 0.41, 0.42]), 0.3, "seen"),
        ("higher", ([0.40, 0.41, 0.42], [0.50, 0.52, 0.51]), 0.3, "not seen: the opposite"),
        ("higher", ([0.50, 0.40, 0.51], [0.45, 0.46, 0.47]), 0.3, "not seen"),
        ("same", ([0.50, 0.51, 0.52], [0.501, 0.512, 0.521]), 0.3, "seen"),
        ("same", ([0.50, 0.40, 0.51], [0.45, 0.46, 0.47]), 0.3, "not seen"),
        ("higher", ([0.50, 0.52, 0.51], [0.40, 0.41, 0.42]), 0.6, "not decidable here (neither is above its floor)"),
        ("higher", ([0.50, 0.52], [0.40, 0.41]), 0.3, "not decidable here (2 common seeds)"),
        ("higher", ([0.50, 0.52, 0.51], []), 0.3, "not decidable here (not trained yet)"),
    ],
)
def test_a_claim_is_seen_or_not_or_not_decidable(
    tmp_path: Path, expect: str, scores: tuple[list[float], list[float]], floor: float, verdict: str
) -> None:
    for name, values in zip(("a", "b"), scores, strict=True):
        for seed, score in enumerate(values):
            with RunFolder(tmp_path / "cells" / f"{name}-{seed}") as run:
                run.open({"cell": name, "seed": seed}, [f"+cell/claims={name}", f"seed={seed}"])
                normalised = (score - floor) / (1 - floor)
                run.finish({answer.METRIC: score, "world_test/normalised": normalised}, {"seconds": 1.0})
    with RunFolder(tmp_path / "cells" / "c-0") as run:  # a second row, so that the key is swept
        run.open({"cell": "c", "seed": 0}, ["+cell/claims=c", "seed=0"])
        run.finish({answer.METRIC: 0.3}, {})
    CellsCsv(tmp_path / "claims" / "cells.csv").add(sorted((tmp_path / "cells").iterdir()))
    metrics = (answer.METRIC, answer.METRIC)
    claim = claims.Claim("x", "arXiv", "a over b", expect, (("claims", "a"), ("claims", "b")), metrics)
    text = "\n".join(claims.page([claim], tmp_path))
    assert f"| {verdict} |" in text and "| arXiv | a over b | a | b |" in text


LOSSES = ((2.0, 2.0), (1.0, 1.5), (0.8, 2.0))


def test_a_page_has_what_cells_saw_while_they_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x"
    for mask, late in (("bidir", 0), ("causal", 1)):
        for seed in range(3):
            with RunFolder(tmp_path / f"mask-{mask}_seed-{seed}") as run:
                run.open({"mask": mask, "seed": seed}, [f"mask={mask}", f"seed={seed}"])
                for step, (loss, shuffled) in enumerate(LOSSES):
                    looked = {"held_out/loss": loss + late, "held_out/shuffled_loss": shuffled + 0.25 * late}
                    run.log({"stage": "one", "step": 10 * step, **looked})
                run.finish({answer.METRIC: 0.5 + 0.1 * seed}, {"seconds": 36.0})
    CellsCsv(folder / "cells.csv").add(sorted(tmp_path.glob("mask-*")))
    (folder / "README.md").write_text(f"# x\n\n{BEGIN}\n\n{END}\n")
    monkeypatch.setattr(answer, "HERE", tmp_path)
    words = ["answer.py", "x", "--baseline", "bidir", "--look", "one:last:held_out/loss", "--until", "held_out/gap>0.4"]
    monkeypatch.setattr(sys, "argv", words)
    assert answer.main() == 0
    text = (folder / "README.md").read_text()
    assert "| mask | held_out/loss, end of one |" in text and "| causal | 1.800 ± 0.000 |" in text
    assert "| bidir | 3 of 3 | 10 | - | - |" in text and "| causal | 3 of 3 | 20 | 0.1 | 0.1 |" in text
    assert "](curves.png)" in text and (folder / "curves.png").is_file() and (folder / "figure.png").is_file()
    monkeypatch.setattr(sys, "argv", [*words, "--check"])
    assert answer.main() == 0


def test_a_page_without_a_record_says_what_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answer, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["answer.py", "x", "--baseline", "bidir"])
    assert answer.main() == 1
    assert "x/cells.csv has no cell yet; train: python train.py -m +experiment=x" in capsys.readouterr().out


def test_a_page_has_every_composition_and_comparison(tmp_path: Path) -> None:
    for mask, score in (("bidir", 0.5), ("causal", 0.4)):
        for seed in range(3):
            with RunFolder(tmp_path / f"mask-{mask}_seed-{seed}") as run:
                run.open({"mask": mask, "seed": seed}, [f"mask={mask}", f"seed={seed}", "+experiment=x"])
                metrics = {answer.METRIC: score + 0.01 * seed, answer.METRIC + "/lookup": 0.3}
                run.finish(metrics, {"seconds": 3600.0, "visual_tokens": 36})
    CellsCsv(tmp_path / "cells.csv").add(sorted(tmp_path.glob("mask-*")))
    rows = combinations(read_record(tmp_path / "cells.csv"))
    compared = compare(rows, rows[0], answer.METRIC, single_answers=False)
    text = "\n".join(answer.page(rows, rows[0], compared, answer.METRIC))
    assert "| bidir | 3 | 0.510 ± 0.025 | - | 0.300 ± 0.000 |" in text
    assert "| causal | 3 | -0.100 |" in text and "not distinguishable" in text
    assert "With 3 seeds and 1 comparison nothing can be significant" in text and "6 cells, 6.00 hours" in text
    page = sweeps.with_page(f"before\n{BEGIN}\nold\n{END}\nafter\n", ["new"], "cells.csv")
    assert page == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
