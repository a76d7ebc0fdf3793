"""Export of a composition as a transformers model, which opens without vlmlab and is checked to be the same.

<folder>/config.json, model.safetensors, generation_config.json
<folder>/processor_config.json, tokenizer.json, chat_template.jinja
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image as Pillow
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel

from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Batch, Role
from vlmlab.data.chat import NEXT, TURN
from vlmlab.data.collate import Collator
from vlmlab.encoder.families import sides
from vlmlab.encoder.tower import TowerEncoder
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM
from vlmlab.published.base import Exportable
from vlmlab.published.blip2 import Blip2
from vlmlab.published.idefics2 import Idefics2
from vlmlab.published.llava import Llava
from vlmlab.published.mask_code import code, needs_answers
from vlmlab.published.paligemma import PaliGemma
from vlmlab.published.prompts import conversation
from vlmlab.towers.source import quiet, save_tower

CLASSES: tuple[Exportable, ...] = (Llava(), PaliGemma(), Idefics2(), Blip2())
"""What is written: the first that is the same model and follows its mask by itself, or else the first."""

CLOSE = 1e-5
"""How far logits may be from ours, for every unit of the largest."""

PICTURE = (50, 70)
"""A picture that has to be resized, to prove the processor."""


@dataclass(frozen=True)
class ExportRoute:
    """How a composition is exported.

    Attributes:
        plan: the transformers class that it becomes.
        sees: the card's function that builds the attention mask of a prompt; None: plain causal attention.
        many: whether that function has to know where earlier answers are.
    """

    plan: Exportable
    sees: str | None
    many: bool


@dataclass(frozen=True)
class ExportCheck:
    """The result of opening the folder by transformers alone.

    Attributes:
        worst: largest difference of a logit.
        largest: largest logit.
        turns: whether the prompt of a later question is token by token ours, too, and seen as ours.
        dtype: what the weights are in.
        halves: whether some were in less.
    """

    worst: float
    largest: float
    turns: bool
    dtype: str
    halves: bool


def export_route(model: VLM) -> ExportRoute:
    """Which class of transformers a composition with merged adapters is.

    Raises:
        UserError: it is none, with what each lacks; or its mask cannot be had outside.
    """
    if (why := _inexpressible(model)) is not None:
        raise UserError(f"this composition is not a model of transformers: {why}.")
    lacking = {plan: why for plan in CLASSES if (why := plan.lacks(model)) is not None}
    fitting = [plan for plan in CLASSES if plan not in lacking]
    if not fitting:
        said = ", ".join(f"{_short(each)} {why}" for each, why in lacking.items())
        raise UserError(f"this composition is not a model of transformers: {said}.")
    if (follows := next((plan for plan in fitting if plan.follows(model.mask)), None)) is not None:
        return ExportRoute(follows, None, False)
    plan = next((plan for plan in fitting if plan.goes_on), fitting[0])
    if not plan.goes_on:
        raise UserError(
            f"this composition is not a model of transformers: `generate` of {plan.model.__name__} takes no "
            "prompt that was read before, by which a mask could be followed; mask=causal needs none."
        )
    if getattr(model.lm.model.config, "sliding_window", None) is not None:
        raise UserError(
            "this composition is not a model of transformers: its language model has layers that see a window, which a "
            "mask that is handed on would lift."
        )
    return ExportRoute(plan, code(model.mask, model.lm.image_id, model.tokens_per_image), needs_answers(model.mask))


def _short(plan: Exportable) -> str:
    return plan.model.__name__.removesuffix("ForConditionalGeneration")


def _inexpressible(model: VLM) -> str | None:
    """What no class of transformers has."""
    encoder = model.encoder
    if type(model.fusion) is not ConcatFusion or encoder is None:
        return f"{type(model.fusion).__name__} is in none"
    if not isinstance(encoder, TowerEncoder):
        return f"{type(encoder).__name__} is in none"
    if model.prompt_tokens:
        return "no processor writes its soft prompts"
    tower: Any = encoder.tower
    own, here = sides(tower.config.image_size), (encoder.preprocess.height, encoder.preprocess.width)
    if own != here:
        return f"its images have {here[0]}x{here[1]} pixels and the tower's own {own[0]}x{own[1]} (encoder.image_size)"
    return None


def write(model: VLM, cfg: DictConfig, folder: Path, route: ExportRoute) -> ExportCheck:
    """Write the model and its processor, and open them again to prove that they are the same.

    Args:
        model: the composition, with merged adapters, on the CPU; it shares its modules with what is written, in their
            widest dtype, and is of no further use.
        cfg: the configuration it was built from.
        folder: a new or empty one.
        route: as ``export_route`` found it.

    Raises:
        UserError: what was written is not the same; nothing of it is left.
    """
    probe = _Probe(model, cfg, route)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_model(model, cfg, folder, route)
        route.plan.processor(model).save_pretrained(folder)
        return probe.verify(folder, route)
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _write_model(model: VLM, cfg: DictConfig, folder: Path, route: ExportRoute) -> None:
    encoder: Any = model.encoder
    dtype = widest(model)
    tower = whole_tower(encoder, cfg.encoder)
    model.lm.model.set_attn_implementation("sdpa")
    config: Any = route.plan.config_of(model, tower)
    mask = type(model.mask).__module__.rpartition(".")[2]  # a choice is called as its file
    config.vlmlab = {"mask": mask}
    config.dtype = dtype
    with torch.device("meta"):
        whole: Any = route.plan.model(config)
    route.plan.place(whole, model, tower)
    assert not any(tensor.is_meta for tensor in whole.state_dict().values())
    whole.to(dtype)
    tokenizer = model.lm.plain_tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    whole.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=model.lm.stop_ids, pad_token_id=pad
    )
    save_tower(whole, folder)


def widest(model: VLM) -> torch.dtype:
    """The widest dtype of a composition's weights."""
    return max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)


