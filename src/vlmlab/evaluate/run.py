"""Evaluates a model on every benchmark, with wrong images and without any, and writes what it said.

``python evaluate.py run=outputs/<name>`` gives the same numbers again, from the saved weights.
"""

from __future__ import annotations

import copy
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import CheckpointError, DataError, Unscored, UserError, brief, listed
from vlmlab.contracts.faults import machine_error, no_memory
from vlmlab.contracts.sample import Sample, SampleSource, references
from vlmlab.contracts.tensors import Batch
from vlmlab.contracts.terminal import tell
from vlmlab.data.questions import split_questions
from vlmlab.data.skipped import Replaced, note
from vlmlab.evaluate.baselines import Limited, NoImage, Shuffled, image_names
from vlmlab.evaluate.lookup import Lookup, training_turns
from vlmlab.evaluate.metrics.options import chosen
from vlmlab.evaluate.metrics.rows import Row, read_rows, write_rows
from vlmlab.evaluate.metrics.scoring import LOOKUP, PROBE, lost_answers, predictions_file, score_predictions
from vlmlab.evaluate.pairs import pair_parts
from vlmlab.evaluate.probe import address, probes, shipped
from vlmlab.model.build import build_cache, build_collator
from vlmlab.model.likelihood import option_likelihoods
from vlmlab.model.pair import PairedTowers
from vlmlab.model.questions import unequal_in_options, unequal_in_trees
from vlmlab.model.vlm import VLM

BASELINES: dict[str, Callable[[SampleSource], SampleSource]] = {"shuffled": Shuffled, "no_image": NoImage}
Progress = Callable[[str], None]


