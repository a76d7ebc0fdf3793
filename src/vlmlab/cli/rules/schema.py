"""Every key that a run has outside its plug-ins, with its type and range.

This is the one place to add such a key: a line in its section here, and one with a comment in ``conf/``. What stands
under a ``_target_`` is not here: its keys are the arguments of that class, with the types of its annotations. The keys
of a stage are the fields of ``vlmlab.recipe.stage.Stage``. A key in ``NotRequired`` may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from annotated_types import Interval, MinLen

from vlmlab.contracts.values import (
    Count,
    Names,
    Natural,
    NotNegative,
    Part,
    Positive,
    Seed,
    Share,
    Size,
    Text,
    Texts,
    Width,
)

Threads = Annotated[int, Interval(ge=1, le=4096)]
Workers = Annotated[int, Interval(ge=0, le=4096)]
Devices = Literal["auto", -1] | Annotated[int, Interval(ge=1, le=4096)]
Port = Annotated[int, Interval(ge=0, le=65535)]
Accelerator = Literal["auto", "cpu", "gpu", "cuda"]
Strategy = Literal["auto", "ddp", "ddp_fork", "ddp_spawn", "ddp_find_unused_parameters_true", "fsdp2"]
Precisions = Literal["auto", "fp32", "bf16", "fp16"]
Loggers = Literal["jsonl", "none", "wandb", "tensorboard", "csv", "mlflow", "own"]
Baselines = Sequence[Literal["shuffled", "no_image"]]
Questions = Literal["conversation", "rows", "tree", "whole"]
ControlTokens = Literal["refuse", "text"]
Forms = Literal["auto", "hf", "run", "parts"]


# What is described by a `_target_`, by the name of its contract.
Adapter = Annotated[Mapping[str, Any], Part("Adapter")]
Callback = Annotated[Mapping[str, Any], Part("Callback")]
Connector = Annotated[Mapping[str, Any], Part("Connector")]
Encoder = Annotated[Mapping[str, Any], Part("Encoder")]
FeatureCache = Annotated[Mapping[str, Any], Part("FeatureCache")]
Finish = Annotated[Mapping[str, Any], Part("Finish")]
Fusion = Annotated[Mapping[str, Any], Part("Fusion")]
CausalLanguageModel = Annotated[Mapping[str, Any], Part("CausalLanguageModel")]
LightningLogger = Annotated[Mapping[str, Any], Part("LightningLogger")]
Mask = Annotated[Mapping[str, Any], Part("Mask")]
Metric = Annotated[Mapping[str, Any], Part("Metric")]
Objective = Annotated[Mapping[str, Any], Part("Objective")]
PairHead = Annotated[Mapping[str, Any], Part("PairHead")]
SampleSource = Annotated[Mapping[str, Any], Part("SampleSource")]
TextTower = Annotated[Mapping[str, Any], Part("TextTower")]


class Collate(TypedDict):
    """How samples become rows of tokens."""

    max_length: Count
    pack_length: Count | None
    questions: NotRequired[Questions]
    control_tokens: NotRequired[ControlTokens]


class Evaluation(TypedDict):
    """How a trained model is scored."""

    batch_size: Count
    share_images: NotRequired[bool]
    baselines: Baselines
    probe: NotRequired[Literal["auto"] | bool]
    lookup_samples: NotRequired[Count | None]
    held_out: Texts
    held_out_samples: Count
    every: NotRequired[Count | None]
    watched: NotRequired[Texts | None]
    slices: NotRequired[Texts | None]
    slice_samples: NotRequired[Count]
    max_share: NotRequired[Share | None]
    monitor: NotRequired[Text]
    mode: NotRequired[Literal["min", "max"]]
    save_best: NotRequired[bool]
    load_best: NotRequired[bool]
    patience: NotRequired[Count | None]
    min_delta: NotRequired[NotNegative]


class Precision(TypedDict):
    """What training computes in."""

    name: Precisions


class Trainer(TypedDict):
    """How a run executes."""

    accelerator: Accelerator
    devices: Devices
    nodes: NotRequired[Count]
    strategy: Strategy
    compile: NotRequired[bool]
    threads: Threads
    workers: Workers
    gradient_clip: Positive | None
    save_every_s: NotNegative
    progress: NotRequired[Literal["auto"] | bool]
    log_every: NotRequired[Count]


class Logger(TypedDict):
    """Where a run is logged beside its folder: ``make`` is any Lightning logger, the other keys are W&B's."""

    name: Loggers
    project: NotRequired[Text]
    entity: NotRequired[Text | None]
    tags: NotRequired[Texts]
    mode: NotRequired[Literal["auto", "online", "offline"]]
    group: NotRequired[Text | None]
    job_type: NotRequired[Text]
    x_axis: NotRequired[Literal["step", "samples"]]
    samples: NotRequired[Natural]
    make: NotRequired[LightningLogger]


class Budget(TypedDict):
    """How much of the recipe is run."""

    steps_scale: Positive
    max_steps: Count | None
    eval_limit: Count | None


class Debug(TypedDict):
    """Less than a run."""

    steps: Count | None
    overfit: Natural
    profile: bool


class Benchmark(TypedDict):
    """Questions, and what scores the answers."""

    source: SampleSource
    metrics: Annotated[Sequence[Metric], MinLen(1)]
    max_new_tokens: Count
    scoring: NotRequired[Literal["generate", "likelihood"]]


PairBenchmark = Annotated[Mapping[str, Any], Part("PairBenchmark")]


