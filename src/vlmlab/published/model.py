"""A folder or hub id of a published model: what it is to the lab, or why it cannot be taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from transformers import (
    Blip2Config,
    Idefics2Config,
    InstructBlipConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Ovis2Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

from vlmlab.contracts.errors import UserError, brief, listed
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.chat import ChatEncoder
from vlmlab.encoder.families import sides
from vlmlab.encoder.preprocess import PADS, Preprocess, read_preprocess, settings_of
from vlmlab.published.base import Keys, Published
from vlmlab.published.blip2 import Blip2
from vlmlab.published.idefics2 import Idefics2
from vlmlab.published.llava import Llava
from vlmlab.published.llava_onevision import LlavaOnevision
from vlmlab.published.ovis2 import Ovis2
from vlmlab.published.paligemma import PaliGemma
from vlmlab.towers.blueprint import SAFE, open_config, open_tokenizer, readable
from vlmlab.towers.source import quiet, resolve

KNOWN: Mapping[type[PreTrainedConfig], Published] = {
    LlavaConfig: Llava(),
    LlavaOnevisionConfig: LlavaOnevision(),
    Blip2Config: Blip2(),
    PaliGemmaConfig: PaliGemma(),
    Idefics2Config: Idefics2(),
    Ovis2Config: Ovis2(),
}
"""What can be taken apart, by the class of its config."""

REFUSED: Mapping[type[PreTrainedConfig], str] = {
    LlavaNextConfig: "it cuts images into tiles with a learned token after every row, which no connector here does",
    InstructBlipConfig: "its Q-Former reads the instruction in BERT's words, and connectors here in the LM's",
    Qwen2VLConfig: "it reads images at their own sizes and has positions in three dimensions",
    Qwen2_5_VLConfig: "it reads images at their own sizes and has positions in three dimensions",
}
"""Why others cannot."""

TILES = ("do_image_splitting", "crop_to_patches", "image_grid_pinpoints")
"""Keys of processors that cut images into tiles."""

NEW_TOKEN = "<|image|>"
"""The placeholder of a model that has none of its own; it is added at the end of the vocabulary."""


@dataclass(frozen=True)
class Found:
    """A published model that can be taken apart.

    Attributes:
        path: as it was given.
        folder: where it is.
        plan: what its class is to the lab.
        config: its own.
        keys: the keys that compose the same model, without the places of its towers.
        tokenizer: with a chat template.
        preprocess: how an image becomes pixels.
        notes: what is not as in the published model.
    """

    path: str
    folder: Path
    plan: Published
    config: Any
    keys: Keys
    tokenizer: PreTrainedTokenizerBase
    preprocess: Preprocess
    notes: tuple[str, ...]

    def words(self, to: Path) -> list[str]:
        """The words of a command line that compose the same model from the run's own folder."""
        places = {"encoder": "hf", "encoder.path": str(to / "encoder"), "lm": "hf", "lm.path": str(to / "lm")}
        fixed = {"fusion": "concat", "adapter": "none", "recipe": "published"}
        return [f"{key}={_word(value)}" for key, value in (places | self.keys | fixed).items()]

    def load(self) -> PreTrainedModel:
        """The model with its weights in their own dtype.

        Raises:
            UserError: weights that it needs are missing.
        """
        with quiet(), readable("weights", self.folder, self.path, "path"):
            loaded: Any = self.plan.model.from_pretrained(
                self.folder, config=self.config, dtype="auto", output_loading_info=True, **SAFE
            )
        model, info = loaded
        if info["missing_keys"]:
            raise UserError(f"path={self.path} lacks {listed(sorted(info['missing_keys']), 80)} of its weights.")
        found: PreTrainedModel = model.eval()
        return found


def find(path: str, chat_template: str | None = None, image_size: Any = None) -> Found:
    """Look at a published model without its weights.

    Args:
        path: local folder or hub id.
        chat_template: Jinja text, or a file that has it, for messages whose content is text; None: the tokenizer's own.
        image_size: pixels per side, or [height, width], that images are brought to; None: as its processor says.

    Raises:
        UserError: it is not there, cannot be read, is of a class that cannot be taken apart, has something that the
            lab's parts do not reproduce, or needs one of the other arguments.
    """
    folder = resolve(path, "path")
    config: Any = open_config(folder, path, "path")
    plan = _plan(config, path)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"path={brief(path, 90)} has quantised weights; give the model as it was before.")
    try:
        keys = plan.keys(config)
    except UserError as error:
        raise _refused(config, path, str(error).rstrip(".")) from error
    tokenizer = open_tokenizer(folder, path, "path")
    token = _image_token(config, tokenizer)
    _set_template(tokenizer, token, chat_template, path)
    preprocess, square = _preprocess(plan, folder, path, image_size)
    notes = tuple(_notes(plan, preprocess, chat_template))
    keys |= _of_the_lab(config) | ({"encoder.square": True} if square else {}) | {"lm.image_token": token}
    return Found(path, folder, plan, config, keys, tokenizer, preprocess, notes)


