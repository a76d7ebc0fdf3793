"""The one exception a user may see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 300
"""Characters of a message about data at most: rows may hold words of any length."""


class UserError(Exception):
    """A mistake in the command, the configuration or the data; printed without a traceback.

    The message is one sentence: what is wrong, where (file, row, key), and what to do.
    """


class DataError(UserError):
    """A file or a row of a data set cannot be used; the message names the file and the row or id.

    It has at most `LONGEST` characters, whatever the rows hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


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
    """Some benchmarks of a trained model could not be scored; the scores of the others stand.

    Attributes:
        scores: of the others.
        failed: those that could not, and why in one sentence.
    """

    def __init__(self, scores: Mapping[str, float], failed: Mapping[str, str]) -> None:
        self.scores, self.failed = dict(scores), dict(failed)
        first = next(iter(failed))
        why = failed[first] if len(failed[first]) <= 150 else failed[first][:147] + "..."
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


def mistake_within(error: BaseException) -> UserError | None:
    """The user's mistake that Hydra's ``instantiate`` has wrapped, or None."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def check_counts(group: str, /, **counts: int) -> None:
    """Keys of a config group that must be whole numbers of at least 1.

    Raises:
        UserError: one of them is not.
    """
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{group}.{key}={value} is not possible; give a whole number of at least 1.")
