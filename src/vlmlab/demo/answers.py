"""The answers of a demo while they are made: one run after the other, each for the picture and for another one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlmlab.contracts.errors import UserError
from vlmlab.demo.runs import Shown
from vlmlab.evaluate.attention import Attention
from vlmlab.loading import Picture


@dataclass(frozen=True)
class Card:
    """One answer.

    Attributes:
        letter: of the run.
        name: of the run.
        wrong: whether it is asked about the other picture.
        text: the answer so far.
        state: "waiting", "answering" or "done".
        attention: what its tokens look at; None until it is done.
        note: one sentence where something is not possible.
    """

    letter: str
    name: str
    wrong: bool
    text: str = ""
    state: str = "waiting"
    attention: Attention | None = None
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """What is asked: a question, the pictures that it is about, and others."""

    question: str
    right: Sequence[Picture]
    wrong: Sequence[Picture]


def answer(runs: Sequence[Shown], asked: Asked, settings: Mapping[str, Any], seed: int = 0) -> Iterator[list[Card]]:
    """All cards, again at every piece of an answer.

    Args:
        runs: one or two.
        asked: the question; without other pictures there is no card for them.
        settings: of ``LoadedModel.generate``.
        seed: of sampling, the same for every answer.
    """
    kinds = [False, True] if asked.wrong else [False]
    cards = [Card(run.letter, run.name, wrong) for wrong in kinds for run in runs]
    yield cards
    for k, card in enumerate(cards):
        run = next(run for run in runs if run.letter == card.letter)
        for one in _one(run, card, asked, settings, seed):
            cards = [*cards[:k], one, *cards[k + 1 :]]
            yield cards


def _one(run: Shown, card: Card, asked: Asked, settings: Mapping[str, Any], seed: int) -> Iterator[Card]:
    """One card as its answer grows, and at last with what the answer looks at."""
    given = list(asked.wrong if card.wrong else asked.right)
    pictures = given if run.model.model.encoder is not None else None
    card = replace(card, state="answering")

    def ask(stream: Callable[[str], None]) -> str:
        torch.manual_seed(seed)
        beams = (settings.get("num_beams") or 1) > 1
        return run.model.generate(pictures, asked.question, stream=None if beams else stream, **settings)

    try:
        for piece, whole in pieces(ask):
            card = replace(card, text=piece if whole else card.text + piece)
            yield card
        found = run.model.attention(pictures, asked.question, card.text, system=settings.get("system", ""))
        yield replace(card, state="done", attention=found)
    except UserError as error:
        yield replace(card, state="done", note=str(error))


class _Left(UserError):
    """Nobody waits for the answer any more."""


def pieces(ask: Callable[[Callable[[str], None]], str]) -> Iterator[tuple[str, bool]]:
    """What a function hands on while it computes, and at last what it returns, marked true.

    It computes in a thread of its own, which ends at its next piece where the iteration is left early.

    Args:
        ask: is given the function to hand pieces to.

    Raises:
        Exception: what it raises.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue()
    left = threading.Event()

    def hand_on(piece: str) -> None:
        if left.is_set():
            raise _Left("left")
        made.put(("piece", piece))

    def work() -> None:
        try:
            made.put(("whole", ask(hand_on)))
        except BaseException as error:  # raised again where the answer is waited for
            made.put(("error", error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = made.get()
            if kind == "error":
                raise value
            yield value, kind == "whole"
            if kind == "whole":
                return
    finally:
        left.set()
