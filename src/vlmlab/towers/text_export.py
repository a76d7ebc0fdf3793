"""What ``recipe=embedded_text_tower`` does after its last stage: save the text tower, and score what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SiglipTextModel

from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.values import Count, Text
from vlmlab.encoder.scratch_text import ScratchTextTower
from vlmlab.encoder.text import tokenised
from vlmlab.model.pair import PairedTowers
from vlmlab.runs.files import write_atomic
from vlmlab.towers.blueprint import OWN_CODE, SAFE
from vlmlab.towers.card import facts
from vlmlab.towers.source import quiet, save_tower, tower_hash

CARD = """## The text tower

`text` is a SigLIP text model trained against the frozen `vision` as it is shipped here: generated image-text pairs, no
third-party data or weights. Its texts are captions of both styles, with and without the request for one, questions with
their answers, and questions alone, so that it has read every word of a question beside an image. Its pooled output is
compared with that of `vision` itself, as in SigLIP; there is no other projection. Its tokenizer is that of `lm`.

| | |
|---|---|
| command | `python train.py recipe=embedded_text_tower seed={seed}` |
| steps x batch | {steps} |
| seconds of training | {seconds:.0f}, {threads} CPU thread(s) |
| parameters | {parameters:,} |
| trained against | `{vision_hash}` |
| sha256 of text | `{text_hash}` |

Of {images} held-out images, how often the one that a text is about is the most similar (`at_1`), and the share of all
others that are less similar (`above`; half by chance):

| metric | value |
|---|---|
{metrics}

The command writes `towers/text` and this section into its run folder; the same threads give the same bytes. It goes
with this `vision` alone: after a rebuild of that, train it again.
"""


class ExportTextTower:
    """Saves the text tower, in float16, with its part of the model card.

    Args:
        stage: name of the stage whose model holds it.
        pairs: images and texts for the retrieval score, by the name that they have there.
        batch_size: pairs that are read at once.
    """

    def __init__(self, stage: Text, pairs: Mapping[str, SampleSource], batch_size: Count = 256) -> None:
        self.stage = stage
        self.pairs = dict(pairs)
        self.batch_size = batch_size

    def __call__(
        self,
        models: Mapping[str, nn.Module],
        cfg: DictConfig,
        folder: Path,
        costs: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> dict[str, float]:
        """Write ``<folder>/towers/text`` and a card; return how well its texts find their images.

        The model's text tower is afterwards what was saved, rounded to half precision.
        """
        model = models[self.stage]
        assert isinstance(model, PairedTowers) and isinstance(model.lm, ScratchTextTower) and model.encoder is not None
        home = folder / "towers" / "text"
        save_text_tower(model.lm, home)
        scores: dict[str, float] = {}
        for name, pairs in self.pairs.items():
            found = retrieval(model.encoder, home, pairs, self.batch_size)
            scores |= {f"text_tower/{name}/{key}": value for key, value in found.items()}
        card = _card(model, cfg, costs, {**metrics, **scores}, home, max(map(len, self.pairs.values())))
        write_atomic(folder / "towers" / "README.md", card)
        return scores


def save_text_tower(text: ScratchTextTower, home: Path) -> None:
    """The tower in float16 and its tokenizer; the tower is afterwards what was saved, in float32."""
    tower: Any = text.model
    save_tower(tower.to(torch.float16), home)
    tower.to(torch.float32)
    text.tokenizer.backend_tokenizer.no_truncation()  # which its last use has left there
    text.tokenizer.save_pretrained(home)


@torch.no_grad()
def retrieval(encoder: Encoder, folder: Path, pairs: SampleSource, batch_size: int = 256) -> dict[str, float]:
    """How well the texts of samples find their images among all of these, by the pooled outputs of both towers.

    Args:
        encoder: the vision tower, with its pooled output.
        folder: the text tower's, with its last map and its tokenizer.
        pairs: samples of one image and one turn, whose answer is the text.
        batch_size: pairs that are read at once.

    Returns:
        "at_1": share of texts whose own image is the most similar. "above": share of the other images that are less
        similar than the own one, the mean over all texts.
    """
    device = next(encoder.parameters()).device
    with quiet():
        tower: Any = SiglipTextModel.from_pretrained(folder, dtype=torch.float32, **SAFE)
    tower.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_CODE)
    images, texts = [], []
    for start in range(0, len(pairs), batch_size):
        samples = [pairs[i] for i in range(start, min(start + batch_size, len(pairs)))]
        pixels = torch.stack([torch.from_numpy(encoder.preprocess(sample.images[0])) for sample in samples])
        pooled = encoder(pixels.to(device)).pooled
        assert pooled is not None
        images.append(pooled)
        texts.append(pooled_texts(tower, tokenizer, [sample.turns[0].answer for sample in samples]))
    scores = F.normalize(torch.cat(texts), dim=-1) @ F.normalize(torch.cat(images), dim=-1).T  # (texts, images)
    own = scores.diagonal()[:, None]
    others = max(len(scores) - 1, 1)
    return {
        "at_1": float((scores.argmax(1) == torch.arange(len(scores), device=device)).float().mean()),
        "above": float(((scores < own).sum(1) / others).mean()),
    }


def pooled_texts(tower: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(I, E), a text tower's pooled outputs."""
    ids = tokenised(tokenizer, texts, tower.config.max_position_embeddings).to(tower.device)
    pooled: Tensor = tower(input_ids=torch.where(ids < 0, tokenizer.pad_token_id, ids)).pooler_output
    return pooled


def _card(
    model: PairedTowers,
    cfg: DictConfig,
    costs: Mapping[str, Any],
    metrics: Mapping[str, float],
    home: Path,
    images: int,
) -> str:
    return CARD.format(
        **facts(cfg, costs, metrics),
        parameters=sum(p.numel() for p in model.lm.parameters()),
        vision_hash=model.sourced()["encoder"],
        text_hash=tower_hash(home),
        images=f"{images:,}",
    )
