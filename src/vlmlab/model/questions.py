"""How a composition reads several questions about the same images, and what is reported about that before a stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.data.questions import Questions, leading_tags
from vlmlab.mask.leak import TREES
from vlmlab.mask.trees import OPTIONS, equal_in_trees, images_equal_in_trees
from vlmlab.model.vlm import VLM

if TYPE_CHECKING:
    from vlmlab.data.chat import Prompt

LOOKED_AT = 64
"""Samples that are counted: reading all of them would take as long as training on them."""

WORDS = {"conversation": "conversations", "rows": "one question a row", "tree": "trees"}


def read_questions(cfg: DictConfig, model: VLM, prompt: Prompt) -> tuple[Questions, str]:
    """What becomes of several questions about an image, and why where that is not what ``collate.questions`` says.

    What reads the question reads that of an image's own turn: of a conversation the first one, for all its answers,
    while it is asked single questions afterwards. So there every question is a row, unless the key says "whole".
    """
    wanted = str(cfg.collate.get("questions") or "conversation")  # a configuration older than that key has none
    split: dict[str, Questions] = {"rows": "rows", "tree": "tree"}
    if prompt != "chat":
        return "conversation", f"prompt={prompt} asks no questions" if wanted in split else ""
    if wanted == "whole":
        return "conversation", ""
    why = {"conversation": reads_question, "tree": unequal_in_trees}.get(wanted, _never)(model)
    return (split.get(wanted, "conversation"), "") if why is None else ("rows", why)


def _never(model: VLM) -> str | None:
    return None


def reads_question(model: VLM) -> str | None:
    """What of the composition reads the user's question beside the image, in words; None: nothing does."""
    if model.connector is not None and model.connector.reads_instruction:
        return "the connector reads the question"
    return "the fusion reads the question" if model.fusion.reads_text else None


def unequal_in_trees(model: VLM) -> str | None:
    """Why questions cannot share their images in this composition and still be what they are alone; None: they can."""
    if (reader := reads_question(model)) is not None:
        return reader
    if not equal_in_trees(model.mask):
        return f"{type(model.mask).__name__} lets what comes before the question see some of it"
    wrong = _shows_others(model, TREES)
    return None if wrong is None else f"{wrong} shows other images where questions share them"


def unequal_in_options(model: VLM) -> str | None:
    """Why answers to choose from cannot share their question and still be what they are alone; None: they can.

    What they share is the whole prompt, so that it does not matter who reads the question.
    """
    if not equal_in_trees(model.mask, OPTIONS):
        return f"{type(model.mask).__name__} lets what comes before the answer see some of it"
    wrong = _shows_others(model, OPTIONS)
    return None if wrong is None else f"{wrong} shows other images where answers share them"


def _shows_others(model: VLM, trees: Sequence[str]) -> str | None:
    """The class of a memory mask that shows other images in these trees than in rows."""
    sees = [sees for part in model.fusion.modules() if (sees := getattr(part, "sees", None)) is not None]
    wrong = next((mask for mask in sees if not images_equal_in_trees(mask, trees)), None)
    return None if wrong is None else type(wrong).__name__


def questions_line(cfg: DictConfig, model: VLM, prompt: Prompt, source: SampleSource) -> str | None:
    """How questions about one image are read, where ``collate.questions`` asks for another way than as they are.

    Args:
        cfg: the configuration.
        model: the stage's.
        prompt: of the stage.
        source: its samples.
    """
    wanted = OmegaConf.select(cfg, "collate.questions") or "conversation"
    found, why = read_questions(cfg, model, prompt)
    if why:
        otherwise = "; collate.questions=whole keeps conversations" if wanted == "conversation" else ""
        return f"note: collate.questions={wanted}: {WORDS[found]} here, since {why}{otherwise}"
    if found == "conversation":
        return None
    several = [leading_tags(sample) is not None for sample in _first(source) if len(sample.turns) > 1]
    looked, apart = min(LOOKED_AT, len(source)), sum(several)
    line = f"collate.questions={found}: {WORDS[found]}, as {apart} of the first {looked} samples"
    kept = len(several) - apart
    return line if not kept else f"{line}; {kept} stay conversations (no image, or one elsewhere than at the beginning)"


def _first(source: SampleSource) -> Iterator[Sample]:
    for index in range(min(LOOKED_AT, len(source))):
        try:
            yield source[index]
        except DataError:  # said by anyone who trains on it
            continue
