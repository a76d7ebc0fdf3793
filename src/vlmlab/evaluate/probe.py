"""The probe: how far a linear map that was never trained gets, as a floor beside every score of the embedded world.

A map from the vision tower's features to the LM's word embeddings is fitted by least squares on images whose patches
the generator can put into words; no gradient step is made and no question is seen. What it answers with the towers as
they are is the towers' own doing. A comparison of connectors or fusions is worth little where this score is close to
theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vlmlab.connector.linear import LinearConnector
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.sample import Sample
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.lm.causal import CausalLanguageModel
from vlmlab.model.vlm import VLM

SHIPPED = Path(str(files("vlmlab"))) / "embedded" / "probe.json"
"""The probe's answers for the shipped towers on the world's benchmarks; ``vlmlab.towers.probes`` writes it."""

RIDGE = 1e-5
"""Share of the features' mean square that is added to the diagonal, so that features without variance do no harm."""


class PatchLabels(Protocol):
    """Images whose patches can be put into words, in each of some forms."""

    forms: Sequence[str]

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> Sample:
        """One of them, without turns."""

    def words(self, index: int, rows: int, columns: int, form: str) -> list[str]:
        """The words of each patch of a grid over an image, in raster order."""


def probes(cfg: DictConfig, trained: VLM) -> list[VLM]:
    """The towers as they came, with a fitted linear connector for each form of words; none where there is no probe.

    Args:
        cfg: the run's configuration; ``data.probe`` makes the images and their words.
        trained: the run's model, whose device is taken.
    """
    if not cfg.data.get("probe") or trained.encoder is None:
        return []
    device = next(trained.parameters()).device
    encoder, lm = instantiate(cfg.encoder).to(device).eval(), instantiate(cfg.lm).to(device).eval()
    labels: PatchLabels = instantiate(cfg.data.probe)
    maps = [fitted(encoder, lm, labels, form) for form in labels.forms]
    return [VLM(encoder, linear, ConcatFusion(), lm, instantiate(cfg.mask)).eval() for linear in maps]


def address(cfg: DictConfig, trained: VLM, benchmark: DictConfig) -> str | None:
    """What the probe's answers to a benchmark depend on, as a hash; None where a tower was made from nothing."""
    encoder, lm = trained.encoder, trained.lm
    if encoder is None or encoder.source is None or lm.source is None or not cfg.data.get("probe"):
        return None
    nodes = (cfg.mask, cfg.data.probe, benchmark.source)
    plain = [OmegaConf.to_container(node, resolve=True) for node in nodes]
    facts = [encoder.source, encoder.width, list(encoder.hw), lm.source, *plain, benchmark.max_new_tokens]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def shipped() -> Mapping[str, Mapping[str, str]]:
    """What ships: address -> sample id -> answer."""
    known: Any = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    return dict(known)


@torch.no_grad()
def fitted(encoder: Encoder, lm: CausalLanguageModel, labels: PatchLabels, form: str) -> LinearConnector:
    """A linear connector that turns a patch's feature into the sum of the word embeddings of what is there.

    Args:
        encoder: the vision tower; all tapped layers side by side are the feature.
        lm: whose input embeddings are meant.
        labels: images and the words of their patches.
        form: one of ``labels.forms``.
    """
    rows, columns = encoder.hw
    device = next(lm.parameters()).device
    features, targets = [], []
    for index in range(len(labels)):
        pixels = torch.from_numpy(encoder.preprocess(labels[index].images[0]))[None].to(device)
        features.append(torch.cat(encoder(pixels).grids, -1)[0])  # (N, Dv)
        targets.append(_embedded(lm, labels.words(index, rows, columns, form)))  # (N, D)
    x, y = torch.cat(features).double(), torch.cat(targets).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # the bias
    square = x.T @ x
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=x.dtype, device=x.device)
    solution = torch.linalg.solve(square, x.T @ y)  # (Dv + 1, D)
    connector = LinearConnector(encoder.width, lm.width).to(device)
    connector.layer.weight.copy_(solution[:-1].T)
    connector.layer.bias.copy_(solution[-1])
    return connector.eval()


def _embedded(lm: CausalLanguageModel, words: Sequence[str]) -> Tensor:
    """(N, D), for each patch the sum of the embeddings of its words."""
    ids = [torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in words]
    embeddings: Any = lm.model.get_input_embeddings()
    table: Tensor = embeddings.weight
    return torch.stack([table[own.to(table.device)].float().sum(0) for own in ids])
