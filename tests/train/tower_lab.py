"""Tiny towers with real layers on samples of which some have an image: what the strategies are compared on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tests import tiny
from tests.test_conf import composed
from torch import Tensor

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Visual

STAGE = "recipe.stages.joint."


class Mixed:
    """Questions of a few words; of every `images` samples one has an image."""

    def __init__(self, size: int = 40, images: int = 3) -> None:
        self.size, self.images = size, images

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        draw = np.random.default_rng(index)
        words = list(draw.choice(tiny.WORDS, int(draw.integers(2, 5))))
        image = (tiny.picture(index),) if index % self.images == 0 else ()
        return Sample(f"s{index}", image, (Turn(words[0], " ".join(words[1:])),))


NO_ROOM: dict[str, tuple[type[Exception], str]] = {
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"),
    "python": (MemoryError, ""),
}


class Hungry(MlpConnector):
    """Finds no memory in its third call of a training; never where values do not exist, as in a plan."""

    def __init__(self, in_width: int, out_width: int, kind: str = "cuda", depth: int = 2) -> None:
        super().__init__(in_width, out_width, depth)
        self.kind, self.left = kind, 3

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        self.left -= type(visual.grids[0]) is Tensor and torch.is_grad_enabled()
        if not self.left:
            error, words = NO_ROOM[self.kind]
            raise error(words)
        return super().forward(visual, instruction)


def config(*overrides: str, **stage: Any) -> DictConfig:
    """Recipe ``joint`` on tiny towers: three steps of four samples; `stage` are keys of the stage."""
    cfg = composed(
        "recipe=joint", "encoder=hf", f"encoder.path={tiny.siglip()}", "lm=hf", f"lm.path={tiny.qwen2()}",
        "collate.pack_length=null", "precision=fp32", "trainer.accelerator=cpu", "trainer.progress=false",
        "trainer.save_every_s=0", "trainer.log_every=1", *overrides,
    )  # fmt: skip
    OmegaConf.set_struct(cfg, False)
    cfg.data.train.instruct = {"_target_": f"{__name__}.Mixed"}
    train = {"encoder": 1e-3, "connector": 1e-3, "lm": 1e-3}
    settings = {"steps": 3, "batch_size": 4, "weight_decay": 0.1, "warmup": 0.0, "train": train, **stage}
    for key, value in settings.items():
        OmegaConf.update(cfg, STAGE + key, value, merge=False)
    return cfg
