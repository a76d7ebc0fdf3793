"""The composition root, read from top to bottom: build the model, go through the stages, evaluate, write the result."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlmlab.contracts.errors import CheckpointError, OutOfMemory, Unscored, UserError, listed, reason
from vlmlab.contracts.faults import no_memory
from vlmlab.contracts.parts import FeatureCache
from vlmlab.contracts.sample import SampleSource
from vlmlab.contracts.terminal import tell
from vlmlab.data.module import Window, Windows, step_loader
from vlmlab.data.sampler import Order, block_of
from vlmlab.data.skipped import Replaced
from vlmlab.engine import cost, proof
from vlmlab.engine.begin import begin_with, fits_as_built, holds, take_encoder
from vlmlab.engine.finite import nonfinite
from vlmlab.engine.inference import answer_cost
from vlmlab.engine.layers import check_layers, compiled
from vlmlab.engine.precision import Precision, choose, on_gpu
from vlmlab.engine.restore import Builder, enter, module_class, new_staged_model, weights_file
from vlmlab.engine.shards import FSDP2, gathered
from vlmlab.engine.stage import NonFinite, StageModule
from vlmlab.engine.stamp import Stamp, stamps
from vlmlab.engine.weights import (
    StagedModel,
    build_mask,
    build_objectives,
    check_adapter,
    check_fusion_learns,
    check_paths,
    mixed_in,
    plain_key,
)
from vlmlab.model.build import build_cache
from vlmlab.model.pair import PairedTowers
from vlmlab.model.questions import questions_line, read_questions
from vlmlab.model.vlm import VLM
from vlmlab.recipe.preset import deviations
from vlmlab.recipe.stage import Stage, check_divides, drawn_from, parse
from vlmlab.runs.files import write_atomic, write_json
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.origin import KEY, drop_origin, kept_origin, take_origin
from vlmlab.train.checkpoint import StageCheckpoint
from vlmlab.train.loggers import ExtraLoggers
from vlmlab.train.ranks import Ranks
from vlmlab.train.record import LOG_EVERY, Progress, Recorder, RunLogger, stage_table
from vlmlab.train.resume import load_last
from vlmlab.train.sharing import Sharing
from vlmlab.train.signals import Interrupted, Signals
from vlmlab.train.skips import Skips
from vlmlab.train.start_checks import TokenVariance, check_prompts
from vlmlab.train.user_callbacks import callbacks_of, guarded
from vlmlab.train.validation import Validation
from vlmlab.train.validation_setup import check_best, load_best, validation_of

Evaluate = Callable[[nn.Module, DictConfig, Path], dict[str, Any]]


def train(cfg: DictConfig, folder: Path, evaluate: Evaluate | None = None) -> dict[str, Any] | None:
    """Train, go on with, or only evaluate what is left of a run.

    Args:
        cfg: the composed configuration.
        folder: the run folder, opened and locked by the caller on rank 0.
        evaluate: ``(model, cfg, folder) -> metrics``; the benchmarks of ``vlmlab.evaluate`` if None.

    Returns:
        The result written to ``result.json``; None for ``debug.steps`` and on ranks other than 0.

    Raises:
        UserError: a mistake in configuration or data, a loss that is not finite, or a proof that failed.
        Unscored: it is trained and some benchmarks could not be scored; ``result.json`` has the other scores.
        Interrupted: a signal that ends runs (``vlmlab.contracts.stops``); everything learnt is saved.
    """
    run = Run(cfg, RunFolder(Path(folder)), evaluate or _benchmarks)
    with run.signals:
        try:
            return _train(run)
        except Interrupted:
            run.note_state()
            if not run.writes:
                raise SystemExit(0) from None  # a rank that fails would take rank 0 down before it has written
            raise
        except Exception:
            run.note_state()
            raise
        finally:
            run.ranks.close()
            run.close_loggers()


@dataclass
class Run:
    """What all stages of a run share.

    Attributes:
        cfg: the configuration.
        folder: the run folder.
        evaluate: what scores the trained model.
        signals: whether one came that ends runs.
        staged_models: the model of every builder, made when its first stage comes.
        finished: the last finished stage of a model, whose file is still to be loaded.
        stage: the present stage.
        step: optimizer steps done in it.
        steps_before: optimizer steps of the stages before.
    """

    cfg: DictConfig
    folder: RunFolder
    evaluate: Evaluate
    signals: Signals = field(default_factory=Signals)
    staged_models: dict[Builder, StagedModel] = field(default_factory=dict)
    finished: dict[Builder, Stage] = field(default_factory=dict)
    stage: Stage | None = None
    step: int = 0
    steps_before: int = 0

    @cached_property
    def precision(self) -> Precision:
        """What it computes in."""
        return choose(str(self.cfg.precision.name), on_gpu(self.cfg))

    @cached_property
    def cache(self) -> FeatureCache:
        """The cache in front of an encoder that is frozen."""
        return build_cache(self.cfg)

    @cached_property
    def sharing(self) -> Sharing:
        """Which stages it has in common with other runs."""
        return Sharing(self.cfg, self.folder, self.say)

    @cached_property
    def ranks(self) -> Ranks:
        """The further ranks that this process starts."""
        return Ranks(self.folder)

    @property
    def shards(self) -> bool:
        """Whether the ranks share the towers' weights among them while they train."""
        return bool(self.cfg.trainer.strategy == FSDP2)

    @property
    def writes(self) -> bool:
        """Whether this process is rank 0, the only one that writes."""
        return getattr(rank_zero_only, "rank", 0) == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.writes:
            tell(text)

    def note_state(self) -> None:
        """Note how far the run is, if the disk takes it; the code that opened the folder adds how it ended."""
        if self.writes and self.stage is not None:
            with contextlib.suppress(OSError):
                self.folder.write_state("running", self.stage.name, self.step, self.stage.steps)

    @cached_property
    def loggers(self) -> ExtraLoggers:
        """The loggers beside the run folder."""
        return ExtraLoggers(self.cfg, self.folder, self.writes)

    @cached_property
    def logger(self) -> RunLogger:
        """Lightning's way to ``metrics.jsonl``."""
        return RunLogger(self.folder)

    def record(self, row: Mapping[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``, and tell it to the loggers beside."""
        self.folder.log(row)
        self.loggers.log([row])

    def close_loggers(self) -> None:
        """Finish the loggers, with what is on its way out as the reason."""
        if "loggers" in self.__dict__:
            self.loggers.close(_exit_code(sys.exception()))

    @cached_property
    def stamps(self) -> dict[str, Stamp]:
        """What says of a file that it is of a stage of this run, by the stage's name."""
        return stamps(self.cfg, parse(self.cfg), self.folder, self.writes)

    def load(self, build: Builder) -> None:
        """Load the weights of the stages before, all of which the last finished one has."""
        stage = self.finished.pop(build)
        self.staged_models[build].load(self.weights(stage), self.stamps[stage.name])

    def weights(self, stage: Stage) -> Path:
        """Where a finished stage's weights are."""
        return weights_file(self.folder.path, stage)


def _exit_code(error: BaseException | None) -> int:
    """What the process will end with after this."""
    if error is None:
        return 0
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) else 1


def _train(run: Run) -> dict[str, Any] | None:
    cfg = run.cfg
    torch.set_num_threads(int(cfg.trainer.get("threads", 1)))
    stages = parse(cfg)
    kinds = {stage.index: module_class(stage) for stage in stages}
    _prepare(run, stages, kinds)
    ready = True
    origin = _origin(run, stages[0])
    for stage in stages:
        run.stage, run.step = stage, 0
        build: Builder = kinds[stage.index].build
        same = [other for other in stages if kinds[other.index].build is build]
        _check_model(run, build, stage, same, origin)
        ready = ready and run.weights(stage).is_file()
        if not ready and build in run.finished:  # weights of the stages before, under their own adapters' names
            run.load(build)
        if not ready and stage.encoder_from is not None:
            _take_encoder(run, build, stage, stages)
        _enter(run, build, stage, origin if not ready and stage is stages[0] else None)
        if ready:
            run.say(f"\nstage {stage.index + 1} of {len(stages)}: {stage.name} is finished already")
            _drop_begun(run, stage)
            run.finished[build] = stage
        else:
            run.say(f"\nstage {stage.index + 1} of {len(stages)}: {stage.name}")
            _have_stage(run, stage, kinds[stage.index])
            run.signals.check()
        run.steps_before += stage.steps
    if not run.writes:
        return None
    for build in list(run.finished):
        run.load(build)
    if not any(staged.ever_trained() for staged in run.staged_models.values()):
        raise UserError("recipe.stages trains nothing: no part named in train has weights in this composition.")
    if OmegaConf.select(cfg, "debug.steps") is not None:
        run.folder.write_state("done", stages[-1].name, stages[-1].steps, stages[-1].steps)
        run.say("debug.steps is set: the run ends here and is not evaluated")
        return None
    return _finish(run, stages, kinds)


def _prepare(run: Run, stages: Sequence[Stage], kinds: Mapping[int, type[StageModule]]) -> None:
    """What can be wrong without a model, the loggers, and the lines printed before the first stage."""
    cfg = run.cfg
    for stage in stages:
        build_objectives(stage)  # all mistakes come before the first step
        build_mask(stage)
        if not run.weights(stage).is_file():
            mixed_in(stage, cfg)
    callbacks_of(cfg)
    assert run.precision and run.stamps and run.sharing
    if run.writes:
        device = torch.cuda.get_device_name() if on_gpu(cfg) else "cpu"
        run.folder.update_env(device=device, threads=torch.get_num_threads(), precision=run.precision.name)
    run.loggers.log(run.folder.metrics())  # what a process that was killed could not
    for text in deviations(cfg):
        run.say(f"note: {text}")
    if not any(run.folder.path.glob("stages/*/*")):
        _check_evaluation_first(run, kinds[stages[-1].index].build)


def _check_model(run: Run, build: Builder, stage: Stage, same: Sequence[Stage], origin: Path | None) -> None:
    """What can be wrong with a stage's model, for it and for all later stages (of `same`) that train the same one."""
    # debug.steps leaves out later stages, in which something may learn
    new = build not in run.staged_models and OmegaConf.select(run.cfg, "debug.steps") is None
    if new and (OmegaConf.select(run.cfg, KEY) is None or (origin is not None and not holds(origin, "fusion"))):
        check_fusion_learns(_staged_model(run, build).model, same)
    for later in (other for other in same if other.index >= stage.index):
        check_layers(_staged_model(run, build).model, later)
        check_adapter(_staged_model(run, build).model, later)
        check_paths(_staged_model(run, build).model, later)


def _check_evaluation_first(run: Run, build: Builder) -> None:
    """Before the first step: what would end the evaluation after the last one."""
    if not run.writes or run.evaluate is not _benchmarks or OmegaConf.select(run.cfg, "debug.steps") is not None:
        return
    from vlmlab.evaluate.foresight import check_evaluation
    from vlmlab.evaluate.pairs import check_pairs

    model = _staged_model(run, build).model
    if isinstance(model, VLM):
        check_evaluation(run.cfg, model)
    elif isinstance(model, PairedTowers):
        check_pairs(run.cfg)


def _origin(run: Run, first: Stage) -> Path | None:
    """The weights that the first stage begins with, as long as it is not finished; None without ``init_from``.

    Raises:
        UserError: there is no such run, or it has other weights now than this run began with.
    """
    value = OmegaConf.select(run.cfg, KEY)
    if value is None or run.weights(first).is_file():
        return None
    return take_origin(run.folder.path, value) if run.writes else kept_origin(run.folder.path, value)


def _take_encoder(run: Run, build: Builder, stage: Stage, stages: Sequence[Stage]) -> None:
    """Hand the encoder of an earlier stage's two towers on to the model of this one."""
    source = next(other for other in stages if other.name == stage.encoder_from)
    taken = take_encoder(_staged_model(run, build), run.weights(source), stage)
    what = f"{len(taken)} weights of the encoder" if taken else "the encoder did not train there, nothing"
    run.say(f"{stage.name} begins with the encoder of {source.name}: {what} taken over")


def _enter(run: Run, build: Builder, stage: Stage, origin: Path | None) -> None:
    """Enter a stage, the first one with the weights of an earlier run, before or after its adapter's wrapping."""
    staged = _staged_model(run, build)
    as_built = origin is not None and fits_as_built(staged, origin)
    if not as_built:
        enter(staged, run.cfg, stage)
    for note in begin_with(staged, origin, run.cfg) if origin is not None else ():
        run.say(f"note: {note}")
    if as_built:
        enter(staged, run.cfg, stage)


def _staged_model(run: Run, build: Builder) -> StagedModel:
    if build not in run.staged_models:
        run.staged_models[build] = new_staged_model(run.cfg, build)
    return run.staged_models[build]


def _have_stage(run: Run, stage: Stage, kind: type[StageModule]) -> None:
    """Train a stage, or take it from another run that has trained the very same."""
    source: SampleSource = instantiate(run.cfg.data.train[stage.data])
    with run.sharing.place(stage, run.staged_models[kind.build], source) as common:
        rows = None if common is None else common.take()
        if rows is None:
            _run_stage(run, stage, kind, source)
            if common is not None:
                common.give()
            return
    run.step = stage.steps
    run.finished[kind.build] = stage
    drop_origin(run.folder.path)
    run.loggers.log(rows)


def _run_stage(run: Run, stage: Stage, kind: type[StageModule], source: SampleSource) -> None:
    """One stage from its table to its file."""
    cfg, home, staged = run.cfg, run.weights(stage).parent, run.staged_models[kind.build]
    if run.writes:
        home.mkdir(parents=True, exist_ok=True)
    prompt = stage.prompt or kind.prompt
    run.say(stage_table(stage, staged, run.precision, prompt, len(source)))
    facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "unmoved": []}
    if not staged.trained() or not stage.steps:
        run.say("nothing to train here: skipped" if stage.steps else f"{stage.key('steps')}=0: left out")
    else:
        module = kind(staged.model, stage, staged.objectives, staged.rates)
        _report_questions(run, staged, prompt, source)
        if run.shards:
            module.shard = partial(staged.shard, run.precision.half)
        start = _start(stage, staged)
        skips = Skips(cfg, stage, source, run.folder.path, run.writes)
        data = StageData(cfg, stage, staged.model, source, prompt, module, skips.replaces)
        checkpoint = _checkpoint(run, stage, module, staged, home / "last.ckpt")
        if not module.done:
            skips.look(data.collate)
            for line in check_prompts(cfg, staged.model, data.collate, source, data.order()):
                run.say(line)
        try:
            with run.cache.serving(staged.model, run.say) as used:
                looked = _fit(run, module, data, checkpoint, skips)
        finally:
            run.step = module.done
        _check_early_end(run, module)
        unmoved = _prove(stage, module, staged, checkpoint.before)
        if run.shards:
            staged = _assembled(run, stage, kind)
        facts = {"steps": module.done, "seconds": checkpoint.seconds, "unmoved": unmoved, **looked}
        _report_end(run, stage, facts)
        facts |= used
        if start is not None and stage.mix:
            staged.mix_with(start, stage.mix["share"])
            run.say(f"mixed with the weights it began with (share of the trained ones {stage.mix['share']:g})")
    if (other := mixed_in(stage, cfg)) is not None and stage.mix:
        staged.mix(other, stage.mix["share"])
        run.say(f"mixed with {other} (share of this run {stage.mix['share']:g})")
    if run.writes:
        facts["peak_bytes"] = cost.peak_bytes()
        write_json(home / "stage.json", facts, durable=True)
        staged.save(run.weights(stage), stage, cfg, run.stamps[stage.name])
        _drop_begun(run, stage)


