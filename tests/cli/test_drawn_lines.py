"""Drawn command lines: each is refused by one sentence that names a key of its own, or changes the run; none breaks."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import drawn
import pytest
from asking import ask_words
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.rules import admitted
from vlmlab.cli.rules.asking import value_at
from vlmlab.cli.rules.schema import Inspect, Plan
from vlmlab.cli.rules.values import wrong_values
from vlmlab.cli.train import admit
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.values import hints
from vlmlab.runs.config import plain

BASES = {
    "the default": (),
    "many groups": (
        *("recipe=joint", "connector=bliva", "adapter=lora", "fusion=gated_xattn", "logger=wandb", "cache=disk"),
        *("lm=llama3_2_1b", "encoder=clip_vit_b32"),
    ),
    "files": ("recipe=joint", "data=vqa", "data.path=v.json", "connector=qformer", "fusion=lavi"),
}
OWN = {"plan": Plan, "inspect": Inspect}
DRAWN = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
)
"""Without shrinking, since a composition costs a fifth of a second."""


def asked(words: tuple[str, ...], verb: str = "train") -> tuple[int, str, str, dict[str, Any] | None]:
    """Exit code, output, error, and the configuration where the words are accepted; nothing is trained."""
    found: list[dict[str, Any]] = []

    def task(cfg: DictConfig) -> None:
        found.append(admit(cfg)[0] if verb == "train" else admitted(cfg, HydraConfig.get(), OWN[verb]))

    code, out, err, _ = ask_words(verb, words, task)
    return code, out, err, found[0] if found else None


def is_refused(line: drawn.Line, code: int, err: str) -> None:
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 308, err
    above = [key.split(".")[-2] for key in line.keys if "." in key]  # {a: x} for a number is said of the number
    assert not line.keys or any(key in err for key in (*line.keys, *above)), err


def has_effect(line: drawn.Line, code: int, base: dict[str, Any], config: dict[str, Any] | None) -> None:
    """Something is said, or the run is another one, or a key is given the value that it has already."""
    same = [key for key in line.keys if config and value_at(base, key) == value_at(config, key)]
    assert code == 0 and (config != base or same), f"{line} is accepted without effect"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; Hydra reads a file once and composes once, where it would do both twice a line."""

    @functools.cache
    def read(name: str) -> Any:
        return OmegaConf.to_container(load(name))

    def quick(file: Any) -> Any:
        return OmegaConf.create(read(str(file.name if hasattr(file, "read") else file)))

    load = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", quick)
    monkeypatch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left(place: Path) -> list[str]:
    """What a command has left, and it is taken away: Hydra's folders of an accepted one, nothing of a refused one."""
    found = sorted((str(path.relative_to(place)) for path in place.rglob("*") if path.name != "v.json"), reverse=True)
    for name in found:
        (place / name).rmdir()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_hundred_drawn_lines(name: str, place: Path) -> None:
    (place / "v.json").write_text("[]")
    _, _, err, base = asked(BASES[name])
    assert base is not None and left(place), err

    @settings(DRAWN, max_examples=100)
    @given(drawn.lines(sorted(drawn.places(base))))
    def every_line(line: drawn.Line) -> None:
        code, out, err, config = asked((*BASES[name], *line.words))
        found = left(place)
        if config is None and out == "":
            is_refused(line, code, err)
            assert found == []
        else:
            has_effect(line, code, base, config)

    every_line()


@pytest.mark.slow
@pytest.mark.parametrize("verb", OWN)
def test_drawn_keys_of_other_commands(verb: str, place: Path) -> None:
    _, _, err, base = asked((), verb)
    assert base is not None, err

    @settings(DRAWN, max_examples=25)
    @given(drawn.lines(sorted(hints(OWN[verb]))))
    def every_line(line: drawn.Line) -> None:
        code, out, err, config = asked(line.words, verb)
        assert left(place) == []
        if config is None and out == "":
            is_refused(line, code, err)
        else:
            has_effect(line, code, base, config)

    every_line()


@pytest.fixture(scope="module")
def composed() -> tuple[DictConfig, dict[str, Any]]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", ["recipe=joint"])
    OmegaConf.set_struct(cfg, False)
    return cfg, plain(cfg)


def test_drawn_values(composed: tuple[DictConfig, dict[str, Any]]) -> None:
    """The part of it that needs no composition, for the fast suite."""
    cfg, base = composed
    found = drawn.places(base)

    @settings(DRAWN, max_examples=40)
    @given(st.sampled_from(sorted(found)), drawn.VALUES)
    def every_value(key: str, text: str) -> None:
        try:
            value = OverridesParser.create().parse_override(f"{key}={text}").value()
        except HydraException:  # no word for Hydra
            return
        changed = copy.deepcopy(cfg)
        try:
            OmegaConf.update(changed, key, value, merge=True, force_add=True)
            config = plain(changed)
            said = next(wrong_values(changed, config, {"_overrides": [f"{key}={text}"]}), None)
        except (UserError, OmegaConfBaseException) as error:
            said, config = str(error), base
        if said is None:
            has_effect(drawn.Line((), (key,)), 0, base, config)
        else:
            above = key.rpartition(".")[0] or key
            assert len(said) <= 300 and (key in said or above in said), said

    every_value()
