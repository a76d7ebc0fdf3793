"""How likely answers are: options as the branches of one prompt, which goes through the model once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch, Layout
from vlmlab.data.chat import IGNORE
from vlmlab.data.collate import Collator
from vlmlab.model.vlm import VLM

AT_ONCE = 256
"""Positions whose logits over the whole vocabulary are held together, in float32."""


@dataclass(frozen=True)
class Likelihood:
    """Of one answer to its prompt.

    Attributes:
        log: sum of the log-probabilities of its tokens, its end included, in nats.
        greedy: whether each of its tokens is the likeliest there.
    """

    log: float
    greedy: bool


def option_likelihoods(
    model: VLM, collate: Collator, samples: Sequence[Sample], size: int, shared: bool = True
) -> list[list[Likelihood]]:
    """Of every sample the likelihood of each option of its last turn.

    Args:
        model: in evaluation mode.
        collate: for the chat prompt.
        samples: any number of them.
        size: samples in a batch; without `shared` rows in a batch.
        shared: the options of a question are branches behind one prompt; False: one row an option. It has to be False
            where ``vlmlab.model.questions.unequal_in_options`` has a reason.

    Raises:
        DataError: a sample has no options, or cannot be used.
        UserError: the chat template has another prompt before another answer.
    """
    device = next(model.parameters()).device
    asked = list(samples) if shared else [one for sample in samples for one in _one_by_one(sample)]
    found: list[Likelihood] = []
    for start in range(0, len(asked), size):
        found += likelihoods(model, collate.choose(asked[start : start + size]).to(device))
    in_order: Iterator[Likelihood] = iter(found)
    return [list(islice(in_order, len(sample.turns[-1].options))) for sample in samples]


def _one_by_one(sample: Sample) -> list[Sample]:
    """The sample for each of its options, with that one alone; one without options as it is."""
    *before, last = sample.turns
    single = [replace(sample, turns=(*before, replace(last, options=(option,)))) for option in last.options]
    return single or [sample]


@torch.no_grad()
def likelihoods(model: VLM, batch: Batch) -> list[Likelihood]:
    """Of every supervised answer, in the order of the rows and of their branches.

    Args:
        model: in evaluation mode.
        batch: one supervised answer a row, or a branch; not packed.
    """
    seen = model.see(batch)
    inside = model.inside(batch, seen)
    states = model.lm.states(model.embed(batch, seen), batch.layout, model.mask, inside)  # (B, S, D)
    row, place = (batch.labels != IGNORE).nonzero(as_tuple=True)  # (T,)
    before = _predictors(batch.layout)[row, place]
    logs, hits = _each(model, states[row, before], batch.labels[row, place])
    answers = torch.stack([row, batch.layout.branch[row, place]], 1)  # (T, 2)
    _, own, count = answers.unique_consecutive(dim=0, return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=torch.float64, device=logs.device).index_add(0, own, logs)
    greedy = torch.zeros(len(count), dtype=torch.long, device=logs.device).index_add(0, own, hits.long()) == count
    return [Likelihood(log, hit) for log, hit in zip(total.tolist(), greedy.tolist(), strict=True)]


def _predictors(layout: Layout) -> Tensor:
    """(B, S): the position that predicts each: the one before it, and of a branch's first the last that all share."""
    place = torch.arange(layout.kind.shape[1], device=layout.kind.device)
    trunk = ((layout.branch < 0) & layout.valid).long() * (place + 1)  # padding is on the right, and branches are last
    begins = torch.ones_like(layout.branch, dtype=torch.bool)
    begins[:, 1:] = layout.branch[:, 1:] != layout.branch[:, :-1]
    begins &= layout.branch >= 0
    before = torch.where(begins, trunk.amax(1, keepdim=True) - 1, place - 1)
    return before.clamp(min=0)


def _each(model: VLM, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) log-probability of each target in float64, and whether it is the likeliest token."""
    logs, hits = [], []
    for some, own in zip(states.split(AT_ONCE), targets.split(AT_ONCE), strict=True):
        logits = model.lm.logits(some).float()  # (t, V)
        logs.append(logits.log_softmax(-1).gather(1, own[:, None])[:, 0].double())
        hits.append(logits.argmax(-1) == own)
    return torch.cat(logs), torch.cat(hits)