def _check_early_end(run: Run, module: StageModule) -> None:
    """Of a stage that ended early: say so; its weights are numbers (a whole stage checks that after its last step).

    Raises:
        UserError: they are not.
    """
    stage, where = module.stage, f"stage {module.stage.name} ended early, after step {module.done} of"
    if module.done >= stage.steps:
        return
    if wrong := nonfinite((name, parameter) for name, _, parameter in module.trained()):
        raise UserError(f"{where} {stage.steps}, and {listed(wrong)} are not numbers; lower {stage.key('train')}.")
    run.say(f"{where} {stage.steps} (evaluation.patience={run.cfg.evaluation.patience})")


def _start(stage: Stage, staged: StagedModel) -> dict[str, Tensor] | None:
    """The weights that a stage begins with, where it is mixed with them when it ends."""
    if stage.mix is None or stage.mix["run"] is not None:
        return None
    return {name: tensor.detach().clone() for name, tensor in staged.live().items()}


def _report_questions(run: Run, staged: StagedModel, prompt: Any, source: SampleSource) -> None:
    if not run.writes or not isinstance(staged.model, VLM):
        return
    if (line := questions_line(run.cfg, staged.model, prompt, source)) is not None:
        run.say(line)


def _drop_begun(run: Run, stage: Stage) -> None:
    """Remove what only a stage that is not finished needs."""
    if run.writes:
        run.weights(stage).with_name("last.ckpt").unlink(missing_ok=True)
        drop_origin(run.folder.path)