def _of_the_lab(config: Any) -> Keys:
    """The mask that a model of ours was written with, which its class does not say."""
    said = getattr(config, "vlmlab", None)
    mask = said.get("mask") if isinstance(said, dict) else None
    return {"mask": mask} if isinstance(mask, str) and mask.isidentifier() else {}


def _plan(config: PreTrainedConfig, path: str) -> Published:
    plan = KNOWN.get(type(config))
    if plan is not None:
        return plan
    if type(config) in REFUSED:
        raise _refused(config, path, REFUSED[type(config)])
    known = ", ".join(each.model.__name__ for each in KNOWN.values())
    raise UserError(
        f"path={brief(path, 90)} is a {type(config).__name__.removesuffix('Config')}, which vlmlab does not take "
        f"apart; give one of {known}."
    )


def _refused(config: PreTrainedConfig, path: str, why: str) -> UserError:
    name = type(config).__name__.removesuffix("Config")
    return UserError(f"path={brief(path, 90)}: this {name} cannot be made of vlmlab's parts: {why}.")


def _image_token(config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token whose embedding the published model replaces by visual tokens."""
    number = getattr(config, "image_token_id", None)
    token = None if number is None or number >= len(tokenizer) else tokenizer.convert_ids_to_tokens(number)
    return token if isinstance(token, str) else NEW_TOKEN


def _set_template(tokenizer: PreTrainedTokenizerBase, image_token: str, given: str | None, path: str) -> None:
    """Give the tokenizer a chat template that works.

    Raises:
        UserError: it has none, or one that cannot be used here, as that of a processor whose messages are lists.
    """
    if given is not None:
        file = Path(given).expanduser()
        is_file = "{" not in given and file.is_file()
        tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else given
    tokenizer.name_or_path = Path(path).name  # in messages
    why = "has no chat template"
    if tokenizer.eos_token_id is None:
        raise UserError(f"path={brief(path, 90)}: its tokenizer has no end token, by which answers end.")
    if tokenizer.chat_template is not None:
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        try:
            encoder = ChatEncoder(tokenizer, image_token, 2)
            encoder.train(Sample("template", (np.zeros((2, 2, 3), np.uint8),), (Turn("question", "answer"),)))
            if encoder.stops:
                return
        except UserError as error:
            why = f"has no usable chat template ({brief(str(error).partition(';')[0], 110)})"
    raise UserError(
        f"path={brief(path, 60)} {why}; give chat_template=<Jinja text or a file of it> for messages of plain text."
    )


def _preprocess(plan: Published, folder: Path, path: str, image_size: Any) -> tuple[Preprocess, bool]:
    """That of the published processor, or with one size in place of its tiles and native sizes.

    Returns:
        It, and whether images are padded to squares first, which is a key of the encoder.

    Raises:
        UserError: it has no single size and none was given.
    """
    file, raw = settings_of(folder)
    square = bool(raw.get("do_pad")) and str(raw.get("image_processor_type")).startswith(PADS)
    if square:
        raw = raw | {"do_pad": False}
    if image_size is not None:
        plain = {key: value for key, value in raw.items() if key not in ("do_pad", "crop_size", "do_center_crop")}
        height, width = sides(image_size)
        return read_preprocess(folder, (file, {**plain, "size": {"height": height, "width": width}})), square
    if plan.tiled and {"height", "width"} <= set(raw.get("size") or ()):
        raw = raw | {"do_pad": False}  # what is of one size needs no padding
    tiles = next((key for key in TILES if raw.get(key)), None)
    if tiles is not None:
        raise UserError(
            f"path={brief(path, 90)}: its processor cuts images into tiles ({tiles}), which vlmlab does not; give "
            "image_size=<pixels> to bring every image to one size."
        )
    try:
        return read_preprocess(folder, (file, raw)), square
    except UserError as error:
        if not plan.tiled:
            raise
        raise UserError(
            f"path={brief(path, 90)}: its processor gives images no single size; give image_size=<pixels> to bring "
            "every image to one."
        ) from error


def _notes(plan: Published, preprocess: Preprocess, chat_template: str | None) -> Iterator[str]:
    if plan.tiled:
        size = f"{preprocess.height}x{preprocess.width}"
        yield f"every image is brought to {size} pixels; the published processor may cut it into tiles or keep its size"
    if chat_template is None:
        yield "prompts are those of the tokenizer's chat template; what the published processor writes may differ"


def _word(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if isinstance(value, str) and not value.replace("_", "").isalnum():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value)).replace(" ", "") if OmegaConf.is_list(value) or isinstance(value, list) else str(value)
