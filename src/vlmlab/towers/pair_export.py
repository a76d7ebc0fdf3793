"""What ``recipe=embedded_siglip`` does after its last stage: save both towers, and score what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, SiglipTextModel

from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.values import Count, Text
from vlmlab.encoder.preprocess import Preprocess
from vlmlab.encoder.scratch_text import ScratchTextTower
from vlmlab.encoder.tower import TowerEncoder, open_tower
from vlmlab.model.pair import PairedTowers
from vlmlab.runs.files import write_atomic
from vlmlab.towers.blueprint import OWN_CODE, SAFE
from vlmlab.towers.card import facts
from vlmlab.towers.source import quiet, save_tower, tower_hash
from vlmlab.towers.text_export import pooled_texts, retrieval, save_text_tower

CARD = """## The vision tower and its text tower

`vision` and `text` are the two halves of a SigLIP, trained from nothing with one another on whole captions of whole
images: no patch was told what is in it, and no patch is a cell of the world (72 pixels, 6 x 6 patches; the world has
4 x 4 cells). Three of four times the images of a group of four differed in one thing. Generated data, no third-party
data or weights.

| | |
|---|---|
| command | `python train.py recipe=embedded_siglip seed={seed}` |
| steps x batch | {steps}, four image-text pairs each |
| seconds of training | {seconds:.0f}, {threads} CPU thread(s) |
| parameters | vision {vision:,}, text {text:,} |
| sha256 of vision | `{vision_hash}` |
| sha256 of text | `{text_hash}` |

Of {images} held-out images, how often the one that a caption tells is the most similar (`at_1`), and the share of all
others that are less similar (`above`; half by chance); and the same among four scenes that differ in one thing
(`contrast`; a quarter by chance):

| metric | value |
|---|---|
{metrics}
"""


class ExportPair:
    """Saves a vision tower and the text tower it was trained with, in float16, with their part of the model card.

    Args:
        stage: name of the stage whose model holds them.
        pairs: images and captions for the retrieval score, by the name that they have there.
        contrasts: samples of several images and their captions, which differ in one thing.
        batch_size: pairs that are read at once.
    """

    def __init__(
        self,
        stage: Text,
        pairs: Mapping[str, SampleSource],
        contrasts: SampleSource,
        batch_size: Count = 256,
    ) -> None:
        self.stage = stage
        self.pairs = dict(pairs)
        self.contrasts = contrasts
        self.batch_size = batch_size

    def __call__(
        self,
        models: Mapping[str, nn.Module],
        cfg: DictConfig,
        folder: Path,
        costs: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> dict[str, float]:
        """Write ``<folder>/towers/{vision,text}`` and a card; return how well captions find their images.

        The model's towers are afterwards what was saved, rounded to half precision.
        """
        model = models[self.stage]
        assert isinstance(model, PairedTowers) and isinstance(model.lm, ScratchTextTower) and model.encoder is not None
        vision, text = folder / "towers" / "vision", folder / "towers" / "text"
        _save_vision(model.encoder, vision)
        save_text_tower(model.lm, text)
        saved, preprocess, _ = open_tower(str(vision), "float32")
        encoder = TowerEncoder(saved, preprocess, pooled=True).eval()
        scores: dict[str, float] = {}
        for name, pairs in self.pairs.items():
            found = retrieval(encoder, text, pairs, self.batch_size)
            scores |= {f"towers/{name}/{key}": value for key, value in found.items()}
        scores["towers/contrast"] = contrast_accuracy(encoder, text, self.contrasts)
        card = CARD.format(
            **facts(cfg, costs, {**metrics, **scores}),
            vision=sum(p.numel() for p in model.encoder.parameters()),
            text=sum(p.numel() for p in model.lm.parameters()),
            vision_hash=tower_hash(vision),
            text_hash=tower_hash(text),
            images=f"{max(map(len, self.pairs.values())):,}",
        )
        write_atomic(folder / "towers" / "README.md", card)
        return scores


def _save_vision(encoder: Encoder, folder: Path) -> None:
    assert isinstance(encoder, TowerEncoder) and isinstance(encoder.preprocess, Preprocess)
    tower: Any = encoder.tower
    save_tower(tower.to(torch.float16), folder)
    tower.to(torch.float32)
    encoder.preprocess.save(folder, "SiglipImageProcessor")


@torch.no_grad()
def contrast_accuracy(encoder: Encoder, folder: Path, contrasts: SampleSource) -> float:
    """Share of captions whose own image is the most similar of the images of their sample.

    Args:
        encoder: the vision tower, with its pooled output.
        folder: the text tower's.
        contrasts: samples of several images, turn i being the caption of image i.
    """
    with quiet():
        tower: Any = SiglipTextModel.from_pretrained(folder, dtype=torch.float32, **SAFE).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_CODE)
    right, captions = 0, 0
    for index in range(len(contrasts)):
        sample = contrasts[index]
        pixels = torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in sample.images])
        pooled = encoder(pixels).pooled
        assert pooled is not None
        texts = pooled_texts(tower, tokenizer, [turn.answer for turn in sample.turns])
        scores = texts @ F.normalize(pooled, dim=-1).T  # (texts, images); a text's own length changes no order
        right += int((scores.argmax(1) == torch.arange(len(scores))).sum())
        captions += len(scores)
    return right / captions
