"""Every configuration file that ships is found by globbing and composes."""

from __future__ import annotations

import copy
import itertools
from functools import lru_cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.rules import check, choices_of
from vlmlab.cli.rules.values import wrong_values
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.runs.config import config_hash, plain

CONF = Path(__file__).resolve().parents[1] / "conf"
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("hydra",))
MANDATORY = {"path": "x", "images": "y", "annotations": "z", "size": 1, "parts": {"x": 1}}
ADDED = ("memory_mask", "experiment", "text_tower", "pair_head", "benchmark")
"""Groups that no run has unless they are added: another choice's file takes one into its keys
(``/memory_mask@sees: before``), or the command line does (``+experiment=...``)."""


def composed(*overrides: str, whole: bool = False) -> DictConfig:
    """The configuration of a command, of one's own; `whole`: with Hydra's. The same words are composed once."""
    return copy.deepcopy(_composed(overrides, whole))


@lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...], whole: bool) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=whole)


def test_the_groups_are_those_of_the_design() -> None:
    groups = {group for group, _ in CHOICES}
    assert {"encoder", "connector", "lm", "mask", "fusion", "adapter", "objective", "data", "recipe"} <= groups
    assert len(CHOICES) >= 35


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_is_commented(group: str, choice: str) -> None:
    cfg = composed(f"{'+' if group in ADDED else ''}{group}={choice}")
    elsewhere = {"preset": "recipe", "experiment": "recipe", "sweep": "recipe"}
    elsewhere["benchmark"] = f"data.benchmarks.{choice}.source"
    at = elsewhere.get(group, group)  # these set other groups
    node = OmegaConf.select(cfg, at)
    assert node is not None
    for (key, value), within in itertools.product(MANDATORY.items(), ("", ".source", ".source.source")):
        place = OmegaConf.select(cfg, at + within)
        if OmegaConf.is_config(place) and OmegaConf.is_missing(place, key):
            OmegaConf.update(cfg, f"{at}{within}.{key}", value)
    resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert resolved or choice in ("none",)


@pytest.mark.parametrize("file", sorted(CONF.glob("cell/*/*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_cell_is_swept_over_and_commented(file: Path) -> None:
    """Cells that no single key names; the experiment of the folder's name sweeps over all of them."""
    swept = OmegaConf.load(CONF / "experiment" / f"{file.parent.name}.yaml").hydra.sweeper.params
    assert file.stem in swept[f"+cell/{file.parent.name}"].split(",")
    assert file.read_text().splitlines()[1].startswith("# ")


@pytest.mark.parametrize("experiment", [choice for group, choice in CHOICES if group == "experiment"])
def test_every_cell_of_an_experiment_can_be_trained(experiment: str) -> None:
    """It composes, breaks no rule, has no key that nothing reads, and is not another cell again."""
    params = dict(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").hydra.sweeper.params)
    del params["seed"]
    seen: dict[str, tuple[str, ...]] = {}
    for values in itertools.product(*(str(value).split(",") for value in params.values())):
        words = [f"{key}={value}" for key, value in zip(params, values, strict=True)]
        cfg = composed(f"+experiment={experiment}", *words, whole=True)
        choices = choices_of(cfg.hydra)
        OmegaConf.set_struct(cfg, False)
        del cfg.hydra
        config = plain(cfg)
        assert not list(wrong_values(cfg, config, choices, None)), values
        check(cfg, config, choices)
        address = config_hash(config)
        assert address not in seen, (values, seen[address])
        seen[address] = values


@pytest.mark.parametrize("group", ["fusion", "adapter", "cache", "logger", "callbacks", "debug", "preset"])
def test_every_group_that_can_be_off_has_none(group: str) -> None:
    assert (group, "none") in CHOICES
