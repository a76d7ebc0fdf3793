"""Answers a second: vlmlab's generation against transformers' ``generate`` on the same model, exported by vlmlab.

    python benchmarks/generation.py [--rounds 5] [--threads 1] [--tokens 16] [--size 20M-336]

SigLIP and Llama have random weights, mask ``causal``. vlmlab's side is its own composition, the other the folder that
``vlmlab export`` writes of it, opened by ``AutoModelForImageTextToText`` and ``AutoProcessor``. Both begin with
pictures and words and end with words, greedily, and make the same number of tokens for each question:

- alone: one question after the other.
- batch: questions about different pictures, padded on the left.
- one picture: as many questions about one picture. vlmlab reads it once for all (``evaluation.share_images=true``);
  the other side has a row for each question, as its processor makes them.

That all answers are the same is checked. The sides take turns; a ratio of tokens a second is taken in each round, and
printed are the median and the quartiles over rounds; above 1 vlmlab is faster.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image as Pillow
from training_step import WORDS, Peer, Size, clock, sized, vlm, write
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.collate import Collator
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM
from vlmlab.published import export
from vlmlab.published.prompts import conversation

SIZES = {
    "20M-224": sized(8_192, 384, 6, 6, 256, 4, 224),
    "20M-336": sized(8_192, 384, 6, 6, 256, 4, 336),
    "93M-336": sized(49_152, 576, 9, 12, 384, 6, 336),
    "tiny": sized(512, 48, 3, 2, 32, 2, 64),
}
QUESTIONS = 8
Answer = Callable[[Sequence[Sample], int], list[str]]


def asked(number: int, pictures: int) -> list[Sample]:
    """Questions of 6 to 12 words about so many pictures of random pixels."""
    random = np.random.default_rng(number)
    shown = [random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(pictures)]
    words = [" ".join(random.choice(WORDS, random.integers(6, 13))) for _ in range(QUESTIONS)]
    return [
        Sample(f"{number}-{k}", (shown[k % pictures],), (Turn(said, ""),), image_ids=(f"{number}-{k % pictures}",))
        for k, said in enumerate(words)
    ]


class Ours:
    """vlmlab's composition."""

    def __init__(self, model: VLM, cfg: Any) -> None:
        self.model = model.eval()
        self.collate: Collator = replace(build_collator(cfg, self.model, "chat"), questions="conversation")

    def rows(self, samples: Sequence[Sample], tokens: int) -> list[str]:
        return self.model.generate(self.collate.ask(samples), tokens, min_new_tokens=tokens)

    def tree(self, samples: Sequence[Sample], tokens: int) -> list[str]:
        return self.model.generate(replace(self.collate, questions="tree").ask(samples), tokens, min_new_tokens=tokens)


class Theirs:
    """The exported folder by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")

    def rows(self, samples: Sequence[Sample], tokens: int) -> list[str]:
        prompts = self.processor.apply_chat_template(
            [conversation(Pillow.fromarray(sample.images[0]), sample.turns[0].prompt) for sample in samples],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        made = self.model.generate(**prompts, max_new_tokens=tokens, min_new_tokens=tokens)
        words = self.processor.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in words]


def each(answer: Answer) -> Answer:
    """One question after the other."""
    return lambda samples, tokens: [said for sample in samples for said in answer([sample], tokens)]


def sides(size: Size, folder: Path) -> tuple[Ours, Theirs]:
    """Both, of the same weights."""
    write(size, folder, ["user", "assistant"])
    peer = Peer(folder)
    cfg = OmegaConf.create(
        {
            "encoder": {"_target_": "vlmlab.encoder.hf.HfEncoder", "path": str(folder / "vision"), "layers": [-1]},
            "collate": {"max_length": 4096, "pack_length": None},
        }
    )
    goes = vlm(folder, peer.model).eval()
    export.write(goes, cfg, folder / "exported", export.export_route(goes))
    return Ours(vlm(folder, peer.model), cfg), Theirs(folder / "exported")


def measure(size: Size, folder: Path, rounds: int, tokens: int) -> dict[str, list[tuple[NDArray[np.float64], ...]]]:
    """By case the seconds (wall, own) of vlmlab and of transformers in each round; round 0 warms up."""
    ours, theirs = sides(size, folder)
    cases: dict[str, tuple[Answer, Answer, int]] = {
        "alone": (each(ours.rows), each(theirs.rows), QUESTIONS),
        "batch": (ours.rows, theirs.rows, QUESTIONS),
        "one picture": (ours.tree, theirs.rows, 1),
    }
    found: dict[str, list[tuple[NDArray[np.float64], ...]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, (mine, other, pictures) in cases.items():
            samples = asked(number, pictures)
            start = clock()
            said = mine(samples, tokens)
            between = clock()
            others = other(samples, tokens)
            if number:
                found[name].append((between - start, clock() - between))
            assert said == others, f"{name}: not the same answers"
    return found


def report(found: dict[str, list[tuple[NDArray[np.float64], ...]]], tokens: int) -> list[str]:
    """Tokens a second and ratios."""
    lines = []
    for name, pairs in found.items():
        for column, what in enumerate(("time", "CPU time")):
            mine, other = (QUESTIONS * tokens / np.median([pair[k][column] for pair in pairs]) for k in (0, 1))
            low, half, high = np.quantile([theirs[column] / ours[column] for ours, theirs in pairs], [0.25, 0.5, 0.75])
            lines.append(
                f"{name}, {what}: vlmlab {mine:.3g} tokens/s, transformers {other:.3g}; ratio {half:.3f} "
                f"({low:.3f} to {high:.3f}), {len(pairs)} rounds"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="20M-336")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    asked_for = parser.parse_args()
    torch.set_num_threads(asked_for.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(SIZES[asked_for.size], Path(folder), asked_for.rounds, asked_for.tokens)
    print(*report(found, asked_for.tokens), sep="\n")


if __name__ == "__main__":
    main()
