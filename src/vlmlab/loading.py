"""``vlmlab.load(run)``: the model of a finished run, ready to be asked, whatever was trained.

import vlmlab
model = vlmlab.load("outputs/default")
print(model.generate("photo.jpg", "What is on the table?"))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image as Pillow
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from vlmlab.contracts.errors import UserError, listed, reason
from vlmlab.contracts.sample import IMAGE_TAG, Image, Sample, Turn
from vlmlab.data.images import named_image
from vlmlab.data.pixels import from_pillow, value_range
from vlmlab.engine import rng
from vlmlab.engine.device import device_of
from vlmlab.engine.restore import load_trained
from vlmlab.evaluate.attention import Attention, attention
from vlmlab.model.build import build_collator
from vlmlab.model.likelihood import Likelihood, option_likelihoods
from vlmlab.model.questions import unequal_in_options
from vlmlab.model.vlm import VLM
from vlmlab.runs.folder import RunFolder, of_transformers
from vlmlab.runs.trust import building, saved_config

Picture: TypeAlias = "str | Path | Pillow.Image | Image"
"""A file, a Pillow image, or (H, W, 3) uint8."""

NEW_TOKENS = 64
WHY_NOT = {
    "the answer is one text": "return_dict_in_generate output_scores output_logits output_attentions "
    "output_hidden_states",
    "max_new_tokens says it, without the prompt": "max_length",
    "the prompt is embeddings and has no token ids": "guidance_scale negative_prompt_ids "
    "negative_prompt_attention_mask token_healing encoder_repetition_penalty encoder_no_repeat_ngram_size bos_token_id "
    "decoder_start_token_id forced_bos_token_id prefill_chunk_size assistant_model assistant_tokenizer "
    "assistant_early_exit prompt_lookup_num_tokens max_matching_ngram_size is_assistant use_mtp num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind "
    "assistant_ensemble_weight speculation_type",
    "it is code from outside transformers": "num_beam_groups diversity_penalty constraints force_words_ids "
    "penalty_alpha dola_layers low_memory custom_generate trust_remote_code",
    "it is made from the question, the images and the options": "inputs input_ids inputs_embeds attention_mask "
    "position_ids past_key_values generation_config tokenizer synced_gpus transformers_version "
    "continuous_batching_config",
    "the masks go with caches that keep everything": "cache_config max_cache_len compile_config",
}
REFUSED = {name: why for why, names in WHY_NOT.items() for name in names.split()}
"""Options of transformers' ``generate`` that cannot be had here, and why."""

KEPT_WHOLE = (None, "dynamic", "static")
"""What ``cache_implementation`` may be."""

ABSENT = object()


def load(
    run: str | Path, overrides: Mapping[str, Any] | None = None, device: str = "auto", trust: bool = False
) -> LoadedModel:
    """The trained model of a run, after its last stage, in evaluation mode.

    The run's folder may have been moved. Towers that were given by a path are read from there again and must have the
    same weights; where they have moved as well, say so: ``load(run, {"lm.path": "new/place"})``.

    Args:
        run: the folder that training printed.
        overrides: keys of the run's configuration with other values.
        device: "auto", "cpu", "cuda" or "cuda:1".
        trust: also make classes from outside vlmlab that the run's configuration names, and print which. That is code
            of the folder's author.

    Raises:
        UserError: no folder of a run, a key that the run does not have, a device that is not there, or a class from
            outside vlmlab without `trust`.
        CheckpointError: the run is not finished, or its weights do not fit its towers.
    """
    folder = RunFolder(Path(run).expanduser())
    if (sentence := of_transformers(folder)) is not None:
        raise UserError(sentence)
    folder.finished()
    cfg = saved_config(folder.path, trust)
    for key, value in (overrides or {}).items():
        if OmegaConf.select(cfg, key, default=ABSENT) is ABSENT:
            raise UserError(f"{key} is not a key of {folder.path}; its config.yaml has them all.")
        OmegaConf.update(cfg, key, value)
    target = device_of(device)
    with _same_random_numbers(), building(folder.path):
        model = load_trained(cfg, folder.path)
        if not isinstance(model, VLM):
            raise UserError(
                f"{folder.path} ends with two towers, which answer no question; score them by evaluate.py, or begin a "
                "model with their encoder (conf/recipe/contrastive_then_vlm.yaml)."
            )
        return LoadedModel(model.to(target), cfg)


