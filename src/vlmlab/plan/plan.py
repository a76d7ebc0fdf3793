"""What a recipe needs before it runs: parameters, tokens, FLOPs, memory and hours of every stage, without a weight.

The model is built on the meta device, and ``plan.simulation`` sends micro-batches of the stage's lengths through it:
rows of mean samples for the FLOPs, one row and three rows of the longest samples for the activations, which grow
linearly with the micro-batch. The peak of a stage is weights + gradients + optimizer state (+ DDP's buckets) + the
larger of activations and the optimizer's temporaries. With one micro-batch a step, gradients are not there yet at the
peak of the activations, so that the plan is somewhat too large; with accumulation they are. Under fsdp2 a device has
its shares of the towers, and whole for a while: what is outside their layers, and two layers with one's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, SampleSource, Turn
from vlmlab.contracts.tensors import Batch
from vlmlab.data.chat import ANSWER, IGNORE, PICTURE, USER, ChatEncoder, Encoded
from vlmlab.data.collate import Collator
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.scratch import ScratchEncoder
from vlmlab.encoder.text import TransformersTextTower
from vlmlab.encoder.tower import TowerEncoder
from vlmlab.engine.optim import hidden_matrices
from vlmlab.engine.restore import module_class
from vlmlab.engine.shards import replicated, units
from vlmlab.engine.weights import StagedModel
from vlmlab.lm.causal import CausalLanguageModel
from vlmlab.lm.scratch import ScratchLanguageModel
from vlmlab.model.questions import read_questions
from vlmlab.plan.devices import Device
from vlmlab.plan.op_cache import OpCache
from vlmlab.plan.simulation import Pass, Simulator
from vlmlab.recipe.stage import Stage, parse


@dataclass(frozen=True)
class Shape:
    """A sample as far as its cost goes: images, text tokens before its answer, and tokens of its answer."""

    images: int
    asked: int
    answered: int


@dataclass(frozen=True)
class PlanCache:
    """What earlier stages of a plan have found out.

    Attributes:
        passes: stages that train the same on samples of the same shape go through the model once.
        op_cache: what operations give.
    """

    passes: dict[Any, Pass] = field(default_factory=dict)
    op_cache: OpCache = field(default_factory=lambda: OpCache(FakeTensorMode(allow_non_fake_inputs=True)))


@dataclass(frozen=True)
class StagePlan:
    """One stage; bytes and FLOPs are of one device, counts of samples over all.

    Attributes:
        name: of the stage.
        parameters: part -> (all, trained).
        visual_tokens: of one image in the LM's sequence.
        length, longest: tokens of a sample, mean and longest; `supervised` of them are learnt on average.
        measured: where the lengths come from.
        own_tokenizer: whether they are in tokens of the LM; otherwise the embedded LM's tokenizer stood in for its own.
        forward, training: FLOPs of a sample of mean length.
        weights, gradients, optimizer, buckets, temporaries: bytes.
        micro_batch: samples of the recipe's micro-batch on one device, and activations its bytes of longest samples.
        activations_base, activations_sample: bytes for m longest samples are about base + m x sample.
        peak: bytes of all.
        fits: largest micro-batch that fits the device, 0 for none; accumulate: what the recipe then needs.
        samples, steps, hours: of the stage.
        file, checkpoint: bytes of model.safetensors after it and of last.ckpt in it.
        apart: why each question is a row of its own though the key does not ask for that; empty where that is not so.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    visual_tokens: int
    length: float
    longest: int
    supervised: float
    measured: str
    own_tokenizer: bool
    forward: float
    training: float
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    temporaries: int
    micro_batch: int
    activations: int
    activations_base: int
    activations_sample: int
    peak: int
    fits: int
    accumulate: int
    samples: int
    steps: int
    hours: float
    file: int
    checkpoint: int
    apart: str = ""

    def peak_of(self, micro_batch: int) -> int:
        """Bytes with another micro-batch."""
        held = self.weights + self.gradients + self.optimizer + self.buckets
        return held + max(self.activations_base + self.activations_sample * micro_batch, self.temporaries)


@dataclass(frozen=True)
class Settings:
    """What a plan is made for; see ``conf/plan.yaml``. `sharded`: ``trainer.strategy=fsdp2``."""

    device: Device
    devices: int = 1
    sharded: bool = False
    mfu: float = 0.4
    headroom: float = 0.08
    sample: int = 64
    lengths: Mapping[str, Sequence[int]] | None = None
    samples: Mapping[str, int] | None = None


