"""One line of ``predictions/*.jsonl``: what was asked, what the model said, what people say. Scores come from these."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError
from vlmlab.runs.files import replacing

CHOOSING = ("options", "log_likelihoods")
"""Keys of rows whose answers were chosen from options."""


@dataclass(frozen=True)
class Row:
    """One answered turn.

    Attributes:
        benchmark: name of the benchmark, as in ``data.benchmarks``.
        id: id of the sample.
        turn: index of the turn within the sample.
        kind: what sort of question this is; scores are reported per kind.
        prompt: the user's words.
        prediction: the model's words.
        references: all acceptable answers, at least one.
        chance: accuracy in 0..1 of the best answer that never looks; None where unknown.
        image_ids: the images the model was shown (another sample's in a shuffled evaluation, none in ``no_image``).
        group: a part of the benchmark that is scored apart, across the kinds; empty where there is none.
        options: the answers to choose from; empty where the answer is free.
        log_likelihoods: of every option as the answer, in nats, where it was chosen by them; else empty.
    """

    benchmark: str
    id: str
    turn: int
    kind: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    chance: float | None = None
    image_ids: tuple[str, ...] = ()
    group: str = ""
    options: tuple[str, ...] = ()
    log_likelihoods: tuple[float, ...] = ()

    def to_json(self) -> str:
        """The row as one line of JSON (no line end), options only where there are some.

        Raises:
            DataError: a chance or a likelihood that is not a number.
        """
        if self.chance is not None and not math.isfinite(self.chance):
            raise DataError(f"{self.benchmark} {self.id}: its chance is {self.chance}; give a number from 0 to 1.")
        if not all(map(math.isfinite, self.log_likelihoods)):
            raise DataError(f"{self.benchmark} {self.id}: an option's likelihood is not a number; look at the weights.")
        raw = asdict(self)
        for key in [key for key in CHOOSING if not raw[key]]:
            del raw[key]
        return json.dumps(raw, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str, where: str = "this line") -> Row:
        """The row that `line` holds; DataError names `where` and the key that is missing or of the wrong type."""
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}); evaluate the run again to write it anew.") from error
        if not isinstance(raw, dict):
            raise DataError(f"{where} is not a JSON object; evaluate the run again to write it anew.")
        return cls(
            benchmark=_text(raw, "benchmark", where),
            id=_text(raw, "id", where),
            turn=int(_number(raw, "turn", where)),
            kind=_text(raw, "kind", where),
            prompt=_text(raw, "prompt", where),
            prediction=_text(raw, "prediction", where),
            references=_texts(raw, "references", where),
            chance=None if raw.get("chance") is None else float(_number(raw, "chance", where)),
            image_ids=_texts(raw, "image_ids", where) if "image_ids" in raw else (),
            group=_text(raw, "group", where) if "group" in raw else "",
            **_choosing(raw, where),
        )


def read_rows(path: Path) -> list[Row]:
    """All rows of a predictions file; DataError names the file and the line that cannot be used."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; evaluate the run to write its predictions.")
    with path.open(encoding="utf-8") as lines:
        return [
            Row.from_json(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()
        ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a predictions file as a whole: a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines((row.to_json() + "\n").encode("utf-8", "backslashreplace") for row in rows)


def _text(raw: dict[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: key '{key}' must be text but is {value!r}; evaluate the run again.")
    return value


def _number(raw: dict[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: key '{key}' must be a number but is {value!r}; evaluate the run again.")
    return value


def _texts(raw: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = raw.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: key '{key}' must be a list of texts but is {value!r}; evaluate the run again.")
    return tuple(value)


def _choosing(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Options and their likelihoods, as many of these as of those, or none."""
    options = _texts(raw, "options", where) if "options" in raw else ()
    given = raw.get("log_likelihoods", [])
    numbers = isinstance(given, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in given)
    if not numbers or len(given) not in (0, len(options)):
        raise DataError(f"{where}: key 'log_likelihoods' must have a number for each option; evaluate the run again.")
    return {"options": options, "log_likelihoods": tuple(float(number) for number in given)}