class LoadedModel:
    """A trained composition that answers questions about images.

    Attributes:
        model: the ``VLM``.
        config: the run's configuration.
    """

    def __init__(self, model: VLM, config: DictConfig) -> None:
        self.model = model
        self.config = config
        self._collator = build_collator(config, model, "chat")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def generate(
        self,
        image: Picture | Sequence[Picture] | None,
        question: str,
        *,
        max_new_tokens: int = NEW_TOKENS,
        system: str = "",
        history: Sequence[tuple[str, str]] = (),
        stream: Callable[[str], None] | None = None,
        **options: Any,
    ) -> str:
        """The answer to one question, in the chat template the model was trained with; greedy unless options say more.

        Args:
            image: one image, several in the order of their tags, or None.
            question: the user's words; ``<image>`` where an image is, without tags all come before the words.
            max_new_tokens: most tokens of the answer.
            system: the system line; empty keeps the template's own.
            history: earlier questions of the conversation with their answers; the images come before the first.
            stream: is given the answer's text piece by piece while it is made; not with beams.
            options: of transformers' ``generate``, as in ``do_sample=True, temperature=0.7, top_p=0.9``. The language
                model's own ``generation_config.json`` says nothing here.

        Raises:
            UserError: an image that cannot be used, tags that do not fit the images, an option that is unknown or
                cannot be had, or one that transformers refuses.
        """
        sample = self._sample(image, [*history, (question, "")], system)
        _check_options(options, self.model)
        options = {name: value for name, value in options.items() if name not in REFUSED}
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} is not possible; give a whole number of at least 1.")
        if stream is not None:
            options["streamer"] = _Pieces(self.model.lm.tokenizer, stream)
        batch = self._collator.ask([sample]).to(self.device)
        try:
            return self.model.generate(batch, max_new_tokens, **options)[0]
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not options:
                raise
            raise UserError(
                f"{listed(options, 80)}: transformers' generate does not take that ({reason(error)}); give another "
                "value."
            ) from error

    def check_image(self, image: Picture) -> None:
        """Refuse an image that ``generate`` would refuse.

        Raises:
            UserError: it cannot be used.
        """
        self._sample(image, [("", "")], "")

    def probabilities(
        self, image: Picture | Sequence[Picture] | None, question: str, answer: str, *, system: str = ""
    ) -> list[tuple[str, float]]:
        """How probable each token of an answer is after those before it, as the model reads the answer in one pass.

        Args:
            image: as for ``generate``.
            question: likewise.
            system: likewise.
            answer: the text, cut into tokens as in training.

        Returns:
            (token, probability), the token that ends the answer included.

        Raises:
            UserError: as ``generate`` of its image and question; an answer without a token.
        """
        found = self.attention(image, question, answer, system=system)
        return list(zip(found.tokens, found.probabilities, strict=True))

    def attention(
        self, image: Picture | Sequence[Picture] | None, question: str, answer: str, *, system: str = ""
    ) -> Attention:
        """What each token of an answer looks at in the images, as the model reads the answer in one pass.

        Args:
            image: as for ``generate``.
            question: likewise.
            system: likewise.
            answer: the text, cut into tokens as in training.

        Returns:
            The tokens, the one that ends the answer included, with their probabilities and attention weights.

        Raises:
            UserError: as ``generate`` of its image and question; an answer without a token.
        """
        batch = self._collator([self._sample(image, [(question, answer)], system)]).to(self.device)
        return attention(self.model, batch)

    def likelihood(
        self,
        image: Picture | Sequence[Picture] | None,
        question: str,
        options: Sequence[str],
        *,
        system: str = "",
        history: Sequence[tuple[str, str]] = (),
    ) -> list[float]:
        """The log-likelihood of each of some answers, in nats, its end included; the prompt is read once.

        Where the mask does not let answers share their prompt, each has a row of its own; the numbers are the same.

        Args:
            image: as for ``generate``.
            question: likewise.
            options: the answers, as in ``["yes", "no"]``.
            system: as for ``generate``.
            history: likewise.

        Returns:
            One number an option, in their order: the sum over its tokens.

        Raises:
            UserError: as ``generate`` of its image and question; no options, or an empty one.
        """
        return [found.log for found in self.likelihoods(image, question, options, system=system, history=history)]

    def likelihoods(
        self,
        image: Picture | Sequence[Picture] | None,
        question: str,
        options: Sequence[str],
        *,
        system: str = "",
        history: Sequence[tuple[str, str]] = (),
    ) -> list[Likelihood]:
        """As ``likelihood``, each with whether it is what greedy decoding would say."""
        if isinstance(options, str) or not options or not all(isinstance(o, str) and o.strip() for o in options):
            raise UserError(f"options={options!r} has no answers to choose from; give a list of texts, none empty.")
        sample = self._sample(image, [*history, (question, "")], system)
        turns = (*sample.turns[:-1], replace(sample.turns[-1], options=tuple(options)))
        shared = unequal_in_options(self.model) is None
        asked = [replace(sample, turns=turns)]
        return option_likelihoods(self.model, self._collator, asked, len(options), shared)[0]

    def _sample(
        self, image: Picture | Sequence[Picture] | None, turns: Sequence[tuple[str, str]], system: str
    ) -> Sample:
        """The conversation as a row of data."""
        images = _images(image, OmegaConf.select(self.config, "data.image_range"))
        tags = sum(question.count(IMAGE_TAG) for question, _ in turns)
        if tags not in (0, len(images)):
            raise UserError(
                f"the question has {_count(tags, IMAGE_TAG + ' tag')} and there {_are(len(images))}; give as many "
                "images as tags, or leave the tags out: the images then come before the question."
            )
        if images and self.model.encoder is None:
            raise UserError("this run has no vision (its fusion reads no images); give None for the image.")
        return Sample("question", images, tuple(Turn(question, answer) for question, answer in turns), system)

    def __repr__(self) -> str:
        parts = (self.config.get(name) for name in ("encoder", "connector", "fusion", "lm", "mask"))
        names = [str(part.get("_target_", "?")).rsplit(".", 1)[-1] for part in parts if part is not None]
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return f"LoadedModel({', '.join(names)}; {size:,} parameters on {self.device})"


