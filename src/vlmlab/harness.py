"""A finished run in lmms-eval (version 0.7): ``lmms-eval --model vlmlab --model_args run=outputs/<name> --tasks ...``.

lmms-eval finds it by the entry point ``lmms_eval.models`` of this package, which imports this file only where lmms-eval
is installed. Runs under any mask and fusion are asked as ``vlmlab.load`` asks them. Its tasks of output_type
multiple_choice or loglikelihood go to models of its older interface alone: ``--force_simple`` takes that one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image as Pillow

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.loading import NEW_TOKENS, load

NAME = "vlmlab"
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
"""What of a task's generation settings is handed on; a temperature of 0 is greedy."""

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")
"""Endings of images that are given by their path."""


def manifest() -> Any:
    """What the entry point gives."""
    paths = {"chat_class_path": VlmlabChat.__name__, "simple_class_path": VlmlabSimple.__name__}
    return ModelManifest(model_id=NAME, **{key: f"{__name__}.{name}" for key, name in paths.items()})


class _Run(lmms):  # type: ignore[misc]
    """A finished run.

    Args:
        run: the run folder.
        device: as for ``vlmlab.load``; lmms-eval's "cuda" where there is none is "auto".
        trust: as for ``vlmlab.load``.
        batch_size: one question is asked at a time, whatever it is.
        others: of lmms-eval's own, which say nothing here.

    Raises:
        UserError: as ``vlmlab.load``.
    """

    def __init__(self, run: str, device: str = "auto", trust: bool = False, batch_size: Any = 1, **others: Any) -> None:
        super().__init__()
        import torch

        there = "auto" if device.startswith("cuda") and not torch.cuda.is_available() else device
        self.loaded = load(run, device=there, trust=trust)
        self.batch_size = 1

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refused: what a later round asks depends on code of the task.

        Raises:
            UserError: always.
        """
        raise UserError("vlmlab answers single rounds; choose tasks of output_type generate_until.")

    def _said(
        self,
        images: Sequence[Any],
        question: str,
        settings: Mapping[str, Any],
        system: str = "",
        history: Sequence[tuple[str, str]] = (),
    ) -> str:
        """An answer under a task's settings."""
        given = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
        if not given.get("temperature"):
            given = {key: value for key, value in given.items() if key not in ("do_sample", "temperature", "top_p")}
        answer = self.loaded.generate(
            images, question, max_new_tokens=settings.get("max_new_tokens") or NEW_TOKENS, system=system,
            history=history, **given,
        )  # fmt: skip
        for stop in _stops(settings):
            answer = answer.split(stop)[0]
        return answer.strip()


class VlmlabChat(_Run):
    """A finished run as a chat model; its arguments are those of every model here."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            UserError: a video or a sound, or an option that generation does not take.
        """
        answers = []
        for request in requests:
            _, messages, settings, index, task, split = request.args
            asked = ChatMessages(messages=messages(self.task_dict[task][split][index])).model_dump()["messages"]
            answers.append(self._answer(asked, settings))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refused: lmms-eval gives chat models no options.

        Raises:
            UserError: always.
        """
        raise UserError("lmms-eval's chat models are given no options; add --force_simple for this task.")

    def _answer(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
        images: list[Any] = []
        system, said = "", []
        for message in messages:
            words = "".join(_words(part, images) for part in message["content"])
            if message["role"] == "system":
                system = words
            else:
                said.append(words)
        history = list(zip(said[:-1:2], said[1::2], strict=True))
        return self._said(images, said[-1], settings, system, history)


class VlmlabSimple(_Run):
    """A finished run under lmms-eval's older interface (``--force_simple``): a text and its images, and options."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            UserError: a video or a sound, or an option that generation does not take.
        """
        asked = (request.args for request in requests)
        return [self._said(self._images(*place), text, settings) for text, settings, *place in asked]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of every continuation how unlikely it is, and whether it is what greedy decoding would say.

        The answers to one question that follow each other are branches of one prompt. The end of an answer counts, and
        blanks around it do not. For multiple_choice lmms-eval takes the option with the *lowest* number (its models
        return losses), so that it is given minus the log-likelihood; for the output_type loglikelihood, whose
        perplexity is exp of minus the mean, the log-likelihood itself.

        Raises:
            UserError: a video or a sound, an empty continuation, or a request without its question (acc_mutual_info).
        """
        found: list[tuple[float, bool]] = []
        for (text, *where), group in groupby(requests, key=_question):
            some = [request.args for request in group]
            doc = self._doc(*where)
            images = self._images(some[0][2], *where)
            words = [target(doc) if callable(target) else target for _, target, *_ in some]
            each = self.loaded.likelihoods(images, text, [str(word).strip() for word in words])
            signs = [1 if callable(target) else -1 for _, target, *_ in some]
            found += [(sign * one.log, one.greedy) for sign, one in zip(signs, each, strict=True)]
        return found

    def _doc(self, index: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][index]

    def _images(self, visuals: Any, index: Any, task: str, split: str) -> list[Any]:
        """The images of a question."""
        given = visuals(self._doc(index, task, split)) or []
        return [_picture(one) for one in given]


def _question(request: Any) -> tuple[Any, ...]:
    """What the answers to one question have in common: its text and its place."""
    if len(request.args) != 6:
        raise UserError("an option comes without its question (acc_mutual_info), which vlmlab does not score.")
    text, _, _, index, task, split = request.args
    return text, index, task, split


def _picture(given: Any) -> Any:
    """An image as ``vlmlab.load`` takes it: of Pillow in RGB, or a path."""
    if isinstance(given, Pillow.Image):
        return given.convert("RGB")
    if isinstance(given, str) and given.lower().endswith(PICTURES):
        return given
    raise UserError(f"a question has a {type(given).__name__} that is not an image; vlmlab reads text and images.")


def _words(part: Mapping[str, Any], images: list[Any]) -> str:
    """The text of a part of a message; an image is kept aside, and its tag is what is written."""
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] != "image":
        raise UserError(f"a question has a {part['type']}; vlmlab reads text and images.")
    url = part["url"]
    images.append(url.convert("RGB") if isinstance(url, Pillow.Image) else url)
    return IMAGE_TAG


def _stops(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]