def _assembled(run: Run, stage: Stage, kind: type[StageModule]) -> StagedModel:
    """On every rank a whole model in place of the one whose weights are shards, made as after a restart."""
    begun = run.staged_models[kind.build].begun()
    tensors = gathered(run.staged_models.pop(kind.build).kept())
    for past in parse(run.cfg)[: stage.index + 1]:
        if module_class(past).build is kind.build:
            staged = _staged_model(run, kind.build)
            enter(staged, run.cfg, past)
    staged.begun_with(begun)
    staged.take(tensors)
    return staged


def _checkpoint(run: Run, stage: Stage, module: StageModule, staged: StagedModel, path: Path) -> StageCheckpoint:
    """Go on from ``last.ckpt`` where there is one; what keeps the next ones."""
    stamp = run.stamps[stage.name]
    saved = load_last(path, stage, staged, stamp)
    before = _fingerprints(staged, saved, path)
    if saved:
        module.done = int(saved["step"])
        module.pending = set(saved["pending"])
        run.say(f"going on after step {module.done}")
    if run.writes:
        run.folder.cut_back(stage.name, module.done)
    every_s, seed = float(run.cfg.trainer.save_every_s), int(run.cfg.seed)
    return StageCheckpoint(path, staged, run.signals, before, every_s, seed, saved, stamp)


