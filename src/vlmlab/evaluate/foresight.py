"""What would end an evaluation is found before the first step: words of rows, their length, one image where two are
needed.

Words are tokenised where they may be too many, and a few images are read; nothing is decoded for its own sake.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, SampleSource
from vlmlab.data.collate import Collator
from vlmlab.data.questions import split_questions
from vlmlab.data.skipped import label
from vlmlab.evaluate.baselines import Limited, image_names
from vlmlab.evaluate.run import held_out_limit, held_out_names
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM

READ = 256
"""Samples of a source that are made or read one by one; of records that are in memory all are looked at."""

SHUFFLED = "shuffled"
"""The baseline that needs a second image."""

UNLIMITED = 1 << 40
BLANK = np.zeros((8, 8, 3), np.uint8)


def check_evaluation(cfg: DictConfig, model: VLM) -> None:
    """Look through the benchmarks and held-out sets of a run, as far as they will be asked.

    Args:
        cfg: the configuration: ``data.benchmarks``, ``data.val``, ``evaluation``, ``budget``, ``collate``.
        model: the composition, trained or not: its tokenizer and its visual tokens count.

    Raises:
        DataError: a benchmark or held-out set cannot be scored; names its key, and the row.
        UserError: options are to be scored and there are none, or a metric takes one for nothing.
    """
    longer = OmegaConf.merge(cfg, {"collate": {"max_length": UNLIMITED}})
    assert isinstance(longer, DictConfig)
    look = _Look(cfg, build_collator(longer, model, "chat"))
    for name, benchmark in cfg.data.benchmarks.items():
        look.benchmark(f"data.benchmarks.{name}", benchmark)
    for name in held_out_names(cfg):
        look.held_out(f"data.val.{name}", cfg.data.val[name])


class _Look:
    """One look through all sets of a configuration.

    Args:
        cfg: the configuration.
        collator: for this model, without a longest sample.
    """

    def __init__(self, cfg: DictConfig, collator: Collator) -> None:
        self.cfg, self.collator, self.encoder = cfg, collator, collator.encoder
        self.longest = int(cfg.collate.max_length)

    def benchmark(self, key: str, benchmark: DictConfig) -> None:
        """Refuse a benchmark that could not be scored."""
        source = Limited(_unverified(benchmark.source), self.cfg.budget.eval_limit)
        for metric in map(instantiate, benchmark.metrics):
            least = int(getattr(metric, "least_rows", 1))
            if len(source) < least:
                raise DataError(
                    f"{key} has {len(source)} samples and {type(metric).__name__} needs {least}; give it more, or "
                    "raise budget.eval_limit."
                )
            self._refuse_lost(key, metric, source)
        if benchmark.get("scoring") == "likelihood":
            self._refuse_without_options(key, source)
        self._refuse_rows(key, source, self._asked)
        self._refuse_one_image(key, source, "data.test_fraction")

    def held_out(self, key: str, node: DictConfig) -> None:
        """Refuse a held-out set whose loss could not be taken."""
        source = Limited(_unverified(node), held_out_limit(self.cfg))
        if not len(source):
            raise DataError(f"{key} has no samples; raise data.val_fraction, or set evaluation.held_out=[].")
        if OmegaConf.select(self.cfg, "data.max_bad_fraction") is None:  # otherwise the next rows stand for them
            self._refuse_rows(key, source, self._learnt)
        self._refuse_one_image(key, source, "data.val_fraction")

    # -- rows ----------------------------------------------------------------------------------------------------

    def _asked(self, sample: Sample) -> int:
        """Tokens of its prompt."""
        return len(self.encoder.ask(sample).ids)

    def _learnt(self, sample: Sample) -> int:
        """Tokens of its longest row, answers and all."""
        apart = [sample] if self.collator.questions == "conversation" else split_questions(sample)
        return max(len(self.encoder.train(one).ids) for one in apart)

    def _refuse_rows(self, key: str, source: Limited, tokens: Callable[[Sample], int]) -> None:
        forged, found = self._unusable(source, tokens)
        if forged:
            raise DataError(f"{key}: {forged[0]}" if len(forged) == 1 else f"{key}: {len(forged)} rows, as {forged[0]}")
        if not found:
            return
        sample, most = max(found, key=lambda row: row[1])
        many, them = (f"{len(found)} rows are", "them") if len(found) > 1 else ("one row is", "it")
        raise DataError(
            f"{key}: {many} longer than collate.max_length={self.longest}: sample {sample} has {most} tokens; set "
            f"collate.max_length={most}, or shorten or remove {them}."
        )

    def _unusable(self, source: Limited, tokens: Callable[[Sample], int]) -> tuple[list[str], list[tuple[str, int]]]:
        """What is wrong with the words of rows; id and tokens of the rows that are too long."""
        forged: list[str] = []
        found: list[tuple[str, int]] = []
        whole = getattr(source.source, "turns_in_memory", False)
        frame: int | None = None  # tokens that the template adds, at most
        for index in range(len(source) if whole else min(len(source), READ)):
            try:
                told = _told(source.source, index)
                if (problem := self.encoder.control_token_problem(told)) is not None:
                    forged.append(problem)
                    continue
                frame = tokens(told) if frame is None else frame
                words = sum(_most_tokens(turn.prompt) + _most_tokens(turn.answer) for turn in told.turns)
                images = len(told.images) * self.encoder.tokens_of(BLANK.shape[:2])
                if frame * len(told.turns) + words + images <= self.longest or tokens(told) <= self.longest:
                    continue
                length = tokens(source.source[index])
            except DataError:  # for anyone who skips or scores it
                continue
            if length > self.longest:
                found.append((told.id, length))
        return forged, found

    def _refuse_lost(self, key: str, metric: object, source: Limited) -> None:
        """Refuse a metric that takes options for nothing, as the letter A for an article; the first question tells."""
        loses = getattr(metric, "loses", None)
        if loses is None:
            return
        with suppress(DataError):
            lost = next((option for option in _told(source.source, 0).turns[-1].options if loses(option)), None)
            if lost is not None:
                raise UserError(
                    f"{key}.metrics has {type(metric).__name__}, which leaves nothing of the option {lost!r} (it drops "
                    "articles and marks); take vlmlab.evaluate.metrics.options.OptionAccuracy in its place."
                )

    def _refuse_without_options(self, key: str, source: Limited) -> None:
        whole = getattr(source.source, "turns_in_memory", False)
        for index in range(len(source) if whole else min(len(source), READ)):
            with suppress(DataError):
                told = _told(source.source, index)
                if told.turns[-1].options:
                    continue
                raise UserError(
                    f"{key}.scoring=likelihood chooses from options, and sample {told.id} has none; set "
                    "scoring=generate, or give them by vlmlab.data.options.ClosedAnswers."
                )

    # -- images --------------------------------------------------------------------------------------------------

    def _refuse_one_image(self, key: str, source: Limited, fraction: str) -> None:
        """The shuffled baseline shows every sample the images of another, from beyond the limit if need be."""
        others = [name for name in self.cfg.evaluation.baselines if name != SHUFFLED]
        if len(others) == len(self.cfg.evaluation.baselines):
            return
        seen: set[str] = set()
        for index in range(min(len(source.source), READ)):
            if index == len(source) and not seen:
                return
            with suppress(DataError):
                seen.update(image_names(source.source[index])[:1])
            if len(seen) > 1:
                return
        if not seen or len(source.source) > READ:  # those after may show another
            return
        remedy = f"raise {fraction}" if OmegaConf.select(self.cfg, fraction) is not None else "give it more images"
        raise DataError(
            f"{key} shows one image only, and the {SHUFFLED} baseline needs another one; {remedy}, or leave that "
            f"baseline out by evaluation.baselines=[{','.join(others)}]."
        )


def _unverified(node: DictConfig) -> SampleSource:
    """A source that does not decode its images beforehand: anyone who scores it does."""
    source: SampleSource = instantiate(node, **({"verify": False} if node.get("verify") else {}))
    return source


def _most_tokens(text: str) -> int:
    """The bytes of a text: a token has at least one."""
    return len(text.encode("utf-8", "replace"))


def _told(source: SampleSource, index: int) -> Sample:
    """A sample with blank images where its source tells the turns without them; such a one may have an image more."""
    turns = getattr(source, "turns", None)
    if turns is None:
        return source[index]
    told = tuple(turns(index))
    images = sum(turn.prompt.count(IMAGE_TAG) for turn in told) or 1
    return Sample(label(source, index), (BLANK,) * images, told)
