"""A finished run in lmms-eval (version 0.7): ``lmms-eval --model vlmlab --model_args run=outputs/<name> --tasks ...``.

lmms-eval finds it by the entry point ``lmms_eval.models`` of this package, which imports this file only where lmms-eval
is installed. Runs under any mask and fusion are asked as ``vlmlab.load`` asks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def manifest() -> Any:
    """What the entry point gives."""
    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.{VlmlabChat.__name__}")


class VlmlabChat(lmms):  # type: ignore[misc]
    """A finished run as a chat model.

    Args:
        run: the run folder.
        device: as for ``vlmlab.load``; lmms-eval's "cuda" where there is none is "auto".
        trust: as for ``vlmlab.load``.
        batch_size: one question is asked at a time, whatever it is.
        others: of lmms-eval's own, which say nothing here.

    Raises:
        UserError: as ``vlmlab.load``.
    """

    is_simple = False

    def __init__(self, run: str, device: str = "auto", trust: bool = False, batch_size: Any = 1, **others: Any) -> None:
        super().__init__()
        import torch

        there = "auto" if device.startswith("cuda") and not torch.cuda.is_available() else device
        self.loaded = load(run, device=there, trust=trust)
        self.batch_size = 1

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
        """Refused: options are not scored by their likelihood.

        Raises:
            UserError: always.
        """
        raise UserError("vlmlab answers by generation; choose tasks of output_type generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refused: what a later round asks depends on code of the task.

        Raises:
            UserError: always.
        """
        raise UserError("vlmlab answers single rounds; choose tasks of output_type generate_until.")

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
        given = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
        if not given.get("temperature"):
            given = {key: value for key, value in given.items() if key not in ("do_sample", "temperature", "top_p")}
        answer = self.loaded.generate(
            images, said[-1], max_new_tokens=settings.get("max_new_tokens") or NEW_TOKENS, system=system,
            history=history, **given,
        )  # fmt: skip
        for stop in _stops(settings):
            answer = answer.split(stop)[0]
        return answer.strip()


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
