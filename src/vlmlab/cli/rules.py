"""Which combinations cannot work, and why: small functions in order, answered before torch is imported.

To add a rule, write a function ``(cfg, choices) -> sentence or None`` and list it in ``RULES``. ``cfg`` is the resolved
configuration as plain values, ``choices`` the chosen file of every group (``{"fusion": "none", ...}``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig

from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import UserError
from vlmlab.recipe.stage import parse
from vlmlab.runs.config import leaves

Config = Mapping[str, Any]
Choices = Mapping[str, Any]
Rule = Callable[[Config, Choices], str | None]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SIGLIP = "vlmlab.objective.siglip.Siglip"
SHOWS_PROMPT = ("prefix_lm", "visual_keys_open", "bidir_all_images")
"""Masks under which a word of the prompt depends on later ones: directly, or through an image behind them."""

PATCH = "vlmlab.encoder.patch.PatchEncoder"
MULTI = "vlmlab.encoder.multi.MultiEncoder"
MMA = "vlmlab.adapter.mma.MmaAdapter"
CONTRASTIVE = "vlmlab.recipe.contrastive.ContrastiveModule"
PATH_KEYS = ("path", "file", "folder", "images", "image_folder", "root")
"""Keys of a data source that name something on disk."""


def check(cfg: DictConfig, config: Config, choices: Choices) -> None:
    """Refuse a composition that breaks a rule.

    Args:
        cfg: the composed configuration.
        config: the same as plain values.
        choices: the chosen file of every group.

    Raises:
        ConfigError: the first broken rule's sentence.
    """
    for rule in RULES:
        sentence = rule(config, choices)
        if sentence is not None:
            raise ConfigError(sentence)
    try:
        parse(cfg)
    except UserError as error:
        raise ConfigError(str(error)) from error
    for late in STAGE_RULES:
        sentence = late(config, choices)
        if sentence is not None:
            raise ConfigError(sentence)


def known_precision(cfg: Config, choices: Choices) -> str | None:
    """``precision.name`` is one of the four."""
    name = _at(cfg, "precision.name")
    return None if name in PRECISIONS else f"precision.name={name} is unknown; choose one of {', '.join(PRECISIONS)}"


def fp16_needs_gpu(cfg: Config, choices: Choices) -> str | None:
    """Half precision with loss scaling exists on GPUs only."""
    if _at(cfg, "precision.name") == "fp16" and _at(cfg, "trainer.accelerator") == "cpu":
        return "precision=fp16 needs a GPU and trainer.accelerator is cpu; choose precision=fp32 or precision=bf16"
    return None


def possible_trainer(cfg: Config, choices: Choices) -> str | None:
    """Threads, workers and seconds are counts."""
    for key, least in (("threads", 1), ("workers", 0), ("save_every_s", 0)):
        value = _at(cfg, f"trainer.{key}")
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < least):
            return f"trainer.{key}={value} is not possible; give a number of at least {least}"
    return None


def possible_budget(cfg: Config, choices: Choices) -> str | None:
    """A budget scales steps up or down, never below nothing."""
    scale, most, limit = (_at(cfg, f"budget.{key}") for key in ("steps_scale", "max_steps", "eval_limit"))
    if isinstance(scale, int | float) and scale <= 0:
        return f"budget.steps_scale={scale} leaves no step; give a number above 0"
    for key, value in (("max_steps", most), ("eval_limit", limit)):
        if isinstance(value, int | float) and value < 1:
            return f"budget.{key}={value} leaves nothing; give at least 1, or null for no limit"
    return None


def possible_seed(cfg: Config, choices: Choices) -> str | None:
    """A seed is a whole number from 0."""
    seed = _at(cfg, "seed")
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32:
        return None
    return f"seed={seed} is no seed; give a whole number from 0 to {2**32 - 1}"


def ranks_need_a_process_tree(cfg: Config, choices: Choices) -> str | None:
    """Under Hydra's basic launcher every rank would run the whole sweep again."""
    devices = _at(cfg, "trainer.devices")
    many = devices not in (None, 1, "1", "auto")
    if many and choices.get("_mode") == "MULTIRUN" and choices.get("hydra/launcher") == "basic":
        return f"trainer.devices={devices} cannot be swept by hydra/launcher=basic; use hydra/launcher=pool"
    return None


def leaking_mask(cfg: Config, choices: Choices) -> str | None:
    """``visual_rows_open`` shows later answers to visual rows: a negative control, nothing to train with."""
    stages = _stages(cfg)
    masks = [("mask", cfg.get("mask")), *((f"recipe.stages.{n}.mask", s.get("mask")) for n, s in stages)]
    for key, mask in masks:
        target = str(mask.get("_target_", "")) if isinstance(mask, Mapping) else str(mask or "")
        if ".visual_rows_open." in f".{target}." or (key == "mask" and choices.get("mask") == "visual_rows_open"):
            return f"{key}=visual_rows_open leaks later answers and is a control for tests only; choose mask=bidir"
    return None


