"""What a published model is to the lab: the keys that compose the same model, and where its weights go."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Mask
from vlmlab.encoder.families import attention_of, family, reading, sides
from vlmlab.encoder.preprocess import PADS, Preprocess, processor_of
from vlmlab.model.vlm import VLM
from vlmlab.published.mask_code import is_causal
from vlmlab.published.prompts import with_parts

Keys = dict[str, Any]
"""Keys of a composition and their values, as they are given to training."""


class Published(ABC):
    """One class of transformers.

    Attributes:
        model: the class.
        tiled: the published processor cuts images into tiles, or keeps their sizes; here they are brought to one.
    """

    model: type[PreTrainedModel]
    tiled: bool = False

    @abstractmethod
    def keys(self, config: Any) -> Keys:
        """The groups and keys that compose the same model: encoder, connector and mask.

        Raises:
            UserError: it has something that no key says.
        """

    @abstractmethod
    def tower(self, model: Any) -> PreTrainedModel:
        """The vision tower."""

    @abstractmethod
    def lm(self, model: Any) -> PreTrainedModel:
        """The causal language model."""

    @abstractmethod
    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """The connector's weights by the names of ours."""


class Exportable(Published):
    """One class of transformers that compositions can also be exported as.

    Attributes:
        goes_on: its ``generate`` goes on from a prompt whose keys and values are given.
        alone: its own mask is that of conversations of one question, whose tokens it is told by ``token_type_ids``.
    """

    goes_on: bool = True
    alone: bool = False

    def follows(self, mask: Mask) -> bool:
        """Whether its own ``generate`` sees what this mask says: here, where that is all up to the token itself."""
        return is_causal(mask)

    @abstractmethod
    def lacks(self, model: VLM) -> str | None:
        """Why this class is not a composition of ours, as what it "has only"; None: it is the same model."""

    @abstractmethod
    def config_of(self, model: VLM, tower: PreTrainedModel) -> PreTrainedConfig:
        """The class's config for a composition that lacks nothing.

        Args:
            model: the composition.
            tower: its vision tower, with every layer.
        """

    @abstractmethod
    def place(self, whole: Any, model: VLM, tower: PreTrainedModel) -> None:
        """Put the composition's modules into a model of this class that has no values yet, and give it a connector's.

        Args:
            whole: made of ``config_of``, on the meta device.
            model: the composition, whose modules it shares from now on.
            tower: its vision tower, with every layer.
        """

    def processor(self, model: VLM) -> ProcessorMixin:
        """Image processor, tokenizer and template, which write as many placeholders as the model has tokens.

        Args:
            model: a composition that lacks nothing.
        """
        encoder: Any = model.encoder
        tokenizer = model.lm.plain_tokenizer
        tokenizer.padding_side = "left"
        every, patch = model.tokens_per_image, encoder.patch
        rows, columns = encoder.preprocess.height // patch, encoder.preprocess.width // patch
        drops = not encoder.class_token and encoder.special == 1
        return LlavaProcessor(
            image_processor=image_processor(encoder.preprocess),
            tokenizer=tokenizer,
            patch_size=patch,
            num_additional_image_tokens=every - rows * columns + drops,
            vision_feature_select_strategy="default" if drops else "full",
            image_token=model.lm.image_token,
            chat_template=with_parts(tokenizer, model.lm.image_token),
        )


def image_processor(preprocess: Preprocess, kind: str | None = None, **more: Any) -> Any:
    """The image processor of transformers that gives the same pixels.

    Args:
        preprocess: the composition's.
        kind: its class; None: SigLIP's, CLIP's, or for images padded to squares LLaVA's.
        more: further settings.
    """
    with tempfile.TemporaryDirectory() as place:
        preprocess.save(Path(place), kind or (PADS if preprocess.square else processor_of(preprocess)))
        return AutoImageProcessor.from_pretrained(place, backend="pil", **more)


def causal_lm(base: PreTrainedModel, head: nn.Linear) -> PreTrainedModel:
    """A language model and its head, which a published model keeps apart, as one causal LM; nothing is copied.

    Args:
        base: the layers.
        head: the linear layer after them; it is the table again where the two are equal.

    Raises:
        UserError: they are of different numbers of words.
    """
    table: Any = base.get_input_embeddings()
    config, words = base.config, table.weight
    if words.shape != head.weight.shape:
        raise UserError(f"its head is of shape {tuple(head.weight.shape)} and its table of {tuple(words.shape)}.")
    config.tie_word_embeddings = torch.equal(words, head.weight)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, dtype=base.dtype, trust_remote_code=False)
    setattr(whole, whole.base_model_prefix, base)
    whole.set_output_embeddings(head)
    if config.tie_word_embeddings:
        head.weight = words
    return whole


def before_patches(vision: PreTrainedConfig) -> int:
    """Tokens that a tower of this config has before its patches (class, registers)."""
    settings, kind = family(vision, "path")
    make: Any = kind._from_config
    with torch.device("meta"):
        tower = make(settings, attn_implementation=attention_of(kind))
    return reading(tower, sides(settings.image_size), None, pooled=False).special


def only(config: Any, what: str, **wanted: Any) -> None:
    """Refuse a config that says something else than what is reproduced here.

    Args:
        config: of the model or a part of it.
        what: the part, in words.
        wanted: its keys and the one value that each may have.

    Raises:
        UserError: names the first key and its value.
    """
    for key, value in wanted.items():
        if getattr(config, key, value) != value:
            raise UserError(f"{what} has {key}={getattr(config, key)}, and here it can only be {value}")


def plain_lm(model: VLM) -> str | None:
    """Why no composite class holds a language model, as what it "has"; None: it is layers, then a linear head.

    transformers' composite classes hold the layers as ``AutoModel`` makes them and a head without a bias beside them.
    """
    whole: Any = model.lm
    lm = whole.model
    if lm.get_output_embeddings().bias is not None:
        return "has a head without a bias"
    if getattr(lm.config, "final_logit_softcapping", None) is not None:
        return "caps no logits"
    with torch.device("meta"):
        twin = AutoModel.from_config(lm.config, trust_remote_code=False)
    own = {name for name, _ in lm.base_model.named_parameters()}
    same = type(twin) is type(lm.base_model) and own == {name for name, _ in twin.named_parameters()}
    return None if same else f"has only language models that AutoModel makes, and not {type(lm).__name__}"


def auto_tower(tower: PreTrainedModel) -> bool:
    """Whether ``AutoModel`` makes this tower of its config, as transformers' composite classes have it made."""
    found: Any = AutoModel._model_mapping.get(type(tower.config), None)  # a ValueError would list every model there is
    return found is type(tower)