def _fingerprints(staged: StagedModel, saved: dict[str, Any] | None, path: Path) -> dict[str, str]:
    """Fingerprints from the beginning of the stage; frozen weights must still be those."""
    frozen = proof.fingerprints(staged.frozen().items())
    if saved is None:
        return frozen | proof.fingerprints(staged.live().items())
    before: dict[str, str] = saved["before"]
    if other := proof.changed(before, frozen):
        raise CheckpointError(
            f"{path} was made with other frozen weights ({other[0]} differs); restore them or train with fresh=true."
        )
    return before


def _fit(run: Run, module: StageModule, data: StageData, checkpoint: StageCheckpoint, skips: Skips) -> dict[str, Any]:
    """Let Lightning run the optimizer steps that are left; the seconds that validation took."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no device list, no tips
    one_rank = not run.shards  # with shards all ranks would have to take part
    variance = [TokenVariance(data.source, data.order(), data.collate, run.say)] if one_rank else []
    validation, stage = _validation(run, module, data), module.stage
    callbacks, run.logger.module = guarded(callbacks_of(run.cfg)), module
    trainer = _trainer(run, [skips, *variance, *([] if validation is None else [validation]), *callbacks], checkpoint)
    check_divides(stage.batch_size, stage.accumulate, trainer.world_size, f"recipe.stages.{stage.name}")
    try:
        with _profiled(run), _compiled(run, module), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")  # advice on workers, sizes, checkpoints
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nothing writes into what the model returns
            trainer.fit(module, datamodule=data)
    except NonFinite as error:
        if run.writes:
            write_json(run.folder.path / "nonfinite.json", error.facts)
        raise
    except (RuntimeError, MemoryError) as error:
        if no_memory(error):  # for the model, or for a batch on its way to the device
            raise OutOfMemory(stage.name, module.done + 1) from error
        raise
    if validation is None:
        return {}
    if run.writes:
        check_best(run.weights(stage).parent, validation.keep, run.say)
    return {"look_seconds": round(validation.seconds, 1)}


def _validation(run: Run, module: StageModule, data: StageData) -> Validation | None:
    """With ``evaluation.every``, the validation of the stage while it trains."""
    stage, home = module.stage, run.weights(module.stage).parent
    staged = run.staged_models[type(module).build]
    stamp = run.stamps[stage.name]
    return validation_of(run.cfg, run.folder, module, staged, stamp, data.collate, home, run.record, run.say)


def _trainer(run: Run, before: Sequence[L.Callback], checkpoint: StageCheckpoint) -> L.Trainer:
    settings = run.cfg.trainer
    devices: Any = plain_key(settings, "devices")
    every = int(settings.get("log_every") or LOG_EVERY)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command")  # on a cluster: jobs are started by sweep=slurm
        return L.Trainer(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=_nodes(run),
            strategy=_strategy(run, devices),
            precision=run.precision.name,
            max_epochs=1,
            logger=[run.logger, *run.loggers.loggers],
            callbacks=[
                run.ranks,
                *before,
                Recorder(run.folder, every, run.record),
                Progress(settings.get("progress", "auto")),
                checkpoint,
            ],
            default_root_dir=str(run.folder.path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )


def _nodes(run: Run) -> int:
    """The machines that the run is on."""
    return int(run.cfg.trainer.get("nodes") or 1)


def _strategy(run: Run, devices: Any) -> str | ModelParallelStrategy:
    """Lightning's strategy.

    Raises:
        UserError: shards on a single device.
    """
    if run.shards:
        there = torch.cuda.device_count() if on_gpu(run.cfg) else 1
        ranks = (devices if isinstance(devices, int) and devices > 0 else there) * _nodes(run)
        if ranks < 2:
            raise UserError("trainer.strategy=fsdp2 shares the weights among devices and there is one; use auto.")
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    several = devices * _nodes(run) if isinstance(devices, int) else 2
    strategy: str = run.cfg.trainer.strategy
    return strategy if strategy != "auto" or several == 1 else "ddp"


class StageData(L.LightningDataModule):
    """The windows of one stage for this rank, from the step where it goes on.

    Args:
        cfg: the configuration; read are ``seed``, ``trainer.workers`` and ``debug.overfit``.
        stage: the stage.
        model: what the collator asks for its token counts.
        source: the samples.
        prompt: "plain" or "chat".
        module: says how many steps are done.
        replace: whether the next usable row replaces one that is not.
    """

    def __init__(
        self,
        cfg: DictConfig,
        stage: Stage,
        model: nn.Module,
        source: SampleSource,
        prompt: str,
        module: StageModule,
        replace: bool = False,
    ) -> None:
        super().__init__()
        self.replace = replace
        self.cfg, self.stage, self.source, self.module = cfg, stage, source, module
        self.collate = module.collator(cfg, model, prompt)
        if not len(source):
            raise UserError(f"{stage.key('data')}={stage.data} has no samples; check data.train.{stage.data}.")

    def order(self) -> Order:
        """Which samples every step sees."""
        size = drawn_from(self.cfg, len(self.source))
        return Order(size, self.stage.batch_size, int(self.cfg.seed), self.stage.name, block_of(self.source))

    def train_dataloader(self) -> DataLoader[Window]:
        """All steps that are left."""
        assert self.trainer is not None
        order = self.order()
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        accumulate = self.stage.accumulate
        windows = Windows(self.source, self.collate, order, self.stage.steps, rank, ranks, accumulate, self.replace)
        return step_loader(windows, self.module.done, int(self.cfg.trainer.workers))


def _prove(stage: Stage, module: StageModule, staged: StagedModel, before: Mapping[str, str]) -> list[str]:
    """Hold the stage to its word; return the trained tensors that had a gradient and did not move.

    Raises:
        UserError: a frozen tensor changed, or a tensor that should train never had a gradient.
    """
    if touched := proof.changed(before, proof.fingerprints(staged.frozen().items())):
        raise UserError(
            f"stage {stage.name}: frozen weights changed ({listed(touched)}); whatever writes to them outside the "
            "optimizer must stop."
        )
    if module.pending:
        raise UserError(
            f"stage {stage.name}: {listed(sorted(module.pending), 120)} should train and never had a gradient; take "
            f"the part out of {stage.key('train')} or the unused layer out of the model."
        )
    moved = set(proof.changed(before, proof.fingerprints(staged.live().items())))
    return [name for name in staged.trained() if name not in moved]


def _report_end(run: Run, stage: Stage, facts: Mapping[str, Any]) -> None:
    if facts["unmoved"]:
        run.say(f"note: {listed(facts['unmoved'])} had gradients and did not move")
    if run.writes:
        row = {"stage": stage.name, "step": facts["steps"], "finished": True, **facts}
        run.folder.log(row | {"seconds": round(facts["seconds"], 1)})


def _finish(run: Run, stages: list[Stage], kinds: Mapping[int, type[StageModule]]) -> dict[str, Any]:
    """Cost, evaluation, ``result.json``."""
    cfg, stage = run.cfg, stages[-1]
    last = run.staged_models[kinds[stage.index].build]
    best = load_best(cfg, run.folder.path, stage, last, run.stamps[stage.name])
    device = torch.device("cuda" if on_gpu(cfg) else "cpu")
    last.model.to(device).requires_grad_(False)
    if wrong := nonfinite(last.model.named_parameters()):
        raise UserError(f"{listed(wrong)} are not numbers after the last stage; train again with fresh=true.")
    kind = kinds[stage.index]
    source: SampleSource = instantiate(cfg.data.train[stage.data])
    if OmegaConf.select(cfg, "data.max_bad_fraction") is not None:
        source = Replaced(source)
    sample = next((s for s in (source[i] for i in range(min(32, len(source)))) if s.images), source[0])
    one = kind.collator(cfg, last.model, stage.prompt or kind.prompt)([sample])
    done = []
    for s in stages:
        facts, problem = run.folder.stage_facts(s.index, s.name)
        done.append(facts)
        if problem:
            run.say(f"note: {problem}")
    costs = {
        "params": sum(parameter.numel() for parameter in last.model.parameters()),
        "trainable": last.ever_trained(),
        **cost.sample_cost(last.model, one.to(device)),
        **(answer_cost(last.model, one.to(device)) if isinstance(last.model, VLM) else {}),
        "seconds": round(sum(float(facts.get("seconds", 0.0)) for facts in done), 1),
    }
    run.folder.write_state("running", "evaluation", 0, None)
    unscored: Unscored | None = None
    with run.cache.serving(last.model, run.say) as used:
        try:
            metrics = run.evaluate(last.model, cfg, run.folder.path)
        except Unscored as error:
            unscored, metrics = error, error.scores
    costs["peak_bytes"] = max(cost.peak_bytes(), *(int(facts.get("peak_bytes", 0)) for facts in done))
    write_json(run.folder.path / "cost.json", costs | cost.cached([*done, used]))
    if unscored is None and OmegaConf.select(cfg, "recipe.finish"):
        models = {s.name: run.staged_models[kinds[s.index].build].model for s in stages}
        metrics |= instantiate(cfg.recipe.finish)(models, cfg, run.folder.path, costs, metrics)
    failed = None if unscored is None else unscored.failed
    notes = _notes(run, stages, kinds) + ([] if best is None else [best])
    result = run.folder.finish(metrics, costs, failed, notes=notes)
    run.loggers.finish(cfg, run.folder.path, metrics, costs)
    if unscored is not None:
        raise unscored
    return result


def _notes(run: Run, stages: list[Stage], kinds: Mapping[int, type[StageModule]]) -> list[str]:
    """Where the preset deviates from its paper, and the stages that asked questions one by one of themselves."""
    found = deviations(run.cfg)
    for stage in stages:
        kind = kinds[stage.index]
        model, prompt = run.staged_models[kind.build].model, cast(Any, stage.prompt or kind.prompt)
        if isinstance(model, VLM) and stage.steps:
            questions, why = read_questions(run.cfg, model, prompt)
            if questions == "rows" and why:
                found.append(f"stage {stage.name} asked one question a row, since {why}")
    return found


def _benchmarks(model: nn.Module, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    from vlmlab.evaluate.run import evaluate_model

    known = RunFolder(folder).result()  # in which some failed
    return evaluate_model(model, cfg, folder, before=known)  # type: ignore[arg-type]  # the last stage's is a VLM


@contextlib.contextmanager
def _compiled(run: Run, module: StageModule) -> Iterator[None]:
    """With ``trainer.compile``, training by compiled layers.

    Raises:
        UserError: they cannot be compiled here.
    """
    if not run.cfg.trainer.get("compile"):
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        with compiled(module.model):
            yield
    except TorchDynamoException as error:
        raise UserError(
            f"trainer.compile=true cannot compile here ({reason(error)}); set trainer.compile=false."
        ) from error


@contextlib.contextmanager
def _profiled(run: Run) -> Iterator[None]:
    """With ``debug.profile``, write the most expensive operations to ``profile.txt``."""
    if not OmegaConf.select(run.cfg, "debug.profile"):
        yield
        return
    with torch.profiler.profile(profile_memory=True) as profiler:
        yield
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
    if run.writes:
        write_atomic(run.folder.path / "profile.txt", table)
        run.say(f"wrote {run.folder.path / 'profile.txt'}")
