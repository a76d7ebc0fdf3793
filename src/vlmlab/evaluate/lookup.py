"""The ``lookup`` floor: to every question the commonest training answer to the same words. Never imports torch.

No image and no model is asked: what it scores is in the training questions' words alone, and a model has to beat it
before its score says that it looks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import IMAGE_TAG, SampleSource, Turn, turns_of
from vlmlab.data.sampler import Order, block_of
from vlmlab.evaluate.metrics.vqa import normalise
from vlmlab.recipe.stage import drawn_from, parse

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Lookup:
    """Answers by what was answered before to the same words, or else to that kind of question, or else to any.

    Answers that are scored alike count as one; of equally common ones the first in the alphabet is taken, and of its
    spellings the commonest.

    Args:
        turns: questions with their answers; every turn of a conversation counts.
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        texts: dict[str, Counter[str]] = defaultdict(Counter)
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for turn in turns:
            texts[plain_text(turn.prompt)][turn.answer] += 1
            kinds[turn.kind][turn.answer] += 1
        self._texts = {text: commonest(answers) for text, answers in texts.items()}
        self._kinds = {kind: commonest(answers) for kind, answers in kinds.items()}
        self._any = commonest(sum(kinds.values(), Counter()))

    def answer(self, prompt: str, kind: str) -> str:
        """The answer to a question; empty where there was nothing to learn from."""
        return self._texts.get(plain_text(prompt), self._kinds.get(kind, self._any))


def commonest(answers: Mapping[str, int]) -> str:
    """The commonest of the answers as they are scored, in its commonest spelling; equals go by the alphabet."""
    if len(answers) < 2:
        return next(iter(answers), "")
    forms = {answer: normalise(answer) for answer in answers}
    scored: Counter[str] = Counter()
    for answer, count in answers.items():
        scored[forms[answer]] += count
    best = min(scored, key=lambda form: (-scored[form], form))
    return min((answer for answer in answers if forms[answer] == best), key=lambda answer: (-answers[answer], answer))


def plain_text(prompt: str) -> str:
    """The words of a question: no image tags, single blanks."""
    return " ".join(prompt.replace(IMAGE_TAG, " ").split())


def training_turns(cfg: DictConfig, most: int) -> Iterator[Turn]:
    """What a run's stages are taught, turn by turn, without an image.

    Of each stage the samples that its steps draw, each once. Of a source that has to make or read its turns one by one
    (the generated world, shards) only the first `most` that are drawn; records that are in memory all count.

    Args:
        cfg: the run's configuration: ``recipe.stages``, ``data.train``, ``seed``.
        most: samples of such a source, for each stage.
    """
    from hydra.utils import instantiate

    for stage in parse(cfg):
        drawn = stage.steps * stage.batch_size
        if not drawn:
            continue
        source: SampleSource = instantiate(cfg.data.train[stage.data])
        drawn = drawn if getattr(source, "turns_in_memory", False) else min(drawn, most)
        order = Order(drawn_from(cfg, len(source)), drawn, int(cfg.seed), stage.name, block_of(source))
        for index in sorted(set(order.window(0))):
            try:
                yield from turns_of(source, index)
            except DataError:  # a row that cannot be used taught the run nothing either
                continue
