"""A training step on many questions about one image: as a tree, as a row each, and by transformers with a row each.

    python benchmarks/trees.py [--rounds 7] [--threads 1] [--questions 22] [--size 20M-336]

The questions are as long as SLAKE's in English: 5 to 11 words, the request for a short answer after them, an answer of
one or two words. SigLIP and Llama have random weights that all three sides share; everything trains, in float32 on the
CPU, under mask ``causal``, which is what transformers computes.

- tree: ``collate.questions=tree``, one row: the image once, then every question as a branch.
- rows: ``collate.questions=rows``, the same questions as rows of their own, the image read for each.
- transformers: ``LlavaForConditionalGeneration`` on those rows, ``forward(..., labels=labels).loss``.

A step is forward, backward, clipping and AdamW. First the gradients of all three are compared, and the losses in every
round. The steps then take turns; a ratio is taken in each round, and printed are the median and the quartiles over
rounds. Memory is what torch's allocator hands out for forward and backward at its peak, without the gradients.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch.optim import AdamW
from training_step import BETAS, CLIP, RATE, WORDS, Allocations, Peer, Size, clock, off, sized, vlm, write
from transformers.utils import logging as transformers_logging

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Batch
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM
from vlmlab.objective.lm import LanguageModelling

OTHERS = ("rows", "transformers")
SUFFIX = "Answer the question using a single word or phrase."
SIZES = {
    # 16-pixel patches: 196, 441 or 729 visual tokens
    "20M-224": sized(8_192, 384, 6, 6, 256, 4, 224),
    "20M-336": sized(8_192, 384, 6, 6, 256, 4, 336),
    "20M-432": sized(8_192, 384, 6, 6, 256, 4, 432),
    "tiny": sized(512, 48, 3, 2, 32, 2, 64),
}


def asked(questions: int, seed: int) -> Sample:
    """One picture of random pixels and so many questions about it."""
    random = np.random.default_rng(seed)

    def turn() -> Turn:
        question, answer = (" ".join(random.choice(WORDS, random.integers(a, b))) for a, b in ((5, 12), (1, 3)))
        return Turn(f"{question}? {SUFFIX}", answer)

    pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Sample(str(seed), (pixels,), tuple(turn() for _ in range(questions)), image_ids=(str(seed),))


class Ours:
    """vlmlab's model, its collator for questions in one of two ways, and a step."""

    def __init__(self, folder: Path, peer: Any, questions: str) -> None:
        self.model: VLM = vlm(folder, peer).train()
        self.objective = LanguageModelling()
        self.optimizer = AdamW(self.model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0)
        collate = {"max_length": 100_000, "pack_length": None, "questions": questions}
        self.collate = build_collator(OmegaConf.create({"collate": collate}), self.model, "chat")
        assert self.collate.questions == questions

    def backward(self, batch: Batch) -> float:
        """The mean loss of the answers' tokens."""
        total, count = self.objective(self.model(batch), batch)["lm"]
        (total / count).backward()
        return float(total.detach() / count)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Side:
    """One of the three: what it computes the loss of, and its step in two halves."""

    name: str
    inputs: Callable[[Sample], Any]
    backward: Callable[[Any], float]
    update: Callable[[], None]


def sides(size: Size, folder: Path) -> tuple[list[Side], Callable[[], float]]:
    """The three sides, and how far their gradients are apart once all have gone back."""
    write(size, folder, [*re.findall(r"\w+", SUFFIX), "user", "assistant"])  # as an LM's own tokenizer has them
    peer = Peer(folder)
    tree, rows = (Ours(folder, peer.model, questions) for questions in ("tree", "rows"))
    found = [
        Side("tree", lambda sample: tree.collate([sample]), tree.backward, tree.update),
        Side("rows", lambda sample: rows.collate([sample]), rows.backward, rows.update),
        Side("transformers", lambda sample: peer.inputs(rows.collate([sample])), peer.backward, peer.update),
    ]
    return found, lambda: max(off(ours.model, peer.model) for ours in (tree, rows))


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Of all rounds: losses and seconds by side, and of the first step memory and gradients."""

    shapes: dict[str, tuple[int, int]]
    gradients: float
    peaks: dict[str, int]
    losses: list[dict[str, float]]
    seconds: list[dict[str, NDArray[np.float64]]]


def measure(size: Size, folder: Path, questions: int, rounds: int) -> Measured:
    """All sides do the same steps, one after the other; the first one is compared and weighed, the others timed."""
    all_sides, apart = sides(size, folder)
    found = Measured({}, 0.0, {}, [], [])
    for number in range(rounds + 1):
        sample = asked(questions, number)
        inputs = {side.name: side.inputs(sample) for side in all_sides}
        losses: dict[str, float] = {}
        seconds: dict[str, NDArray[np.float64]] = {}
        for side in all_sides:
            start, allocations = clock(), Allocations()
            if number:
                losses[side.name] = side.backward(inputs[side.name])
                side.update()
                seconds[side.name] = clock() - start
                continue
            with allocations:
                losses[side.name] = side.backward(inputs[side.name])
            found.peaks[side.name] = allocations.found()[0]
        if not number:
            batches = {name: inputs[name] for name in ("tree", "rows")}
            found.shapes = {name: tuple(batch.input_ids.shape) for name, batch in batches.items()}
            found.gradients = apart()
            for side in all_sides:
                side.update()
        else:
            found.seconds.append(seconds)
        found.losses.append(losses)
    return found


def report(found: Measured) -> list[str]:
    """The comparison, which has to hold, and the ratios."""
    loss = max(abs(losses[name] / losses["transformers"] - 1) for losses in found.losses for name in losses)
    assert max(found.gradients, loss) < 1e-4, f"not the same step: gradients {found.gradients}, loss {loss}"
    shapes = {name: f"{rows} x {length}" for name, (rows, length) in found.shapes.items()}
    peaks = [f"{name} {peak / 2**20:.0f} MiB" for name, peak in found.peaks.items()]
    peaks += [f"tree / {name} {found.peaks['tree'] / found.peaks[name]:.3f}" for name in OTHERS]
    lines = [
        f"positions: tree {shapes['tree']}, rows and transformers {shapes['rows']}",
        f"the same step: gradients within {found.gradients:.1e} of each tensor's largest, losses within {loss:.1e}",
        f"memory: {', '.join(peaks)}",
    ]
    for column, what in enumerate(("time", "CPU time")):
        middle = {name: np.median([seconds[name][column] for seconds in found.seconds]) for name in found.peaks}
        parts = [f"{name} {value:.3g} s" for name, value in middle.items()]
        for name in OTHERS:
            ratios = [seconds["tree"][column] / seconds[name][column] for seconds in found.seconds]
            low, half, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            parts.append(f"tree / {name} {half:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"{what}, {len(found.seconds)} rounds: {', '.join(parts)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="20M-336")
    parser.add_argument("--questions", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(SIZES[given.size], Path(folder), given.questions, given.rounds)
    print(*report(found), sep="\n")


if __name__ == "__main__":
    main()