def prompt_learnt_in_the_open(cfg: Config, choices: Choices) -> str | None:
    """``prompt: text`` learns every word of the prompt, which some masks show to the words before it."""
    for name, stage in _stages(cfg):
        mask = stage.get("mask") or cfg.get("mask")
        target = str(mask.get("_target_", "")) if isinstance(mask, Mapping) else ""
        open_to_text = [choice for choice in SHOWS_PROMPT if target.startswith(f"vlmlab.mask.{choice}.")]
        if stage.get("prompt") == "text" and open_to_text:
            return (
                f"recipe.stages.{name}.prompt=text learns the words of the prompt, which mask={open_to_text[0]} shows "
                f"to the words that predict them; set recipe.stages.{name}.prompt=chat, or choose mask=bidir"
            )
    return None


def nothing_to_adapt(cfg: Config, choices: Choices) -> str | None:
    """Raw patches have no layer that an adapter could wrap, and some adapters want one transformers tower."""
    for name, stage in _stages(cfg):
        adapter = stage.get("adapter", cfg.get("adapter"))
        if not isinstance(adapter, Mapping) or "encoder" not in (adapter.get("parts") or ()):
            continue
        where = f"the adapter of recipe.stages.{name} names encoder in its parts"
        if _at(cfg, "encoder._target_") == PATCH and _at(cfg, "encoder.features") is None:
            return (
                f"{where} and encoder=patch has no layer to adapt; take encoder out of adapter.parts, or give "
                "encoder.features a width"
            )
        if adapter.get("_target_") == MMA and _at(cfg, "encoder._target_") in (PATCH, MULTI):
            return f"{where} and adapter=mma wants a single tower there; set adapter.parts=[lm], or use adapter=lora"
    return None


def contrastive_towers(cfg: Config, choices: Choices) -> str | None:
    """``ContrastiveModule`` compares the pooled output of one tower with a text."""
    names = [name for name, stage in _stages(cfg) if stage.get("module") == CONTRASTIVE]
    if not names:
        return None
    where = f"recipe.stages.{names[0]} is a ContrastiveModule and wants"
    if choices.get("fusion") == "none":
        return f"{where} images, which fusion=none leaves out; use fusion=concat"
    if _at(cfg, "encoder._target_") in (PATCH, MULTI):
        return f"{where} one tower that pools; use encoder=scratch, embedded or hf with encoder.layers=null"
    if _at(cfg, "encoder.layers") is not None:
        return f"{where} the pooled output behind the last layer; set encoder.layers=null"
    return None


def files_exist(cfg: Config, choices: Choices) -> str | None:
    """What a data source names on disk is there."""
    data = cfg.get("data")
    for key, value in leaves(data if isinstance(data, Mapping) else {}, "data."):
        if key.rpartition(".")[2] in PATH_KEYS and isinstance(value, str) and not Path(value).expanduser().exists():
            return f"{key}={value} does not exist; give the path of your data, as in {key}=/where/it/is"
    return None


def something_to_train(cfg: Config, choices: Choices) -> str | None:
    """Without vision (fusion=none) only the LM can learn; stages that train the vision side alone are skipped."""
    learns = any((stage.get("train") or {}).get("lm") is not None for _, stage in _stages(cfg))
    if choices.get("fusion") == "none" and not learns:
        return "fusion=none leaves only the LM and no stage of the recipe trains lm; choose another fusion or recipe"
    trains = {
        part for _, stage in _stages(cfg) for part, rate in (stage.get("train") or {}).items() if rate is not None
    }
    weighted = _at(cfg, "encoder.features") is not None or _at(cfg, "encoder.newline")
    if trains == {"encoder"} and _at(cfg, "encoder._target_") == PATCH and not weighted:
        return (
            "encoder=patch has no weights and the recipe trains nothing but the encoder; set encoder.features to a "
            "width, or choose another recipe"
        )
    return None


def contrastive_counts(cfg: Config, choices: Choices) -> str | None:
    """A contrastive loss compares the samples of one micro-batch, so that accumulation changes the loss."""
    for name, stage in _stages(cfg):
        objective = stage.get("objective", cfg.get("objective"))
        targets = [value for key, value in leaves(objective or {}) if key.rpartition(".")[2] == "_target_"]
        if SIGLIP in targets and int(stage.get("accumulate") or 1) > 1:
            return (
                f"recipe.stages.{name}.accumulate={stage['accumulate']} changes the siglip objective, which compares "
                f"the samples of one micro-batch; set recipe.stages.{name}.accumulate=1"
            )
    return None


RULES: tuple[Rule, ...] = (
    known_precision,
    fp16_needs_gpu,
    possible_seed,
    possible_trainer,
    possible_budget,
    ranks_need_a_process_tree,
    leaking_mask,
    files_exist,
)
"""Checked before the recipe is parsed (``vlmlab.recipe.stage.parse`` has the rules of single stages)."""

STAGE_RULES: tuple[Rule, ...] = (
    something_to_train,
    contrastive_counts,
    prompt_learnt_in_the_open,
    nothing_to_adapt,
    contrastive_towers,
)
"""Checked after, on stages that are well-formed."""


def _at(cfg: Config, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _stages(cfg: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    stages = _at(cfg, "recipe.stages")
    for name, stage in (stages if isinstance(stages, Mapping) else {}).items():
        if isinstance(stage, Mapping):
            yield str(name), stage


def choices_of(hydra_cfg: HydraConf) -> dict[str, Any]:
    """The chosen file of every group, and how Hydra was started (``_mode``: RUN or MULTIRUN)."""
    return {str(key): value for key, value in hydra_cfg.runtime.choices.items()} | {
        "_mode": getattr(hydra_cfg.mode, "name", None)
    }
