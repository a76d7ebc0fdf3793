"""The pages of the documentation say what is so: commands compose, files shown in full work, links and tables hold."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from tests import pages, tiny
from tests.test_conf import CHOICES, CONF
from vlmlab.cli.main import VERBS
from vlmlab.cli.rules import check, choices_of
from vlmlab.cli.rules.values import wrong_values
from vlmlab.contracts.parts import Mask
from vlmlab.mask.leak import check_mask
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.runs.config import plain

COMPOSING = ("train", "sweep", "inspect", "plan", "cost")
"""Verbs that compose a training's configuration; what the others take are keys of a file of their own."""
TUTORIALS = {
    stem: pages.ROOT / "docs" / "tutorials" / f"{stem}.md" for stem in ("connector", "mask", "objective", "fusion")
}
NAMED = {word: None for page in TUTORIALS.values() for word in pages.commands(page)}
LEFT = [line for line in pages.commands(*pages.PAGES) if line not in pages.trained() and "--help" not in line]


def first_values(words: list[str]) -> list[str]:
    """A sweep's first cell: of values separated by commas the first."""
    return [re.sub(r"^([^=]+=)([^\[{('\",]+),.*$", r"\1\2", word) for word in words]


def said(line: str, *more: str) -> DictConfig:
    """The configuration that a command trains, checked by the rules as the command itself would."""
    words = [word for word in shlex.split(line) if word not in ("-m", "vlmlab", "python", "--cfg", "job")]
    verb, words = words[0].removesuffix(".py"), [word for word in words[1:] if "=" in word or word.startswith("~")]
    own = [] if verb in ("train", "sweep") else list(OmegaConf.load(CONF / f"{verb}.yaml"))
    kept = [word for word in first_values(words) if word.split("=")[0].split(".")[0] not in own]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*kept, *more], return_hydra_config=True)
    choices = choices_of(cfg.hydra)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    config = plain(cfg)
    assert not list(wrong_values(cfg, config, choices, None)), line
    check(cfg, config, choices)
    return cfg


@pytest.mark.parametrize("line", [line for line in LEFT if line not in NAMED])
def test_a_command_that_is_not_run_composes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tutorials' pages of an own project it has further files: `test_a_project_of_ones_own`."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text("[]")
    words = shlex.split(line)
    verb = words[1].removesuffix(".py")
    assert verb in VERBS
    if verb in COMPOSING:
        said(line)
    else:
        keys = {word.split("=")[0] for word in words if re.match(r"\w+=", word)}
        assert keys <= {*OmegaConf.load(CONF / f"{verb}.yaml")}, line


@pytest.mark.parametrize("stem", TUTORIALS)
def test_a_project_of_ones_own(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a tutorial's page, beside nothing, compose; and each does what its kind must."""
    pages.write(TUTORIALS[stem], tmp_path)
    if stem == "fusion":
        (python,) = re.findall(r"```python\n(.*?)```", (pages.ROOT / "docs" / "fusion.md").read_text(), re.DOTALL)
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "mean_shift.py").write_text(python)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        monkeypatch.delitem(sys.modules, name)
    own = [line for line in pages.commands(TUTORIALS[stem]) if "--config-dir conf" in line]
    assert own
    for line in own:
        cfg = said(line.replace("--config-dir conf", ""), f"hydra.searchpath=[file://{tmp_path / 'conf'}]")
    module = importlib.import_module(f"parts.{next((tmp_path / 'parts').glob('*.py')).stem}")
    assert module.__name__ in str(OmegaConf.to_container(cfg, resolve=True))
    {"mask": mask_is_sound, "objective": objective_counts}.get(stem, lambda module: None)(module)
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts"]:
        del sys.modules[name]


def mask_is_sound(module: ModuleType) -> None:
    """It does not leak, and hides another image alone."""
    mask: Mask = module.OwnImage()
    check_mask(mask, "mask")
    layout = tiny.collator(tiny.vlm())([tiny.TWO_IMAGES]).layout
    q = torch.arange(layout.kind.shape[1])
    hidden = torch.tril(torch.ones(len(q), len(q), dtype=torch.bool)) & ~mask(layout, q)[0]
    image = layout.image[0]
    rows, keys = hidden.nonzero(as_tuple=True)
    assert len(rows) and ((image[rows] >= 0) & (image[keys] >= 0) & (image[rows] != image[keys])).all()


def objective_counts(module: ModuleType) -> None:
    """Minus the entropy of every supervised token."""
    model = tiny.vlm()
    batch = tiny.collator(model)([tiny.ONE_TURN])
    outputs = model(batch)
    total, count = module.ConfidencePenalty()(outputs, batch)["confidence"]
    entropy = torch.distributions.Categorical(logits=outputs.logits.float()).entropy()
    assert torch.allclose(total, -entropy.sum()) and int(count) == len(outputs.targets)


def generator() -> ModuleType:
    """docs/generate.py, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("generate", pages.ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_choice_has_a_page_of_what_it_is() -> None:
    made = generator().generated()
    for group, choice in CHOICES:
        page = made[f"choices/{group}/{choice}.md"]
        assert f"{group}" in page and (CONF / group / f"{choice}.yaml").read_text().rstrip() in page
        names = (yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}).get("_target_")
        assert names is None or "## The class" in page
    assert "0.507" in made["choices/connector/mlp.md"] and "0.723" not in made["choices/connector/mlp.md"]
    assert "::: vlmlab.contracts.parts" in made["api/contracts.md"]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_readme_says_what_it_is_before_it_lists_choices() -> None:
    text = pages.PAGES[0].read_text(encoding="utf-8")
    assert len(text.partition("| group | choices |")[0].split()) <= 600
    page = (pages.ROOT / "experiments" / "connector_vs_mask" / "README.md").read_text(encoding="utf-8")
    table = text.partition("## An ablation")[2].partition("![")[0]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if re.search(r"\d ± ", line)]
    assert len(rows) == 4
    for row in rows:
        assert f"| {' | '.join(row[:5])} |" in page
        if len(row) > 6:
            first, difference = rf"{row[0]} \| {row[1]}", rf"{re.escape(row[6])} \| {row[7]}"
            assert re.search(rf"\| {first} \| 8 \| {difference} \| \S+ \| {row[8]} \|", page)


def test_the_table_of_choices_names_those_that_are_there() -> None:
    text = pages.PAGES[0].read_text(encoding="utf-8")
    for group, entry in re.findall(r"^\| (\w+) \| (.*) \|$", text, re.MULTILINE):
        if (CONF / group).is_dir() and group not in ("memory_mask", "text_tower"):
            names = {name for name in re.findall(r"`(\w+)`", entry)}
            assert names & {choice for where, choice in CHOICES if where == group}, group