def whole_tower(encoder: TowerEncoder, cfg: DictConfig) -> PreTrainedModel:
    """The tower as it was loaded, layers above the tapped one and the pooling head included, with what was trained."""
    tower: Any = instantiate(cfg, layers=None, pooled=True).tower
    trained = encoder.tower.state_dict()
    tower.to(max((t.dtype for t in trained.values() if t.is_floating_point()), key=lambda dtype: dtype.itemsize))
    unknown = tower.load_state_dict(trained, strict=False).unexpected_keys
    assert not unknown, unknown
    return tower


class _Probe:
    """A conversation about a picture, as the lab reads it: tokens, pixels and logits."""

    def __init__(self, model: VLM, cfg: DictConfig, route: ExportRoute) -> None:
        collate: Collator = replace(build_collator(cfg, model, "chat"), questions="conversation")
        self.picture = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
        self.batch: Batch = collate([self._sample(*((TURN,) if route.plan.alone else (TURN, NEXT)))])
        self.prompts = [
            collate.ask([self._sample(*turns)]).input_ids for turns in ((_open(TURN),), (TURN, _open(NEXT)))
        ]
        with torch.no_grad():
            self.logits = model(self.batch).logits.float()
        self.dtype = widest(model)
        self.halves = any(p.dtype.itemsize < 4 for p in model.parameters())

    def _sample(self, *turns: Turn) -> Sample:
        return Sample("probe", (self.picture,), turns)

    @torch.no_grad()
    def verify(self, folder: Path, route: ExportRoute) -> ExportCheck:
        """Open the folder by transformers' own classes.

        Raises:
            UserError: tokens or logits differ.
        """
        with quiet():
            opened: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        model, info = opened
        left = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        if left or type(model) is not route.plan.model:
            raise UserError(f"the model that was written does not open as it is ({listed(left, 80)}); report this.")
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        first, turns = self._asked(processor)
        batch = self.batch
        shown = {name: value for name, value in first.items() if name.startswith("pixel")}
        if route.sees is not None:
            shown["attention_mask"] = _sees(route.sees, batch)[:, None]
        if route.plan.alone:
            if "token_type_ids" not in first:
                raise UserError("the processor that was written gives no token_type_ids; report this.")
            shown["token_type_ids"] = ((batch.layout.role == Role.ANSWER).cumsum(1) > 0).long()
        got = model.eval()(input_ids=batch.input_ids, **shown)
        logits = got.logits[:, :-1][batch.labels[:, 1:] != -100].float()
        worst, largest = float((logits - self.logits).abs().max()), float(self.logits.abs().max())
        if not self.halves and not worst <= CLOSE * max(1.0, largest):
            raise UserError(
                f"the model that was written is another: its logits are {worst:.1e} from the run's; export by form=run."
            )
        dtype = str(self.dtype).rpartition(".")[2]
        return ExportCheck(worst, largest, turns and not route.plan.alone, dtype, self.halves)

    def _asked(self, processor: Any) -> tuple[Any, bool]:
        """What the processor makes of the first question, and whether it reads the second as the lab does, too."""
        picture = Pillow.fromarray(self.picture)
        read = []
        for words in ((TURN.prompt,), (TURN.prompt, TURN.answer, NEXT.prompt)):
            read.append(
                processor.apply_chat_template(
                    conversation(picture, *words),
                    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                )
            )  # fmt: skip
        same = [torch.equal(one["input_ids"], ids) for one, ids in zip(read, self.prompts, strict=True)]
        if not same[0]:
            raise UserError(
                "the prompt that a processor of transformers writes is another than the lab's "
                f"({_tokens(read[0]['input_ids'])} and {_tokens(self.prompts[0])} tokens); export by form=run."
            )
        return read[0], same[1]


def _sees(text: str, batch: Batch) -> Tensor:
    names: dict[str, Any] = {"torch": torch}
    exec(text, names)
    found: Tensor = names["sees"](batch.input_ids, batch.layout.role == Role.ANSWER)
    return found


def _tokens(ids: Tensor) -> int:
    return int(ids.shape[1])


def _open(turn: Turn) -> Turn:
    return replace(turn, answer="")
