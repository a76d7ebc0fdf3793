"""The one exception a user may see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlmlab.contracts.terminal import visible

LONGEST = 300
"""Characters of a message at most: paths, values and rows may have any length."""


class UserError(Exception):
    """A mistake in the command, the configuration or the data; printed without a traceback.

    The message is one sentence: what is wrong, where (file, row, key), and what to do. It has at most `LONGEST`
    characters, whatever it names. It may quote what others have written: as text, its control characters are visible.
    """

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))

    def __str__(self) -> str:
        return visible(super().__str__())


class DataError(UserError):
    """A file or a row of a data set cannot be used; the message names the file and the row or id."""


class InUse(UserError):
    """Another process holds what this one needs; it may be free later."""


class OutOfMemory(UserError):
    """A training step did not fit the memory.

    Attributes:
        stage: its name.
        step: the optimizer step, from 1.
        samples: of the micro-batch, or of the largest one where the optimizer itself found no room; 0: there was none
            yet.
        length: tokens of its longest row.
        asked, answered: those of them before what is learnt, beside one image, and those that are learnt.
        moved: whether the optimizer had begun to change weights.
    """

    def __init__(
        self, stage: str, step: int, samples: int = 0, length: int = 0, asked: int = 0, answered: int = 0,
        moved: bool = False,
    ) -> None:  # fmt: skip
        self.stage, self.step, self.samples, self.length = stage, step, samples, length
        self.asked, self.answered, self.moved = asked, answered, moved
        where = f"in a micro-batch of {samples} samples, the longest row of {length} tokens" if samples else "already"
        super().__init__(f"stage {stage}, step {step}: out of memory {where}")

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (self.samples, self.length, self.asked, self.answered, self.moved)
        return OutOfMemory, (self.stage, self.step, *facts)


class Unscored(UserError):
    """Some benchmarks of a trained model could not be scored; the scores of the others are kept.

    Attributes:
        scores: of the others.
        failed: those that could not, and why in one sentence.
    """

    def __init__(self, scores: Mapping[str, float], failed: Mapping[str, str]) -> None:
        self.scores, self.failed = dict(scores), dict(failed)
        first = next(iter(failed))
        why = brief(failed[first], 150)
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        super().__init__(
            f"{first}{more} could not be scored ({why.rstrip('.;')}); the model is trained and all else is scored, "
            "mend that and the same command tries only this again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Unscored, (self.scores, self.failed)


class MachineError(UserError):
    """The machine refused something, and neither the command nor the data are wrong: a full disk, no memory."""


class CheckpointError(UserError):
    """Saved weights do not fit the composition that wants to load them."""


def brief(text: str, limit: int = LONGEST) -> str:
    """The text in at most `limit` characters: its longest words lose their middle first, then the text does."""
    while len(text) > limit:
        word = max(text.split(), key=len, default="")
        kept = max(len(word) - (len(text) - limit) - 3, 60)
        if kept >= len(word) - 3:
            return f"{text[: limit * 2 // 3 - 3].rstrip()}...{text[len(text) - (limit - limit * 2 // 3) :]}"
        text = text.replace(word, f"{word[: kept // 2]}...{word[len(word) - (kept - kept // 2) :]}", 1)
    return text


def listed(items: Iterable[str], room: int = 150, separator: str = ", ") -> str:
    """As many of the items as fit into so many characters, at least one, and how many more there are; or ``none``."""
    each = list(items)
    for count in range(len(each), 1, -1):
        text = separator.join(each[:count]) + _more(len(each) - count, separator)
        if len(text) <= room:
            return text
    if not each:
        return "none"
    more = _more(len(each) - 1, separator)
    return brief(each[0], max(room - len(more), 60)) + more


def _more(left: int, separator: str) -> str:
    return f"{separator.replace(',', '')}and {left} more" if left else ""


def reason(error: BaseException, most: int = 100) -> str:
    """What a library says of its failure, in one line of so many characters; its class where it says nothing."""
    return brief(" ".join(str(error).split()).rstrip(".") or type(error).__name__, most)


def user_error_in(error: BaseException) -> UserError | None:
    """The user's mistake that Hydra's ``instantiate`` has wrapped, or None."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def unbuildable(error: Exception) -> str:
    """The user's mistake after a part that hydra could not build; or which part, why, and where its keys are."""
    mistake = user_error_in(error)
    if mistake is not None:
        return str(mistake)
    text = str(error)
    place, target = (re.search(pattern, text) for pattern in (r"full_key: (\S+)", r"target '([^']+)'"))
    where = place.group(1) if place else (target.group(1) if target else "a part")
    cause = error.__cause__
    if cause is None or text.startswith("Error locating target"):
        shown = target.group(1) if target else ""
        return f"{where}._target_={shown} cannot be imported; give the dotted path of a class that is installed"
    return f"{where} cannot be built ({reason(cause, 150)}); correct its keys, VLMLAB_DEBUG=1 shows the whole traceback"


def check_counts(group: str, /, **counts: int) -> None:
    """Keys of a config group that must be whole numbers of at least 1.

    Raises:
        UserError: one of them is not.
    """
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{group}.{key}={value} is not possible; give a whole number of at least 1.")