def plan(
    cfg: DictConfig,
    settings: Settings,
    only: Collection[str] | None = None,
    told: Callable[[str], object] = lambda text: None,
) -> list[StagePlan]:
    """The plan of every stage that trains something, or of `only` these; `told` is called before each of them.

    Raises:
        UserError: the composition cannot be built, its data cannot be read, or it decides on values that are not there.
    """
    staged_models: dict[Any, StagedModel] = {}
    known = PlanCache()
    found = []
    stages = list(parse(cfg))
    for place, stage in enumerate(stages, 1):
        kind = module_class(stage)
        if len(stages) > 1:
            told(f"stage {place} of {len(stages)}: {stage.name}")
        with torch.device("meta"):
            if kind.build not in staged_models:
                staged_models[kind.build] = StagedModel(_as_if_loaded(kind.build(cfg)))
            staged_models[kind.build].enter(stage)
        if staged_models[kind.build].trained() and stage.steps and (only is None or stage.name in only):
            found.append(_stage(cfg, stage, staged_models[kind.build], settings, known))
    return found


def _as_if_loaded(model: nn.Module) -> nn.Module:
    """Marks the towers that a run would load, so that its files are taken to leave their frozen weights out."""
    towers: list[Any] = [getattr(model, part, None) for part in ("encoder", "lm", "text")]
    for tower in towers:
        loaded = isinstance(tower, (TowerEncoder, CausalLanguageModel, MultiEncoder, TransformersTextTower))
        if loaded and not isinstance(tower, (ScratchEncoder, ScratchLanguageModel)):
            tower.source = "planned"
    return model