class _Pieces(TextStreamer):
    """Hands text on as soon as it is whole words or characters; the prompt has no token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hand_on: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)  # type: ignore[arg-type]
        self.hand_on = hand_on

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        if text:
            self.hand_on(text)


def read_image(image: Picture, model: LoadedModel) -> Image:
    """(H, W, 3) uint8 as a model is given it, by the rules and limits that its training's own files are read with.

    Raises:
        UserError: it cannot be used.
    """
    return _image(image, OmegaConf.select(model.config, "data.image_range"))


def _images(given: Picture | Sequence[Picture] | None, values: Any) -> tuple[Image, ...]:
    if given is None:
        return ()
    several = given if isinstance(given, (list, tuple)) else [given]
    return tuple(_image(one, values) for one in several)


def _image(given: Any, values: Any = None) -> Image:
    """(H, W, 3) uint8, by the rules that training's own files are read with."""
    if isinstance(given, (str, Path)):
        return named_image(given, values or "auto")
    if isinstance(given, Pillow.Image):
        try:
            return from_pillow(given, value_range(values))
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise UserError(
                f"the image of mode {given.mode} cannot be read ({reason(error)}); convert it to RGB."
            ) from None
    if isinstance(given, np.ndarray):
        if given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3 and given.size:
            return given
        raise UserError(f"the image is an array of {given.dtype} {given.shape}; give uint8 of shape (H, W, 3).")
    raise UserError(f"the image is a {type(given).__name__}; give a path, a Pillow image, a (H, W, 3) array, or None.")


def _check_options(options: Mapping[str, Any], model: VLM) -> None:
    """An unknown option in one sentence; transformers has a paragraph, after the prompt is read."""
    decode: Any = model.lm.model.generate
    known = {*vars(GenerationConfig()), *inspect.signature(decode).parameters} - {"kwargs"}
    for name, value in options.items():
        if name in REFUSED and value is not None and value is not False:
            raise UserError(f"{name} is not possible here: {REFUSED[name]}; leave it out.")
        if (name not in known and name not in REFUSED) or name.startswith("_"):
            raise UserError(f"{name} is not an option of transformers' generate; see its GenerationConfig.")
        if name == "num_return_sequences" and value not in (None, 1):
            raise UserError(f"num_return_sequences={value} is not possible, the answer is one text; ask several times.")
        if name == "cache_implementation" and value not in KEPT_WHOLE:
            raise UserError(f"cache_implementation={value} is not possible here; leave it out, or use dynamic.")


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _are(images: int) -> str:
    return f"{'is' if images == 1 else 'are'} {_count(images, 'image')}"


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Building a model seeds every generator; the caller keeps the random numbers they had."""
    before = rng.state()
    try:
        yield
    finally:
        rng.restore(before)
