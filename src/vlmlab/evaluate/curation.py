"""Has a trained model look at captions: how well each fits its image, and what the model itself would say.

BLIP's filter (arXiv 2201.12086, section 3.3) is an encoder with a matching head. A composition of the lab has none
after its training, so that the score is ours: the text's likelihood given its own image, against that given others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.contracts.terminal import tell
from vlmlab.data.collate import Collator
from vlmlab.data.filtered import Scored, write_scores
from vlmlab.evaluate.baselines import Limited, Shuffled
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM

_LOOKED_AT = 16
"""Samples whose turns are counted before a source is taken for one of captions."""


@torch.no_grad()
def losses_of(collate: Collator, model: VLM, samples: Sequence[Sample]) -> list[float]:
    """Mean loss of every sample's supervised tokens, in nats; one sample a row."""
    batch = collate(samples).to(next(model.parameters()).device)
    outputs = VLM.forward(model, batch)
    each = torch.nn.functional.cross_entropy(outputs.logits.float(), outputs.targets, reduction="none")  # (T,)
    rows = (batch.labels[:, 1:] != -100).nonzero()[:, 0]  # (T,) in the order of the logits
    sums = each.new_zeros(len(samples)).index_add(0, rows, each)
    loss: list[float] = (sums / torch.bincount(rows, minlength=len(samples))).tolist()
    return loss


def matching_scores(
    collate: Collator, model: VLM, own: Sequence[Sample], others: Sequence[Sequence[Sample]]
) -> list[float]:
    """For every sample its best loss with others' images minus that with its own, in nats a token.

    Args:
        collate: samples to rows, one a row.
        model: a trained composition, in evaluation mode.
        own: samples with their images.
        others: the same samples with the images of others, once for each of them.
    """
    right = losses_of(collate, model, own)
    wrong = [losses_of(collate, model, samples) for samples in others]
    return [min(values) - loss for loss, *values in zip(right, *wrong, strict=True)]


def curate(model: VLM, cfg: DictConfig, name: str, n: int, against: int, write: bool) -> list[Scored]:
    """Score the first samples of a source, and what the model writes for their images.

    Args:
        model: a trained composition, on the device it shall run on.
        cfg: the run's configuration.
        name: of the source in ``data.train``; captions, or where nothing is written conversations.
        n: how many samples.
        against: other images that each text is compared under; chance is one in so many and one more.
        write: whether the model captions the images, too; wants captions of one turn.

    Raises:
        UserError: there is no such source, or one with several turns a sample that is to be written.
    """
    source = _opened(cfg, name, n, write)
    chat = build_collator(cfg, model, "chat")
    collate = replace(chat, pack_length=None, questions="conversation")
    size, device = int(cfg.evaluation.batch_size), next(model.parameters()).device
    wrong = [Shuffled(source, seed) for seed in range(against)]
    rows: list[Scored] = []
    for start in range(0, len(source), size):
        places = range(start, min(start + size, len(source)))
        own, others = [source[i] for i in places], [[other[i] for i in places] for other in wrong]
        scores = matching_scores(collate, model, own, others)
        found = [Scored(i, sample.id, score) for i, sample, score in zip(places, own, scores, strict=True)]
        if write:
            texts = [text.strip() for text in model.generate(collate.ask(own).to(device), 64)]
            said = [_saying(sample, text) for sample, text in zip(own, texts, strict=True)]
            there = [[_saying(s, t) for s, t in zip(samples, texts, strict=True)] for samples in others]
            again = matching_scores(collate, model, said, there)
            found = [replace(row, written=t, written_score=s) for row, t, s in zip(found, texts, again, strict=True)]
        rows += found
    return rows


def _opened(cfg: DictConfig, name: str, n: int, write: bool) -> SampleSource:
    if name not in cfg.data.train:
        raise UserError(f"source={name} is not in the run's data.train; choose from {listed(cfg.data.train)}.")
    source = Limited(instantiate(cfg.data.train[name]), n)
    turns = max(len(source[index].turns) for index in range(min(_LOOKED_AT, len(source))))
    if write and turns > 1:
        raise UserError(
            f"source={name} has up to {turns} turns a sample, which cannot be written anew; set write=false."
        )
    return source


def _saying(sample: Sample, text: str) -> Sample:
    """The sample with a text of the model's, or a full stop where it said nothing."""
    return replace(sample, turns=(replace(sample.turns[0], answer=text or "."),))


def report(rows: Sequence[Scored], source: object, least: float = 0.0) -> list[str]:
    """What was found, in lines; where the source knows which texts match, how well they were found."""
    kept = [row for row in rows if row.score >= least]
    lines = [f"{len(kept)} of {len(rows)} given texts have a score of {least:g} or more"]
    if any(row.written for row in rows):
        own = sum(row.written_score >= least for row in rows if row.written)
        lines.append(
            f"{own} of {sum(row.written != '' for row in rows)} written texts have a score of {least:g} or more"
        )
    matched = getattr(source, "matched", None)
    if matched is not None:
        right = {row.index for row in rows if matched(row.index)}
        hits = sum(row.index in right for row in kept)
        precision, recall = hits / max(len(kept), 1), hits / max(len(right), 1)
        lines.append(
            f"{len(right) / len(rows):.3f} of the texts match; of those kept {precision:.3f} do (precision), and "
            f"{recall:.3f} of those that match are kept (recall)"
        )
    return lines


def curate_run(folder: Path, cfg: DictConfig) -> None:
    """Score a source of a finished run with its model, write the file and say what was found.

    Args:
        folder: the run's folder.
        cfg: ``conf/curate.yaml``: source, n, against, write, least, out, device, trust.

    Raises:
        UserError: the run is not finished, or the source is none of captions.
    """
    from vlmlab.engine.device import device_of
    from vlmlab.engine.restore import load_trained
    from vlmlab.runs.trust import building, saved_config

    config = saved_config(folder, bool(cfg.trust))
    torch.set_num_threads(int(config.trainer.threads))
    with building(folder):
        model = load_trained(config, folder)
    assert isinstance(model, VLM)
    rows = curate(model.to(device_of(str(cfg.device))), config, cfg.source, cfg.n, cfg.against, cfg.write)
    write_scores(Path(cfg.out), rows)
    for line in report(rows, instantiate(config.data.train[cfg.source]), cfg.least):
        tell(line)
    tell(f"written to {cfg.out}")