def _stage(cfg: DictConfig, stage: Stage, staged: StagedModel, settings: Settings, known: PlanCache) -> StagePlan:
    kind, model = module_class(stage), cast(Any, staged.model)
    collate = kind.collator(cfg, model, stage.prompt or kind.prompt)
    if not isinstance(collate, Collator):
        raise UserError(f"{stage.key('module')}={stage.module} reads no prompts: there is no length to plan by.")
    shapes, each, measured = _shapes(cfg, stage, collate, settings)
    half = half_precision(cfg, settings.device)
    static = _static(staged, stage, settings, half)
    cost = _cost(stage, staged, collate, shapes, half, known).times(each)
    micro = max(1, stage.batch_size // (stage.accumulate * settings.devices))
    if settings.sharded and half:
        cost = replace(cost, base=max(0.0, cost.base - _copies(staged)))
    held = sum(static[name] for name in ("weights", "gradients", "optimizer", "buckets"))
    activations = int(cost.base + cost.slope * micro)
    room = settings.device.memory * (1 - settings.headroom) - held
    fits = max(0, int((room - cost.base) // cost.slope)) if room > static["temporaries"] else 0
    steps = stage.steps
    if settings.samples and stage.name in settings.samples:
        steps = math.ceil(settings.samples[stage.name] / stage.batch_size)
    samples = steps * stage.batch_size
    speed = settings.devices * settings.mfu * (settings.device.flops if half else settings.device.flops_fp32)
    lengths = [_length(shape, collate) for shape in shapes]
    return StagePlan(
        name=stage.name,
        apart=_apart(cfg, model, stage.prompt or kind.prompt),
        parameters=_parameters(staged),
        visual_tokens=model.tokens_per_image,
        length=fmean(lengths),
        longest=max(lengths),
        supervised=fmean(s.answered for s in shapes),
        measured=measured,
        own_tokenizer=stage.name in (settings.lengths or ()) or getattr(model.lm, "own_tokenizer", True),
        forward=cost.forward,
        training=cost.training,
        **static,
        micro_batch=micro,
        activations=activations,
        activations_base=int(cost.base),
        activations_sample=int(cost.slope),
        peak=held + max(activations, static["temporaries"]),
        fits=fits,
        accumulate=_accumulate(stage, settings.devices, fits),
        samples=samples,
        steps=steps,
        hours=samples * cost.training / speed / 3600,
        file=_bytes(staged.kept().values()),
        checkpoint=static["optimizer"] + _bytes(staged.live().values()),
    )


@dataclass(frozen=True)
class Cost:
    """FLOPs of a mean sample, and bytes of activations: about base + slope x longest samples of a micro-batch."""

    forward: float
    training: float
    base: float
    slope: float

    def times(self, each: float) -> Cost:
        """The same where a sample of the data is so many of those measured."""
        return replace(self, forward=each * self.forward, training=each * self.training, slope=each * self.slope)


def _cost(
    stage: Stage, staged: StagedModel, collate: Collator, shapes: Sequence[Shape], half: bool, known: PlanCache
) -> Cost:
    """Passes of a row of mean samples, and of one row and of three rows of longest ones; a packed row is about full."""
    what = str((sorted(staged.trained()), stage.mask, stage.objective, stage.adapter, collate.prompt_tokens))
    simulate = Simulator(staged, half, known.op_cache)

    def run(shape: Shape, count: int) -> Pass:
        key = (staged, what, shape, count)
        if key not in known.passes:
            known.passes[key] = simulate(shaped_batch(collate, [shape] * count))
        return known.passes[key]

    mean, longest = _mean(shapes), max(shapes, key=lambda s: _length(s, collate))
    alone, row = (_per_row(shape, collate) for shape in (mean, longest))
    one = run(mean, alone)
    few, more = run(longest, row).peak, run(longest, 3 * row).peak
    slope = (more - few) / (2 * row)
    return Cost(one.forward / alone, one.total / alone, max(0.0, few - slope * row), slope)


def _per_row(shape: Shape, collate: Collator) -> int:
    """Samples of one shape in a row."""
    return 1 if collate.pack_length is None else max(1, collate.pack_length // max(1, _length(shape, collate)))


def _apart(cfg: DictConfig, model: Any, prompt: Any) -> str:
    questions, why = read_questions(cfg, model, prompt)
    return why if questions == "rows" else ""


def _parameters(staged: StagedModel) -> dict[str, tuple[int, int]]:
    """Part -> all weights, and those that train."""
    parts: Mapping[str, list[tuple[str, nn.Parameter]]] = staged.model.parts()  # type: ignore[operator]
    trained = staged.trained()
    return {
        part: (sum(p.numel() for _, p in named), sum(p.numel() for name, p in named if name in trained))
        for part, named in parts.items()
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _accumulate(stage: Stage, devices: int, fits: int) -> int:
    """The fewest micro-batches a step that fit; 0 where not even single samples do."""
    shares = [k for k in range(1, stage.batch_size + 1) if stage.batch_size % (k * devices) == 0]
    return next((k for k in shares if stage.batch_size // (k * devices) <= fits), 0)


def half_precision(cfg: DictConfig, device: Device | None = None) -> bool:
    """Whether a run computes in 16 bit: ``precision=auto`` does on a GPU, which None means, too."""
    name = str(cfg.precision.name)
    return (device is None or device.half) if name == "auto" else name != "fp32"


def _static(staged: StagedModel, stage: Stage, settings: Settings, half: bool) -> dict[str, int]:
    """Bytes that are there all the time: weights and buffers, gradients, optimizer state, DDP's buckets."""
    model = staged.model
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    trained = list(staged.trained().values())
    hidden = hidden_matrices(model) if stage.optimizer == "muon" else set()
    if settings.sharded:
        moments = {id(p): 4 if id(p) in hidden else 8 for p in trained}
        return _shared(model, list(tensors.values()), moments, settings.devices, half)
    numbers = sum(p.numel() for p in trained)
    return {
        "weights": _bytes(tensors.values()),
        "gradients": 4 * numbers,
        # AdamW keeps two moments, Muon one
        "optimizer": sum(p.numel() * (4 if id(p) in hidden else 8) for p in trained),
        "buckets": 4 * numbers if settings.devices > 1 else 0,
        # AdamW on all tensors of a group at once computes one new tensor each; 16-bit copies live until the step ends
        "temporaries": (6 if half else 4) * numbers,
    }


def _shared(model: Any, tensors: list[Tensor], moments: dict[int, int], ranks: int, half: bool) -> dict[str, int]:
    """The same of one of several ranks under fsdp2: its shares, and what is whole while it computes.

    `moments`: bytes of the optimizer's state for each number of a trained tensor, by the tensor's identity.
    """
    alone = {id(t) for t in replicated(model)} | {id(b) for b in model.buffers()}
    inside = [[p for p in unit.parameters() if id(p) not in alone] for unit in units(model)]
    largest = max(inside, key=_bytes, default=[])
    in_units = {id(p) for unit in inside for p in unit}
    outside = [t for t in tensors if id(t) not in alone and id(t) not in in_units]
    trained = [t for t in tensors if id(t) in moments]

    def share(found: Iterable[Tensor], each: Callable[[Tensor], int]) -> int:
        sizes = ((t.numel() * each(t), id(t) in alone) for t in found)
        return int(sum(size if whole else size / ranks for size, whole in sizes))

    def computed(found: Iterable[Tensor]) -> int:
        return sum(t.numel() * (2 if half else t.element_size()) for t in found)

    return {
        # the next unit's weights come beforehand
        "weights": share(tensors, Tensor.element_size) + computed(outside) + 2 * computed(largest),
        "gradients": share(trained, lambda t: 4) + computed(t for t in (*outside, *largest) if id(t) in moments),
        "optimizer": share(trained, lambda t: moments[id(t)]),
        "buckets": 4 * sum(t.numel() for t in trained if id(t) in alone),
        "temporaries": share(trained, lambda t: 6 if half else 4),
    }


def _copies(staged: StagedModel) -> int:
    """Bytes of the 16-bit copies of matrices in layers and blocks, which autocast keeps and fsdp2 does not make."""
    alone, trained = {id(p) for p in replicated(staged.model)}, staged.trained().values()
    inside = {id(p) for unit in units(staged.model) for p in unit.parameters()} - alone
    return sum(2 * p.numel() for p in trained if p.ndim > 1 and id(p) in inside)


# -- lengths ---------------------------------------------------------------------------------------------------------


def _shapes(cfg: DictConfig, stage: Stage, collate: Collator, settings: Settings) -> tuple[list[Shape], float, str]:
    """Shapes of the stage's samples: as stated, or measured on some of them spread over the data.

    A sample may be several, one a question; how many it is on average is given beside them.
    """
    if settings.lengths and stage.name in settings.lengths:
        asked, answered = settings.lengths[stage.name]
        return [Shape(1, int(asked), int(answered))], 1.0, "stated"
    source: SampleSource = instantiate(cfg.data.train[stage.data])
    size = len(source)
    if not size:
        raise UserError(f"{stage.key('data')}={stage.data} has no samples; check data.train.{stage.data}.")
    count = min(settings.sample, size)
    shapes = []
    for k in range(count):
        sample = source[k * size // count]
        images = len(sample.images) if collate.resize is not None else 0
        for encoded in collate.encode(sample):
            learnt = sum(label != IGNORE for label in encoded.labels)
            visual = sum(image >= 0 for image in encoded.image)
            prompts = collate.prompt_tokens
            shapes.append(Shape(images, len(encoded.ids) - visual - learnt - prompts, learnt))
    return shapes, len(shapes) / count, f"{count} of {size:,} samples of data.train.{stage.data}"


def _mean(shapes: Sequence[Shape]) -> Shape:
    """The sample of mean length; its share of text-only samples is rounded to one image or none."""
    values = [round(fmean(getattr(s, name) for s in shapes)) for name in ("images", "asked", "answered")]
    return Shape(values[0], values[1], max(1, values[2]))


def _length(shape: Shape, collate: Collator) -> int:
    """Tokens of a sample in the LM's sequence."""
    visual = shape.images * collate.encoder.tokens_of(PICTURE)
    return visual + shape.asked + shape.answered + collate.prompt_tokens


class _StatedShapes:
    """Used in the place of a ``ChatEncoder``: gives samples of stated shapes: images, user, answer."""

    def __init__(self, encoder: ChatEncoder, shapes: Sequence[Shape]) -> None:
        self.encoder, self.shapes = encoder, shapes

    def train(self, sample: Sample) -> Encoded:
        shape, per = self.shapes[int(sample.id)], self.encoder.tokens_of(PICTURE)
        word = next(t for t in range(self.encoder.image_id + 2) if t != self.encoder.image_id)
        image = [k for k in range(shape.images) for _ in range(per)]
        text = shape.asked + shape.answered
        first = 0 if image or shape.asked else 1  # nothing predicts the first token
        return Encoded(
            ids=[self.encoder.image_id] * len(image) + [word] * text,
            labels=[IGNORE] * (len(image) + shape.asked + first) + [word] * (shape.answered - first),
            roles=[USER] * (len(image) + shape.asked) + [ANSWER] * shape.answered,
            image=image + [-1] * text,
            places=[k * per for k in range(shape.images)],
            turns=[0] * shape.images,
        )


def shaped_batch(collate: Collator, shapes: Sequence[Shape]) -> Batch:
    """A micro-batch of these shapes, from the collator itself."""
    stated: Any = _StatedShapes(collate.encoder, shapes)
    grey = np.zeros((8, 8, 3), np.uint8)
    samples = [Sample(str(k), (grey,) * shape.images, (Turn("", ""),)) for k, shape in enumerate(shapes)]
    return replace(collate, encoder=stated)(samples)


def as_json(plans: Sequence[StagePlan], settings: Settings) -> dict[str, Any]:
    """Everything as plain values."""
    return {"settings": asdict(settings), "stages": [asdict(stage) for stage in plans]}
