"""What this machine and the strategies of training can do."""

from __future__ import annotations

import os
import shutil
import sys

from vlmlab.cli.rules.asking import Choices, Config, value_at

WHOLE = ("auto", "ddp", "ddp_fork", "ddp_spawn", "ddp_find_unused_parameters_true")
"""Strategies under which every rank has all weights of its own."""


def fp16_needs_gpu(cfg: Config, choices: Choices) -> str | None:
    """Half precision with loss scaling exists on GPUs only."""
    if value_at(cfg, "precision.name") == "fp16" and value_at(cfg, "trainer.accelerator") == "cpu":
        return "precision=fp16 needs a GPU and trainer.accelerator is cpu; choose precision=fp32 or precision=bf16"
    return None


def shards_for_several(cfg: Config, choices: Choices) -> str | None:
    """FSDP2 shares weights among devices, in fp32 or bf16."""
    if value_at(cfg, "trainer.strategy") != "fsdp2":
        return None
    if value_at(cfg, "trainer.devices") == 1 and value_at(cfg, "trainer.nodes") in (None, 1):
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
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if wanted and shutil.which(compiler) is None:
        return (
            f"trainer.compile=true needs a C++ compiler and {compiler} is not to be found; install it, name another in "
            "the environment as CXX, or set trainer.compile=false"
        )
    return None


def nodes_are_found(cfg: Config, choices: Choices) -> str | None:
    """Several machines are asked for by SLURM, or told to each process by who starts them."""
    nodes = value_at(cfg, "trainer.nodes")
    if not isinstance(nodes, int) or nodes < 2 or "MASTER_ADDR" in os.environ:
        return None
    if choices.get("_mode") == "MULTIRUN" and choices.get("hydra/launcher") == "slurm":
        return None
    return (
        f"trainer.nodes={nodes} wants machines: add -m sweep=slurm, which asks for them, or start the command on each "
        "with MASTER_ADDR, MASTER_PORT and NODE_RANK in its environment"
    )


def ranks_need_a_process_tree(cfg: Config, choices: Choices) -> str | None:
    """Under Hydra's basic launcher every rank would run the whole sweep again."""
    devices = value_at(cfg, "trainer.devices")
    many = devices not in (None, 1, "1", "auto")
    if many and choices.get("_mode") == "MULTIRUN" and choices.get("hydra/launcher") == "basic":
        return f"trainer.devices={devices} cannot be swept by hydra/launcher=basic; use hydra/launcher=pool"
    return None
