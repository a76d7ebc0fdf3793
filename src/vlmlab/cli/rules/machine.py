"""What this machine and the strategies of training can do."""

from __future__ import annotations

import os
import shutil
import sys

from vlmlab.cli.rules.asking import Choices, Config, is_count, value_at

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")

WHOLE = ("auto", "ddp", "ddp_fork", "ddp_spawn", "ddp_find_unused_parameters_true")
"""Strategies under which every rank has all weights of its own."""

STRATEGIES = (*WHOLE, "fsdp2")


def known_precision(cfg: Config, choices: Choices) -> str | None:
    """``precision.name`` is one of the four."""
    name = value_at(cfg, "precision.name")
    return None if name in PRECISIONS else f"precision.name={name} is unknown; choose one of {', '.join(PRECISIONS)}"


def fp16_needs_gpu(cfg: Config, choices: Choices) -> str | None:
    """Half precision with loss scaling exists on GPUs only."""
    if value_at(cfg, "precision.name") == "fp16" and value_at(cfg, "trainer.accelerator") == "cpu":
        return "precision=fp16 needs a GPU and trainer.accelerator is cpu; choose precision=fp32 or precision=bf16"
    return None


def possible_trainer(cfg: Config, choices: Choices) -> str | None:
    """Threads, workers and seconds are counts; accelerator and strategy are known."""
    for key, known in (("accelerator", ACCELERATORS), ("strategy", STRATEGIES)):
        value = value_at(cfg, f"trainer.{key}")
        if value is not None and value not in known:
            return f"trainer.{key}={value} is unknown; choose one of {', '.join(known)}"
    devices = value_at(cfg, "trainer.devices")
    if devices is not None and devices != "auto" and not is_count(devices, 1) and devices != -1:
        return f"trainer.devices={devices} is not possible; give a whole number of at least 1, or auto"
    for key, least in (("threads", 1), ("workers", 0), ("save_every_s", 0)):
        value = value_at(cfg, f"trainer.{key}")
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < least):
            return f"trainer.{key}={value} is not possible; give a number of at least {least}"
    return None


def shards_for_several(cfg: Config, choices: Choices) -> str | None:
    """FSDP2 shares weights among devices, in fp32 or bf16."""
    if value_at(cfg, "trainer.strategy") != "fsdp2":
        return None
    if value_at(cfg, "trainer.devices") == 1:
        return (
            "trainer.strategy=fsdp2 shares the weights among devices and trainer.devices=1; set trainer.devices=2 or "
            "more, or trainer.strategy=auto"
        )
    if value_at(cfg, "precision.name") == "fp16":
        return "trainer.strategy=fsdp2 has no loss scaling, which precision=fp16 needs; choose precision=bf16"
    return None


def compiler_at_hand(cfg: Config, choices: Choices) -> str | None:
    """torch.compile makes C++ on a CPU, and compiles what starts its kernels on a GPU."""
    wanted = value_at(cfg, "trainer.compile")
    if wanted not in (None, True, False):
        return f"trainer.compile={wanted} is not possible; set it to true or false"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if wanted and shutil.which(compiler) is None:
        return (
            f"trainer.compile=true needs a C++ compiler and {compiler} is not to be found; install it, name another in "
            "the environment as CXX, or set trainer.compile=false"
        )
    return None


def ranks_need_a_process_tree(cfg: Config, choices: Choices) -> str | None:
    """Under Hydra's basic launcher every rank would run the whole sweep again."""
    devices = value_at(cfg, "trainer.devices")
    many = devices not in (None, 1, "1", "auto")
    if many and choices.get("_mode") == "MULTIRUN" and choices.get("hydra/launcher") == "basic":
        return f"trainer.devices={devices} cannot be swept by hydra/launcher=basic; use hydra/launcher=pool"
    return None