def evaluate_model(
    model: VLM | PairedTowers,
    cfg: DictConfig,
    folder: Path,
    say: Progress = tell,
    before: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Scores of all benchmarks and held-out losses; predictions go to ``<folder>/predictions``.

    Args:
        model: a trained composition, or two towers, on the device it shall run on.
        cfg: the run's configuration: ``data.benchmarks``, ``data.val``, ``evaluation``, ``budget``.
        folder: the run's folder.
        say: takes one line of progress at a time.
        before: a ``result.json`` in which some of them ``failed``: only these are tried, the other scores are kept.

    Returns:
        "<benchmark>/<metric>", and the same with "/shuffled", "/no_image" and "/lookup"; "val/<data>/loss" in nats per
        token.

    Raises:
        Unscored: some could not be scored; it has the scores of all others.
    """
    model.eval()
    parts = pair_parts(model, cfg, folder, say) if isinstance(model, PairedTowers) else _parts(model, cfg, folder, say)
    if before is None:
        return score_each(parts, say)
    left = {name: score for name, score in parts.items() if name in before["failed"]}
    return score_each(left, say, before["metrics"])


def _parts(model: VLM, cfg: DictConfig, folder: Path, say: Progress) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What gives the scores of every benchmark and held-out set, by its name."""
    if cfg.evaluation.get("share_images") and (why := unequal_in_trees(model)) is not None:
        say(f"note: evaluation.share_images=true: each question reads its images itself, since {why}")
    scored = any(scores_options(cfg, str(name)) for name in cfg.data.benchmarks)
    if scored and (why := unequal_in_options(model)) is not None:
        say(f"note: scoring=likelihood: each option has a row of its own with its question and images, since {why}")
    lookup = _lookup(cfg, say) if cfg.data.benchmarks else None
    parts: dict[str, Callable[[], Mapping[str, float]]] = {
        str(name): partial(_benchmark, model, cfg, folder, str(name), lookup, say) for name in cfg.data.benchmarks
    }
    for name in held_out_names(cfg):
        parts[f"val/{name}"] = partial(_held_out_loss, model, cfg, name, say, folder)
    return parts


def score_each(
    parts: Mapping[str, Callable[[], Mapping[str, float]]], say: Progress, known: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The scores of all parts of an evaluation: what is wrong with one of them leaves the others alone.

    Args:
        parts: what gives the scores of each, by name.
        say: takes a line about each that fails.
        known: scores to start from.

    Raises:
        Unscored: a part raised an error, or gave a score that is not a number.
    """
    scores, failed = dict(known or {}), {}
    for name, score in parts.items():
        try:
            found = score()
            check_finite(found)
            scores.update(found)
        except Exception as error:
            if not isinstance(error, UserError | InstantiationException) and machine_error(error) is None:
                tell(traceback.format_exc().rstrip(), sys.stderr)  # a mistake in the code
            failed[name] = _sentence(error)
            say(f"{name} could not be scored: {failed[name]}")
    if failed:
        raise Unscored(scores, failed)
    return scores


def check_finite(scores: Mapping[str, float]) -> None:
    """Refuse scores that are not finite numbers.

    Raises:
        UserError: naming the first.
    """
    for name, value in scores.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}: weights, data or metric give no number; look at its predictions")


def _sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if no_memory(error):
        return "out of memory; lower evaluation.batch_size"
    known = error if isinstance(error, UserError) else machine_error(error)
    text = f"{type(error).__name__}: {error}" if known is None else str(known)
    return brief(" ".join(text.split()))


def _benchmark(
    model: VLM, cfg: DictConfig, folder: Path, name: str, lookup: Lookup | None, say: Progress
) -> dict[str, float]:
    """The scores of one benchmark."""
    benchmark = cfg.data.benchmarks[name]
    questions = instantiate(benchmark.source)
    note(folder, f"data.benchmarks.{name}", getattr(questions, "skipped", []))
    source = Limited(questions, cfg.budget.eval_limit)
    for baseline in ("", *cfg.evaluation.baselines):
        shown = BASELINES[baseline](source) if baseline else source
        rows = answer(model, cfg, name, shown, benchmark.max_new_tokens)
        write_rows(predictions_file(folder, name, baseline), rows)
        say(f"{name}{' ' + baseline if baseline else ''}: {len(rows)} answers")
    floors = list(cfg.evaluation.baselines)
    if lookup is not None:
        write_rows(predictions_file(folder, name, LOOKUP), looked_up(lookup, folder, name))
        floors.append(LOOKUP)
    if probed := _probed(model, cfg, name, source):
        write_rows(predictions_file(folder, name, PROBE), probed)
        say(f"{name} {PROBE}: {len(probed)} answers")
        floors.append(PROBE)
    metrics = [instantiate(metric, _partial_=True) for metric in benchmark.metrics]
    for lost in lost_answers(folder, name, metrics):
        say(f"note: {lost}")
    return score_predictions(folder, name, metrics, floors)


def _lookup(cfg: DictConfig, say: Progress) -> Lookup | None:
    """The table of the run's training answers; None where it is not asked for."""
    most = OmegaConf.select(cfg, "evaluation.lookup_samples")
    if not most:
        return None
    try:
        return Lookup(training_turns(cfg, int(most)))
    except InstantiationException as error:
        if not isinstance(error.__cause__, DataError):
            raise
        say(f"no lookup: {error.__cause__}")  # a finished run may be scored where its training files are not
        return None


def looked_up(lookup: Lookup, folder: Path, name: str) -> list[Row]:
    """The questions of a benchmark, which its predictions hold, with the lookup's answers."""
    rows = read_rows(predictions_file(folder, name))
    words = ((row, lookup.answer(row.prompt, row.kind)) for row in rows)
    return [replace(row, prediction=text, image_ids=(), log_likelihoods=()) for row, text in words]


def answer(model: VLM, cfg: DictConfig, name: str, source: SampleSource, max_new_tokens: int) -> list[Row]:
    """Greedy cached answers to the last turn of every sample, or the likeliest option where the benchmark says so."""
    if scores_options(cfg, name):
        return _chosen(model, cfg, name, source)
    shares = cfg.evaluation.get("share_images") and unequal_in_trees(model) is None
    collator = replace(build_collator(cfg, model, "chat"), questions="tree" if shares else "rows")
    device = next(model.parameters()).device
    rows: list[Row] = []
    for samples in _chunks(source, cfg.evaluation.batch_size):
        texts = model.generate(collator.ask(samples).to(device), max_new_tokens)
        rows += [_row(name, sample, text) for sample, text in zip(samples, texts, strict=True)]
    return rows


def scores_options(cfg: DictConfig, name: str) -> bool:
    """Whether the answers of a benchmark are chosen from options by their likelihood."""
    return str(cfg.data.benchmarks[name].get("scoring") or "generate") == "likelihood"


def _chosen(model: VLM, cfg: DictConfig, name: str, source: SampleSource) -> list[Row]:
    """The likeliest option of every sample's last turn, with the likelihoods of all."""
    collate, shared = build_collator(cfg, model, "chat"), unequal_in_options(model) is None
    rows: list[Row] = []
    for samples in _chunks(source, cfg.evaluation.batch_size):
        each = option_likelihoods(model, collate, samples, cfg.evaluation.batch_size, shared)
        for sample, found in zip(samples, each, strict=True):
            logs = tuple(one.log for one in found)
            row = replace(_row(name, sample, ""), log_likelihoods=logs)
            rows.append(replace(row, prediction=chosen(row)))
    return rows


def _probed(model: VLM, cfg: DictConfig, name: str, source: SampleSource) -> list[Row]:
    """What the towers answer through a map that was fitted and not trained, see ``evaluate.probe``.

    ``evaluation.probe``: "auto" takes what is known of the shipped towers, true computes it, false leaves it out. Of
    several maps the one under which the right answers are likeliest.
    """
    asked, benchmark = cfg.evaluation.get("probe", "auto"), cfg.data.benchmarks[name]
    if asked is False or (asked is not True and scores_options(cfg, name)):  # what ships are answers in words
        return []
    if asked is True:
        probed = probes(cfg, model)
        size = cfg.evaluation.batch_size
        losses = [mean_loss(build_collator(cfg, probe, "chat"), probe, source, size) for probe in probed]
        best = min(zip(losses, probed, strict=True), key=lambda pair: pair[0], default=(0.0, None))[1]
        return [] if best is None else answer(best, cfg, name, source, benchmark.max_new_tokens)
    known = shipped().get(address(cfg, model, benchmark) or "", {})
    samples = [source[index] for index in range(len(source))] if known else []
    return [_row(name, sample, known[sample.id]) for sample in samples]


def held_out_names(cfg: DictConfig) -> list[str]:
    """The names of ``evaluation.held_out`` that the data have."""
    return [str(name) for name in cfg.evaluation.held_out if name in cfg.data.val]


def held_out_limit(cfg: DictConfig) -> int:
    """Most samples of a held-out set whose loss is taken."""
    limits = [int(cfg.evaluation.held_out_samples)]
    return min(limits if cfg.budget.eval_limit is None else [*limits, int(cfg.budget.eval_limit)])


def held_out_losses(model: VLM, cfg: DictConfig, say: Progress = tell, folder: Path | None = None) -> dict[str, float]:
    """Mean next-token loss (nats per supervised token) of the named validation sets: right, wrong and no images.

    Rows of real data that cannot be used are replaced by the next usable ones and, with `folder`, written down there.
    """
    losses: dict[str, float] = {}
    for name in held_out_names(cfg):
        losses |= _held_out_loss(model, cfg, name, say, folder)
    return losses


def _held_out_loss(model: VLM, cfg: DictConfig, name: str, say: Progress, folder: Path | None) -> dict[str, float]:
    losses: dict[str, float] = {}
    collator = build_collator(cfg, model, "chat")
    samples = held_out(cfg, name, collator.encode)
    source = Limited(samples, held_out_limit(cfg))
    for baseline in ("", *cfg.evaluation.baselines):
        shown = _shown(source, baseline, apart=collator.questions != "conversation")
        key = f"val/{name}/loss" + (f"/{baseline}" if baseline else "")
        losses[key] = mean_loss(collator, model, shown, cfg.evaluation.batch_size)
        say(f"{key}: {losses[key]:.4f}")
    if folder is not None:
        note(folder, f"data.val.{name}", getattr(samples, "skipped", []))
    return losses


def _shown(source: SampleSource, baseline: str, apart: bool) -> SampleSource:
    """A set under a baseline; without images, which collators take for a conversation, its questions as they are asked.

    Args:
        source: the set.
        baseline: its name; empty for none.
        apart: whether each question is asked alone.
    """
    if not baseline:
        return source
    kind = BASELINES[baseline]
    if apart and kind is NoImage:
        return kind([one for k in range(len(source)) for one in split_questions(source[k])])
    return kind(source)


def held_out(cfg: DictConfig, name: str, encode: Callable[[Sample], object]) -> SampleSource:
    """The validation set of this name; of files, with the next usable row in the place of one that is not."""
    source: SampleSource = instantiate(cfg.data.val[name])
    if OmegaConf.select(cfg, "data.max_bad_fraction") is None:
        return source
    return Replaced(source, encode)  # the same rows under every baseline


@torch.no_grad()
def mean_loss(collate: Callable[[list[Sample]], Batch], model: VLM, source: SampleSource, size: int) -> float:
    """Sum of token losses over sum of supervised tokens, in batches of `size` samples."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for samples in _chunks(source, size):
        outputs = VLM.forward(model, collate(samples).to(device))
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), outputs.targets, reduction="sum")
        total, count = total + float(loss), count + outputs.targets.numel()
    return total / count


def _chunks(source: SampleSource, size: int) -> Iterator[list[Sample]]:
    if len(source) == 0:
        raise UserError("A benchmark has no samples; raise budget.eval_limit or the size of its source.")
    for start in range(0, len(source), size):
        yield [source[index] for index in range(start, min(start + size, len(source)))]


def _row(benchmark: str, sample: Sample, text: str) -> Row:
    turn = sample.turns[-1]
    return Row(
        benchmark=benchmark,
        id=sample.id,
        turn=len(sample.turns) - 1,
        kind=turn.kind,
        prompt=turn.prompt,
        prediction=text,
        references=tuple(references(turn)),
        chance=turn.chance,
        image_ids=image_names(sample),
        group=turn.group,
        options=turn.options,
    )


def evaluate(folder: Path, cfg: DictConfig) -> dict[str, Any]:
    """Score a finished run again, from its saved weights, and say whether the numbers are those of the run.

    Args:
        folder: the run's folder; predictions and ``metrics.json`` go to ``<folder>/evaluate``.
        cfg: ``conf/evaluate.yaml``: benchmarks, limit, batch_size, share_images, device.

    Returns:
        The run's result with the metrics measured now.

    Raises:
        UserError: the run is not finished, or a benchmark's name is unknown.
        Unscored: some benchmarks could not be scored.
    """
    from vlmlab.analyse.table import final_table
    from vlmlab.engine.device import device_of
    from vlmlab.engine.restore import load_trained
    from vlmlab.runs.config import plain
    from vlmlab.runs.files import refuse_links, write_json
    from vlmlab.runs.folder import RunFolder
    from vlmlab.runs.trust import building, saved_config

    run = RunFolder(folder)
    result = run.result()
    if result is None:
        raise CheckpointError(f"{folder} is not finished (no result.json); start its training command again.")
    refuse_links(folder)
    (folder / "evaluate").mkdir(exist_ok=True)
    config = overridden(saved_config(folder, bool(cfg.get("trust"))), cfg)
    torch.set_num_threads(int(config.trainer.threads))
    with building(folder):
        model = load_trained(config, folder)
    assert isinstance(model, VLM | PairedTowers)
    model.to(device_of(str(cfg.device)))
    unscored: Unscored | None = None
    try:
        with build_cache(config).serving(model, tell):
            metrics = evaluate_model(model, config, folder / "evaluate")
    except Unscored as error:
        unscored, metrics = error, error.scores
    write_json(folder / "evaluate" / "metrics.json", metrics)
    tell(final_table({**result, "metrics": metrics}, folder / "evaluate", plain(config)))
    tell(_compared(result["metrics"], metrics))
    if unscored is not None:
        raise unscored
    return {**result, "metrics": metrics}


def overridden(run: DictConfig, cfg: DictConfig) -> DictConfig:
    """The run's configuration with what the evaluation asks for."""
    config = copy.deepcopy(run)
    if cfg.benchmarks is not None:
        groups = {key: config.data.get(key) or {} for key in ("benchmarks", "pairs")}
        unknown = [name for name in cfg.benchmarks if not any(name in named for named in groups.values())]
        if unknown:
            known = listed([str(name) for named in groups.values() for name in named])
            raise UserError(f"benchmarks={unknown[0]} is not in this run; choose from {known}.")
        for key, named in groups.items():
            if named or key in config.data:
                config.data[key] = {name: named[name] for name in cfg.benchmarks if name in named}
    if cfg.limit is not None:
        config.budget.eval_limit = cfg.limit
    if cfg.batch_size is not None:
        config.evaluation.batch_size = cfg.batch_size
    if cfg.get("share_images") is not None:
        config.evaluation.share_images = cfg.share_images
    return config


def _compared(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """One line: how many of the run's numbers came out the same; what a damaged result has in their place is none."""
    shared = [key for key in now if isinstance(before.get(key), int | float)]
    other = [key for key in shared if now[key] != before[key]]
    if not other:
        return f"all {len(shared)} numbers equal those of result.json"
    shown = "; ".join(f"{key}: {now[key]:.6g} here, {before[key]:.6g} in result.json" for key in other[:5])
    return f"{len(other)} of {len(shared)} numbers differ from result.json: {shown}"
