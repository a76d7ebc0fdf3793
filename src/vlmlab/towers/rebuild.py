"""What ``recipe=embedded_towers`` does after its last stage: score the towers and save them as transformers folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import safe_open
from torch import Tensor

from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.values import Count, Text
from vlmlab.encoder.preprocess import Preprocess
from vlmlab.engine.contrastive import ContrastiveModule
from vlmlab.model.dual import DualEncoder
from vlmlab.model.vlm import VLM
from vlmlab.runs.files import write_atomic
from vlmlab.towers.card import facts
from vlmlab.towers.source import save_tower, tower_hash

CARD = """# Embedded towers

Two tiny towers trained on the embedded world (`vlmlab.data.world`): generated data, no third-party data or weights.
`vision` is a SigLIP vision model that saw no question: each of its 16 patches was taught to name its own cell, by its
place and four words (a caption is the list of them). `lm` is a Qwen2 that saw text and no image.
Stored in float16, loaded in float32.

| | |
|---|---|
| command | `python train.py recipe=embedded_towers seed={seed}` |
| steps x batch | {steps} |
| seconds of training | {seconds:.0f}, {threads} CPU thread(s) |
| parameters | vision {vision:,}, lm {lm:,} |
| sha256 of vision | `{vision_hash}` |
| sha256 of lm | `{lm_hash}` |

| metric | value |
|---|---|
{metrics}

The command writes `towers/` into its run folder; a rebuild should reach these metrics within 2 points.
"""


class ExportTowers:
    """Saves the vision tower and the LM, in float16, with a model card.

    Args:
        vision_stage: name of the stage whose model holds the vision tower.
        lm_stage: name of the stage whose model is the language model.
        pairs: images and captions for the retrieval score.
        batch_size: images among which each caption has to find its own.
    """

    def __init__(self, vision_stage: Text, lm_stage: Text, pairs: SampleSource, batch_size: Count = 256) -> None:
        self.vision_stage = vision_stage
        self.lm_stage = lm_stage
        self.pairs = pairs
        self.batch_size = batch_size

    def __call__(
        self,
        models: Mapping[str, VLM],
        cfg: DictConfig,
        folder: Path,
        costs: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> dict[str, float]:
        """Write ``<folder>/towers/{vision,lm}`` with a card; return the retrieval accuracy of the vision tower."""
        dual, language = models[self.vision_stage], models[self.lm_stage]
        assert isinstance(dual, DualEncoder) and dual.encoder is not None
        score = {"towers/retrieval_at_1": self._retrieval(dual, cfg)}
        vision, lm = folder / "towers" / "vision", folder / "towers" / "lm"
        _save(dual.encoder.tower, vision)
        assert isinstance(dual.encoder.preprocess, Preprocess)
        dual.encoder.preprocess.save(vision, "SiglipImageProcessor")
        _save(language.lm.model, lm)
        language.lm.plain_tokenizer.save_pretrained(lm)
        card = _card(cfg, costs, {**metrics, **score}, vision, lm)
        write_atomic(folder / "towers" / "README.md", card)
        return score

    @torch.no_grad()
    def _retrieval(self, model: DualEncoder, cfg: DictConfig) -> float:
        """Share of captions whose own image is the most similar of the whole set."""
        model.eval()
        collate = ContrastiveModule.collator(cfg, model, "plain")
        device = next(model.parameters()).device
        images: list[Tensor] = []
        texts: list[Tensor] = []
        for start in range(0, len(self.pairs), self.batch_size):
            samples = [self.pairs[i] for i in range(start, min(start + self.batch_size, len(self.pairs)))]
            pairing = model(collate(samples).to(device)).pairing
            images.append(pairing.image)
            texts.append(pairing.text)
        nearest = (torch.cat(texts) @ torch.cat(images).T).argmax(1)  # (pairs,)
        return float((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean())


LANGUAGE_CARD = """## The language model

`lm` is a Qwen2 that has read scenes told in words, in sentences, and questions about them; it has seen no image, and
no stage listed all cells or gave a cell one position. Generated data, no third-party data or weights.

| | |
|---|---|
| command | `python train.py recipe=embedded_text seed={seed}` |
| steps x batch | {steps} |
| seconds of training | {seconds:.0f}, {threads} CPU thread(s) |
| parameters | {parameters:,} |
| sha256 of lm | `{lm_hash}` |

| metric | value |
|---|---|
{metrics}
"""


class ExportLanguageModel:
    """Saves a language model and its tokenizer, in float16, with its part of the model card.

    Args:
        stage: name of the stage whose model it is.
    """

    def __init__(self, stage: Text) -> None:
        self.stage = stage

    def __call__(
        self,
        models: Mapping[str, VLM],
        cfg: DictConfig,
        folder: Path,
        costs: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> dict[str, float]:
        """Write ``<folder>/towers/lm`` with a card; there is nothing more to score."""
        model, home = models[self.stage], folder / "towers" / "lm"
        _save(model.lm.model, home)
        model.lm.plain_tokenizer.save_pretrained(home)
        told = facts(cfg, costs, metrics)
        card = LANGUAGE_CARD.format(**told, parameters=_stored(home), lm_hash=tower_hash(home))
        write_atomic(folder / "towers" / "README.md", card)
        return {}


def _card(cfg: DictConfig, costs: Mapping[str, Any], metrics: Mapping[str, float], vision: Path, lm: Path) -> str:
    return CARD.format(
        **facts(cfg, costs, metrics),
        vision=_stored(vision),
        lm=_stored(lm),
        vision_hash=tower_hash(vision),
        lm_hash=tower_hash(lm),
    )


def _stored(folder: Path) -> int:
    """Number of values in a folder's weights."""
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a mapping


def _save(model: Any, folder: Path) -> None:
    dtype = next(model.parameters()).dtype
    save_tower(model.to(torch.float16), folder)
    model.to(dtype)
