"""One training step of vlmlab against transformers' ``LlavaForConditionalGeneration``: time and memory, as ratios.

    python benchmarks/training_step.py [--rounds 9] [--threads 1] [--batch 8] [--size 93M]

A SigLIP and a Llama of random weights (93M in all, 49,152 words), written as safetensors and loaded by both; the same
conversations, right padded: an image (196 tokens, with --size 93M-336 441), a question, an answer. Everything trains,
in float32 on the CPU.

- vlmlab: its collator's batch through ``StageModule.training_step`` under Lightning's trainer, as a stage runs it:
  forward, objective ``lm`` under mask ``causal``, backward, clipping, AdamW.
- transformers: ``forward(..., labels=labels).loss``, backward, clipping at the same norm, the same AdamW.

First the losses and the gradients of both are compared, and the losses again in every round. The steps then take turns;
a ratio is taken in each round, and printed are the median and the quartiles over rounds; below 1 vlmlab is better.
Memory is what torch's allocator hands out between the step's beginning and the end of the backward pass, at its peak
and without the gradients: the step beyond weights, gradients and optimizer state.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.utils import logging as transformers_logging

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Batch
from vlmlab.data.module import Window, Windows, step_loader
from vlmlab.data.sampler import Order
from vlmlab.encoder.hf import HfEncoder
from vlmlab.engine.instruction import InstructionTuningModule
from vlmlab.engine.weights import StagedModel
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.lm.scratch import train_tokenizer
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import Stage

RATE, CLIP, BETAS = 1e-4, 1.0, (0.9, 0.999)
TEXT = """what which where how many is are the a of in on and with two three red blue green white small large old young
man woman child dog cat horse street table tree car train boat water grass sky holding standing sitting riding behind
beside near left right picture photograph colour animal people wearing hat shirt there appears to be yes no it"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class Size:
    """The two towers; the LM's vocabulary is never smaller than its tokenizer's."""

    text: dict[str, int]
    vision: dict[str, int]