class Data(TypedDict):
    """Sources by name; further keys are what a data file's own sources refer to."""

    train: Annotated[Mapping[str, SampleSource | None], MinLen(1)]
    val: NotRequired[Mapping[str, SampleSource]]
    benchmarks: NotRequired[Mapping[str, Benchmark]]
    pairs: NotRequired[Mapping[str, PairBenchmark]]
    probe: NotRequired[SampleSource | None]
    captions: NotRequired[Literal["world"] | None]
    max_bad_fraction: NotRequired[Share]
    screen: NotRequired[Natural]


class Recipe(TypedDict):
    """Stages in order."""

    stages: Annotated[Mapping[str, Mapping[str, Any]], MinLen(1)]
    finish: NotRequired[Finish | None]


class DualEncoder(TypedDict, total=False):
    """What stages of ``PairModule`` and ``ContrastiveModule`` compare by; null is for the first alone."""

    width: Width | None
    parallel: bool
    scale: Positive
    bias: float | None
    head: PairHead | None


class Preset(TypedDict):
    """A preset sets keys of the other groups; its own say in words where it is not what its paper describes."""

    deviates: NotRequired[Texts]


class Root(TypedDict):
    """The top of a run's configuration."""

    name: Text | Count | None
    seed: Seed
    init_from: NotRequired[Text | None]
    share_stages: NotRequired[Text | Literal[False] | None]
    fresh: bool
    collate: Collate
    evaluation: Evaluation
    encoder: Encoder
    cache: NotRequired[FeatureCache]
    connector: Connector
    lm: CausalLanguageModel
    mask: Mask
    fusion: Fusion
    adapter: Adapter
    objective: Objective | Mapping[str, Objective | None]
    precision: Precision
    data: Data
    recipe: Recipe
    trainer: Trainer
    logger: Logger
    callbacks: NotRequired[Mapping[str, Callback | None]]
    budget: Budget
    debug: Debug
    preset: NotRequired[Preset | None]
    dual_encoder: NotRequired[DualEncoder]
    text_tower: NotRequired[TextTower | None]


# What commands have beside a run's configuration: `conf/<command>.yaml`.


class Inspect(TypedDict):
    """Keys of ``vlmlab inspect``."""

    stage: Text | None
    n: Count
    check: Natural
    out: Text


class Plan(TypedDict):
    """Keys of ``vlmlab plan``; the stages' own are looked at where the stages are known."""

    device: Text
    memory: Positive | None
    tflops: Positive | None
    mfu: Annotated[float, Interval(gt=0, le=1)]
    headroom: Share
    sample: Count
    lengths: Mapping[str, Sequence[Natural]]
    samples: Mapping[str, Count]
    out: Text | None
    effect: Positive | None
    power: Annotated[float, Interval(gt=0, lt=1)]
    pilot: Text | None
    metric: Text | None


class Look(TypedDict):
    """Keys of ``vlmlab sweep show``, ``table`` and ``report``."""

    folder: Text | Count
    form: Literal["text", "csv", "markdown"]
    metric: Text | None
    cost: Text | None
    cells: Sequence[Text] | None
    trust: bool


class Cost(TypedDict):
    """Keys of ``vlmlab cost``."""

    images: Annotated[int, Interval(ge=0, le=1024)]
    tokens: Count
    answer: Count
    out: Text | None


class Evaluate(TypedDict):
    """Keys of ``vlmlab evaluate``."""

    run: Text | Count
    benchmarks: Names | Text | None
    limit: Count | None
    batch_size: Count | None
    share_images: bool | None
    device: Text
    trust: bool


class Answering(TypedDict):
    """Keys that ``vlmlab generate``, ``chat`` and ``demo`` share."""

    system: str
    max_new_tokens: Count
    do_sample: bool
    temperature: Positive | None
    top_p: Share | None
    top_k: Count | None
    num_beams: Count | None
    seed: Seed
    device: Text
    trust: bool


class Sampling(Answering):
    """Keys that ``vlmlab generate`` and ``vlmlab chat`` share."""

    run: Text | Count
    image: Text | Count | list[Text | Count] | None


class Generate(Sampling):
    """Keys of ``vlmlab generate``."""

    question: Text | Count
    probabilities: bool


class Demo(Answering):
    """Keys of ``vlmlab demo``."""

    run: Text | Count | list[Text | Count]
    samples: Natural
    host: Text
    port: Port


class Curate(TypedDict):
    """Keys of ``vlmlab curate``."""

    run: Text | Count
    source: Text
    n: Count
    against: Annotated[int, Interval(ge=1, le=100)]
    write: bool
    least: float
    out: Text
    device: Text
    trust: bool


class Score(TypedDict):
    """Keys of ``vlmlab score``."""

    run: Text | Count
    benchmarks: Names | None
    metrics: Names | None
    trust: bool


class Compare(TypedDict):
    """Keys of ``vlmlab compare``."""

    folder: Text | Count
    baseline: Text | Count
    metric: Text | None
    until: Text | None
    out: Text | Count | None


class Wandb(TypedDict):
    """Keys of ``vlmlab wandb``."""

    folder: Text | Count
    project: Text
    entity: Text | None
    mode: Literal["auto", "online", "offline"]


class Export(TypedDict):
    """Keys of ``vlmlab export``."""

    run: Text | Count
    to: Text | Count
    form: Forms
    hub: Text | None
    trust: bool


class Import(TypedDict):
    """Keys of ``vlmlab import``."""

    path: Text | None
    to: Text | Count | None
    chat_template: Text | None
    image_size: Size | None
