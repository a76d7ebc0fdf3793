"""A small lab without transformers: data, parts, model and configuration for tests of the trainer.

Run as a script it trains the run folder of its first argument (see ``main``), so that tests can kill it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Batch, Images, Layout, Outputs, Seen
from vlmlab.engine.alignment import AlignmentModule
from vlmlab.engine.instruction import InstructionTuningModule
from vlmlab.mask.causal import Causal

WORDS, WIDTH, SIDE = 23, 8, 4


class FakeSource:
    """Random texts of 2 to 9 words, most with an image."""

    def __init__(self, size: int = 50, images: bool = True, broken: int = -1) -> None:
        self.size, self.images, self.broken = size, images, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise DataError(f"row {index} is broken; mend it.")
        draw = np.random.default_rng(index)
        words = " ".join(str(int(w)) for w in draw.integers(1, WORDS, int(draw.integers(2, 10))))
        image = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        has_image = self.images and index % 3 != 0
        return Sample(id=f"s{index}", images=(image,) if has_image else (), turns=(Turn("", words),))


def collate(samples: list[Sample]) -> Batch:
    """Right-padded words, all supervised but the first."""
    ids = [[0, *(int(w) for w in s.turns[0].answer.split())] for s in samples]
    longest = max(map(len, ids))
    grid = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    valid = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    minus = torch.full_like(grid, -1)
    layout = Layout(
        kind=valid, image=minus, tile=minus, segment=valid - 1, role=valid * 2,
        position=torch.arange(longest).expand_as(grid),
    )  # fmt: skip
    labels = grid.masked_fill(valid == 0, -100)
    pixels = [torch.from_numpy(im.copy()).permute(2, 0, 1) for s in samples for im in s.images]
    return Batch(
        pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8),
        input_ids=grid,
        labels=labels,
        layout=layout,
        images=_table(samples),
        sample_ids=[[s.id] for s in samples],
    )


def _table(samples: list[Sample]) -> Images:
    """Every image before the first word of its row."""
    row = torch.tensor([i for i, s in enumerate(samples) for _ in s.images], dtype=torch.long)
    none = torch.zeros_like(row)
    hw = torch.full((len(row), 2), SIDE)
    return Images(row, none, none, none, none, none, hw, none, [s.id for s in samples for _ in s.images])


class FakeVLM(nn.Module):
    """Encoder and LM play loaded towers, the connector is new; dropout makes the random states matter."""

    def __init__(
        self, dropout: float = 0.1, drift: bool = False, unused: bool = False, explode: str = "",
        fragile: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        towers = torch.Generator().manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(3 * SIDE * SIDE, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(dropout))
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.fusion = nn.Identity()
        self.lm = nn.ModuleDict(
            {
                "embed": nn.Embedding(WORDS, WIDTH),
                "mix": nn.GRU(WIDTH, WIDTH, batch_first=True),
                "drop": nn.Dropout(dropout),
                "head": nn.Linear(WIDTH, WORDS),
            }
        )
        if unused:
            self.lm["spare"] = nn.Linear(WIDTH, WIDTH)
        for part in (self.encoder, self.lm):
            for p in part.parameters():
                p.data = torch.randn(p.shape, generator=towers) * 0.3
        self.drift, self.explode, self.mask, self.adapter = drift, explode, None, None
        self.fragile = fragile
        self.hash = "a" * 64

    def forward(self, batch: Batch, mask: Any = None, in_step: bool = False) -> Outputs:
        hidden = self.lm["embed"](batch.input_ids)
        tokens = None
        if len(batch.pixels):
            features = self.encoder(batch.pixels.flatten(1).float() / 255)
            tokens = self.connector(features)[:, None]
            if self.adapter is not None:
                tokens = tokens + self.adapter(tokens)
            hidden = hidden.index_add(0, batch.images.row, tokens.expand(-1, hidden.shape[1], -1).to(hidden.dtype))
        if self.drift and self.training:
            with torch.no_grad():
                self.encoder[0].weight[0, 0] += 1e-6
        states = self.lm["head"](self.lm["drop"](self.lm["mix"](hidden)[0]))
        if self.explode and any(self.explode in row for row in batch.sample_ids):
            states = states * float("inf")
        if self.fragile and float(self.connector.weight.detach().abs().max()) > 10:
            states = states * float("inf")
        chosen = batch.labels[:, 1:] != -100
        return Outputs(states[:, :-1][chosen], batch.labels[:, 1:][chosen], Seen(tokens=tokens))

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        out = {}
        for part in ("encoder", "connector", "lm"):
            out[part] = [(f"{part}.{n}", p) for n, p in getattr(self, part).named_parameters()]
        if self.adapter is not None:
            out["connector.base"] = out["connector"]
            out["connector"] = [(f"adapter.{n}", p) for n, p in self.adapter.named_parameters()]
        return out

    def sourced(self) -> dict[str, str]:
        return {"encoder": self.hash, "lm": "b" * 64}

    def set_mask(self, mask: Any) -> None:
        self.mask = mask

    def check_adapter(self, adapter: Any) -> None:
        pass

    def set_adapter(self, adapter: Any) -> None:
        if self.adapter is None:
            self.adapter = nn.Linear(WIDTH, WIDTH)


class FakeAdapter:
    """Wraps the connector."""

    def __init__(self, lr: float | None = None) -> None:
        self.parts, self.lr = ("connector",), lr


class FakeMask(Causal):
    """One that the model does not read, but that a stage may have."""


class FakeLoss:
    """Cross-entropy over supervised tokens."""

    def __init__(self, weight: float = 1.0, per_micro_batch: bool = False) -> None:
        self.weight, self.per_micro_batch = weight, per_micro_batch

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        return {"lm": (F.cross_entropy(outputs.logits, outputs.targets, reduction="sum"), outputs.targets.numel())}


class FakeImageLoss:
    """A term counted in images, not tokens."""

    per_micro_batch = False

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"image": len(batch.pixels)}

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        tokens = outputs.seen.tokens if outputs.seen.tokens is not None else outputs.logits.new_zeros(0)
        return {"image": (tokens.square().sum(), len(batch.pixels))}


def build(cfg: DictConfig) -> FakeVLM:
    return FakeVLM(**cfg.fake)


class FakeAlignment(AlignmentModule):
    build = staticmethod(build)
    collator = staticmethod(lambda cfg, model, prompt: collate)


class FakeInstruction(InstructionTuningModule):
    build = staticmethod(build)
    collator = staticmethod(lambda cfg, model, prompt: collate)


def config(**changes: Any) -> DictConfig:
    """A recipe of two stages with everything a run reads; `changes` are dotted keys with __ for the dots."""
    here = "fake_lab"
    source = {"_target_": f"{here}.FakeSource", "size": 50}
    cfg = OmegaConf.create(
        {
            "seed": 3,
            "fake": {"dropout": 0.1},
            "mask": {"_target_": f"{here}.FakeMask"},
            "objective": {"_target_": f"{here}.FakeLoss"},
            "adapter": None,
            "precision": {"name": "fp32"},
            "logger": {"name": "none"},
            "budget": {"steps_scale": 1.0, "max_steps": None, "eval_limit": None},
            "debug": {"steps": None, "overfit": 0, "profile": False},
            "data": {"train": {"short": source, "chat": dict(source, size=33)}},
            "trainer": {
                "accelerator": "cpu", "devices": 1, "strategy": "auto", "threads": 1, "workers": 0,
                "gradient_clip": 1.0, "save_every_s": 0, "progress": False, "log_every": 1,
            },
            "recipe": {
                "stages": {
                    "align": {
                        "module": f"{here}.FakeAlignment", "train": {"connector": 1e-2}, "data": "short",
                        "steps": 6, "batch_size": 8, "accumulate": 2,
                    },
                    "tune": {
                        "module": f"{here}.FakeInstruction", "train": {"connector": 1e-3, "lm": 1e-3}, "data": "chat",
                        "steps": 5, "batch_size": 8, "weight_decay": 0.1,
                    },
                }
            },
        }
    )  # fmt: skip
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return cfg


def evaluate(model: nn.Module, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """In place of the benchmarks."""
    return {"fake/accuracy": 0.5}


def run(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """Train as the command does."""
    from vlmlab.runs.config import plain
    from vlmlab.runs.folder import RunFolder
    from vlmlab.train.run import train

    with RunFolder(folder) as opened:
        opened.open(plain(cfg))
        return train(cfg, folder, evaluate)


def main() -> None:
    """``fake_lab.py FOLDER CHANGES [STEP]``: train; die by SIGKILL after that many optimizer steps of this process."""
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        _die_after(int(sys.argv[3]))
    if int(os.environ.get("LOCAL_RANK", "0")):
        from vlmlab.train.run import train

        train(config(**changes), folder, evaluate)
    else:
        run(config(**changes), folder)


def _die_after(steps: int) -> None:
    """Die in the middle of a step: after the backward passes and before the optimizer."""
    from vlmlab.engine.stage import StageModule

    real, left = StageModule.on_before_optimizer_step, [steps]

    def dying(self: StageModule, optimizer: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, optimizer)

    StageModule.on_before_optimizer_step = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.modules["fake_lab"] = sys.modules["__main__"]
    main()
