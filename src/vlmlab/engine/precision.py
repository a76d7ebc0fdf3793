"""Which number format a run computes in, and why. Trainable weights are fp32 in all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from omegaconf import DictConfig

from vlmlab.contracts.errors import UserError

LightningName = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Precision:
    """A chosen precision.

    Attributes:
        name: Lightning's word for it.
        shown: ours.
        why: the reason, in a few words.
    """

    name: LightningName
    shown: str
    why: str

    @property
    def half(self) -> bool:
        """Whether it computes in 16 bit."""
        return self.name != "32-true"


def on_gpu(cfg: DictConfig) -> bool:
    """Whether the run computes on a GPU."""
    return cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def choose(name: str, on_gpu: bool) -> Precision:
    """The precision of ``precision.name``.

    Raises:
        UserError: an unknown name, or fp16 without a GPU.
    """
    if name == "auto":
        if not on_gpu:
            return Precision("32-true", "fp32", "auto: a CPU computes bf16 slowly")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16-mixed", "bf16", "auto: this GPU has bf16")
        return Precision("32-true", "fp32", "auto: this GPU has no bf16")
    if name == "fp32":
        return Precision("32-true", "fp32", "asked for")
    if name == "bf16":
        return Precision("bf16-mixed", "bf16", "asked for" if on_gpu else "asked for; slow on a CPU")
    if name == "fp16":
        if not on_gpu:
            raise UserError("precision=fp16 needs a GPU and this run is on a CPU; choose precision=fp32 or bf16.")
        return Precision("16-mixed", "fp16", "asked for; with loss scaling")
    raise UserError(f"precision.name={name} is unknown; choose from auto, fp32, bf16, fp16.")
