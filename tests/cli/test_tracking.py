"""Commands of docs/tracking.md, the keys they are about, and ``vlmlab wandb``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.cli.asking import ask_words
from tests.test_conf import CONF, composed

from vlmlab.cli.compare import spelled
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules import check, choices_of
from vlmlab.cli.rules.values import wrong_values
from vlmlab.cli.wandb_sweep import log_sweep, wandb_command
from vlmlab.contracts.errors import UserError
from vlmlab.runs.config import plain

PAGE = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
COMMANDS = re.findall(r"^ {4}python train\.py (.+)$", PAGE, re.M)


def admitted(words: list[str]) -> None:
    """Of a sweep, its first cell."""
    single = [word if "[" in word else word.split(",")[0] for word in words if word != "-m"]
    cfg = composed(*single, whole=True)
    choices = choices_of(cfg.hydra)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    assert not list(wrong_values(cfg, plain(cfg), choices, None)), words
    check(cfg, plain(cfg), choices)


def test_the_page_has_commands_and_every_key_it_names_is_there() -> None:
    assert len(COMMANDS) == 5 and "vlmlab wandb sweeps/" in PAGE
    keys = OmegaConf.load(CONF / "train.yaml").evaluation
    assert {name for name in re.findall(r"`evaluation\.(\w+)", PAGE)} <= set(keys)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_admitted(line: str) -> None:
    admitted(shlex.split(line))


@pytest.mark.parametrize("choice", ["tensorboard", "csv", "mlflow"])
def test_every_logger_is_admitted(choice: str) -> None:
    admitted([f"logger={choice}"])


def test_a_name_without_a_logger_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logger\.name=csv logs nowhere .* write logger=csv"):
        admitted(["logger.name=csv"])


def test_a_sweep_without_a_table_is_refused(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for words, said in (
        ([], "which sweep? write sweep=..., as in: vlmlab wandb sweeps/<name>"),
        ([nowhere], f"sweep={nowhere} is not a folder"),
        ([f"sweep={nowhere}"], f"sweep={nowhere} is not a folder"),
        ([nowhere, "mode=later"], "mode=later is unknown; choose one of auto, online, offline"),
        ([str(tmp_path)], f"{tmp_path} has no table.csv"),
    ):
        _, _, err, _ = ask_words("wandb", spelled(words), wandb_command)
        assert err.startswith(f"error: {said}") and err.count("\n") == 1, err
    with pytest.raises(UserError, match=r"has no table\.csv"):
        log_sweep(tmp_path, {})