def sized(words: int, wide: int, heads: int, layers: int, vision: int, vision_heads: int, pixels: int) -> Size:
    text = {"vocab_size": words, "hidden_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads}
    tower = {"hidden_size": vision, "num_hidden_layers": layers, "num_attention_heads": vision_heads}
    text |= {"num_key_value_heads": heads // 3, "intermediate_size": wide * 8 // 3}
    return Size(text, tower | {"intermediate_size": 4 * vision, "image_size": pixels, "patch_size": 16})


SIZES = {
    # SmolLM2-135M's width and vocabulary with 12 of its 30 layers, and a ViT-S/16 at 224 pixels or LLaVA-1.5's 336
    "93M": sized(49_152, 576, 9, 12, 384, 6, 224),
    "93M-336": sized(49_152, 576, 9, 12, 384, 6, 336),
    "tiny": sized(512, 48, 3, 2, 32, 2, 64),
}


# -- the same weights and the same samples for both --------------------------------------------------------------------


def write(size: Size, folder: Path, more: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """A LLaVA of random weights, and its two towers as folders of their own; `more` are words that are one token."""
    words = [*WORDS, *more]
    tokenizer = train_tokenizer([*words, *(f" {word}" for word in words)] * 3, size.text["vocab_size"])
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = LlamaConfig(**size.text, **ids, tie_word_embeddings=True)  # type: ignore[arg-type]
    side = size.vision["image_size"]
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**size.vision, vision_use_head=False),  # type: ignore[arg-type]
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(side // size.vision["patch_size"]) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    whole = LlavaForConditionalGeneration(config)
    whole.save_pretrained(folder / "llava")
    whole.model.vision_tower.save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder / "vision")
    lm = LlamaForCausalLM(text)
    lm.model.load_state_dict(whole.model.language_model.state_dict())
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return tokenizer


class Conversations:
    """Questions of 8 to 24 words and answers of 8 to 48 about pictures of random pixels."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng(index)
        question, answer = (" ".join(random.choice(WORDS, random.integers(8, most + 1))) for most in (24, 48))
        return Sample(str(index), (random.integers(0, 256, (48, 64, 3), dtype=np.uint8),), (Turn(question, answer),))


def vlm(folder: Path, peer: LlavaForConditionalGeneration) -> VLM:
    """vlmlab's composition of the saved towers and the peer's projector."""
    encoder = HfEncoder(str(folder / "vision"), layers=[-1])
    lm = HfLanguageModel(str(folder / "lm"))
    connector = MlpConnector(encoder.width, lm.width)
    connector.layers[0].load_state_dict(peer.model.multi_modal_projector.linear_1.state_dict())
    connector.layers[2].load_state_dict(peer.model.multi_modal_projector.linear_2.state_dict())
    return VLM(encoder, connector, ConcatFusion(), lm, Causal())


def stage(steps: int, batch: int) -> Stage:
    """Full tuning at one rate."""
    return Stage(
        index=0,
        name="tune",
        module="vlmlab.engine.instruction.InstructionTuningModule",
        train={"encoder": RATE, "connector": RATE, "lm": RATE},
        data="conversations",
        objective={"_target_": "vlmlab.objective.lm.LanguageModelling"},
        steps=steps,
        batch_size=batch,
        warmup=0.0,
        schedule="constant",
        betas=BETAS,
        gradient_clip=CLIP,
    )


# -- the peer ----------------------------------------------------------------------------------------------------------


class Peer:
    """transformers' model and the plainest training step around it."""

    def __init__(self, folder: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32).train()
        self.optimizer = AdamW(self.model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What its processor would give for the same samples."""
        pixels = (batch.pixels.float() / 255 - 0.5) / 0.5
        mask = batch.layout.valid.long()
        return {
            "input_ids": batch.input_ids,
            "attention_mask": mask,
            "pixel_values": pixels,
            "labels": batch.labels,
        }

    def backward(self, inputs: dict[str, Tensor]) -> float:
        """The loss; its logits are let go before the backward pass, as transformers' trainer does."""
        loss = self.model(**inputs).loss
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


PARTS = {
    "model.vision_tower.": "encoder.tower.",
    "model.multi_modal_projector.linear_1.": "connector.layers.0.",
    "model.multi_modal_projector.linear_2.": "connector.layers.2.",
    "model.language_model.": "lm.model.model.",
}
"""How names begin in transformers' model and in vlmlab's."""


def off(ours: VLM, peer: LlavaForConditionalGeneration) -> float:
    """Largest difference of any gradient, as a share of that tensor's largest entry.

    Biases of keys have no gradient but rounding: of such tensors it is a share of 1e-3 of the largest of all.
    """
    mine = {name: p.grad for name, p in ours.named_parameters()}
    theirs = {name: p.grad for name, p in peer.named_parameters() if "post_layernorm" not in name}  # read before it
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in theirs.values())
    worst = 0.0
    for name, gradient in theirs.items():
        prefix = next(prefix for prefix in PARTS if name.startswith(prefix))
        found = mine.pop(PARTS[prefix] + name.removeprefix(prefix))
        worst = max(worst, float((found - gradient).abs().max()) / max(float(gradient.abs().max()), least))
    assert not mine, f"the peer has no {', '.join(mine)}"
    return worst


# -- measuring ---------------------------------------------------------------------------------------------------------


class Allocations:
    """The peak of what torch's CPU allocator hands out while this is open, without what is still held at its end."""

    def __enter__(self) -> Allocations:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(None, None, None)
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        self._events = sorted(_allocations(results.experimental_event_tree()))

    def found(self) -> tuple[int, int]:
        """Bytes at the peak, and those held at the end, which are left out of it."""
        held: dict[int, int] = {}  # address -> number of the event that took it
        gone: set[int] = set()
        for number, (_, address, size) in enumerate(self._events):
            if size > 0:
                held[address] = number
            elif address in held:
                gone |= {held.pop(address), number}
        live = peak = 0
        for number in sorted(gone):
            live += self._events[number][2]
            peak = max(peak, live)
        return peak, sum(self._events[number][2] for number in held.values())


def _allocations(nodes: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(time, address, bytes) of every allocation (bytes > 0) and release in a tree of the profiler's events."""
    found, waiting = [], list(nodes)
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if type(node.extra_fields).__name__ == "_ExtraFields_Allocation":
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    return found


def clock() -> NDArray[np.float64]:
    """Seconds on the wall, and of this process's own computing, which neighbours on the machine disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


class Turns(L.Callback):
    """Lets the peer do every step after vlmlab has done it; step 0 is compared, step 1 weighed, all others timed."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.gradients = 0.0
        self.losses: list[tuple[float, float]] = []
        self.weighed: list[Allocations] = []
        self.seconds: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Window, batch_idx: int) -> None:
        self.inputs = self.peer.inputs(batch.batches[0])
        if batch_idx == 1:
            self.weighed.append(Allocations().__enter__())
        self.start = clock()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
        """After the backward pass; module and peer clip later."""
        if module.done == 0:
            self.loss = self.peer.backward(self.inputs)
            self.gradients = off(module.model, self.peer.model)
        elif module.done == 1:
            self.weighed[0].__exit__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Window, batch_idx: int) -> None:
        between = clock()
        if batch_idx == 1:
            with Allocations() as allocations:
                self.loss = self.peer.backward(self.inputs)
            self.weighed.append(allocations)
            self.layout, self.labels = batch.batches[0].layout, batch.batches[0].labels
        elif batch_idx > 1:
            self.loss = self.peer.backward(self.inputs)
        self.peer.update()
        if batch_idx > 1:
            self.seconds.append((between - self.start, clock() - between))
        self.losses.append((module.report.loss, self.loss))


def run(folder: Path, size: Size, batch: int, rounds: int) -> Turns:
    """The stage from its first step to its last, with the peer beside it."""
    write(size, folder)
    peer = Peer(folder)
    staged = StagedModel(vlm(folder, peer.model))
    plan = stage(rounds + 2, batch)
    staged.enter(plan)
    module = InstructionTuningModule(staged.model, plan, staged.objectives, staged.rates)
    cfg = OmegaConf.create({"collate": {"max_length": 1024, "pack_length": None}})
    collate = module.collator(cfg, staged.model, module.prompt)
    samples = Conversations(10_000)
    windows = Windows(samples, collate, Order(len(samples), batch, 0, plan.name), plan.steps)
    turns = Turns(peer)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(module, step_loader(windows))
    return turns


# -- what is printed ---------------------------------------------------------------------------------------------------


def report(turns: Turns) -> list[str]:
    """The comparison, which has to hold, and the ratios."""
    loss = max(abs(ours - theirs) / theirs for ours, theirs in turns.losses)
    assert max(turns.gradients, loss) < 1e-5, f"not the same step: gradients {turns.gradients}, loss {loss}"
    (peak, held), (other, held_too) = (allocations.found() for allocations in turns.weighed)
    assert abs(held - held_too) < 1e6, f"gradients of {held} and {held_too} bytes"
    rows, length = turns.labels.shape
    what = {"visual": turns.layout.visual, "supervised": turns.labels != -100, "padding": ~turns.layout.valid}
    shares = ", ".join(f"{part.float().mean():.0%} {name}" for name, part in what.items())
    count, rounds = sum(p.numel() for p in turns.peer.model.parameters()), len(turns.seconds)
    ours, theirs = (np.median(side, axis=0) for side in zip(*turns.seconds, strict=True))
    ratios = np.array([mine / yours for mine, yours in turns.seconds])  # (rounds, 2)
    lines = [
        f"{count / 1e6:.1f}M parameters, {turns.peer.model.config.text_config.vocab_size} words; "
        f"the batch weighed: {rows} rows of {length}, {shares}",
        f"the same step: gradients within {turns.gradients:.1e} of each tensor's largest, losses within {loss:.1e}",
        f"memory: vlmlab {peak / 2**20:.0f} MiB, transformers {other / 2**20:.0f} MiB, ratio {peak / other:.3f}",
    ]
    for column, name in enumerate(("time", "CPU time")):
        low, middle, high = np.quantile(ratios[:, column], [0.25, 0.5, 0.75])
        lines.append(
            f"{name}: vlmlab {ours[column]:.3g} s, transformers {theirs[column]:.3g} s, ratio {middle:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}, {rounds} rounds)"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="93M")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        turns = run(Path(folder), SIZES[given.size], given.batch, given.rounds)
    print(*report(turns), sep="\n")


if __name__ == "__main__":
    main()
