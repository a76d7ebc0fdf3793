"""Which combinations cannot work, and why: small functions in order, answered before torch is imported.

To add a rule, write a function ``(cfg, choices) -> sentence or None`` and list it in ``RULES``. ``cfg`` is the resolved
configuration as plain values, ``choices`` the chosen file of every group (``{"fusion": "none", ...}``).
"""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import UserError
from vlmlab.data.readers.place import is_id, is_there
from vlmlab.recipe.stage import parse
from vlmlab.runs.config import leaves
from vlmlab.runs.environment import package_folder
from vlmlab.runs.names import override_key

Config = Mapping[str, Any]
Choices = Mapping[str, Any]
Rule = Callable[[Config, Choices], str | None]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
WHOLE = ("auto", "ddp", "ddp_fork", "ddp_spawn", "ddp_find_unused_parameters_true")
"""Strategies under which every rank has all weights of its own."""

STRATEGIES = (*WHOLE, "fsdp2")
BASELINES = ("shuffled", "no_image")
BUILT = ("encoder", "cache", "connector", "lm", "mask", "fusion", "adapter", "objective")
"""Groups whose choice is one class: the keys of its file are the constructor's."""

TOWERS = ("lm", "encoder")
WORDLESS = ("dinov2",)
"""Families of towers, as a config.json names them, that were trained without texts."""

LANGUAGE = ("vlmlab.engine.alignment.AlignmentModule", "vlmlab.engine.instruction.InstructionTuningModule")
CONTRASTIVE = "vlmlab.engine.contrastive.ContrastiveModule"
PATH_KEYS = ("path", "path_558k", "path_118k", "test_path", "file", "folder", "images", "image_folder", "root")
"""Keys of a data source that name something on disk; those that begin with path may name a data set of the hub."""


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
    """Threads, workers and seconds are counts; accelerator and strategy are known."""
    for key, known in (("accelerator", ACCELERATORS), ("strategy", STRATEGIES)):
        value = _at(cfg, f"trainer.{key}")
        if value is not None and value not in known:
            return f"trainer.{key}={value} is unknown; choose one of {', '.join(known)}"
    devices = _at(cfg, "trainer.devices")
    if devices is not None and devices != "auto" and not _count(devices, 1) and devices != -1:
        return f"trainer.devices={devices} is not possible; give a whole number of at least 1, or auto"
    for key, least in (("threads", 1), ("workers", 0), ("save_every_s", 0)):
        value = _at(cfg, f"trainer.{key}")
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < least):
            return f"trainer.{key}={value} is not possible; give a number of at least {least}"
    return None


def shards_for_several(cfg: Config, choices: Choices) -> str | None:
    """FSDP2 shares weights among devices, in fp32 or bf16."""
    if _at(cfg, "trainer.strategy") != "fsdp2":
        return None
    if _at(cfg, "trainer.devices") == 1:
        return (
            "trainer.strategy=fsdp2 shares the weights among devices and trainer.devices=1; set trainer.devices=2 or "
            "more, or trainer.strategy=auto"
        )
    if _at(cfg, "precision.name") == "fp16":
        return "trainer.strategy=fsdp2 has no loss scaling, which precision=fp16 needs; choose precision=bf16"
    return None


def compiler_at_hand(cfg: Config, choices: Choices) -> str | None:
    """torch.compile makes C++ on a CPU, and compiles what starts its kernels on a GPU."""
    wanted = _at(cfg, "trainer.compile")
    if wanted not in (None, True, False):
        return f"trainer.compile={wanted} is not possible; set it to true or false"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if wanted and shutil.which(compiler) is None:
        return (
            f"trainer.compile=true needs a C++ compiler and {compiler} is not to be found; install it, name another in "
            "the environment as CXX, or set trainer.compile=false"
        )
    return None


def possible_budget(cfg: Config, choices: Choices) -> str | None:
    """A budget scales steps up or down, never below nothing."""
    scale, most, limit = (_at(cfg, f"budget.{key}") for key in ("steps_scale", "max_steps", "eval_limit"))
    if scale is not None and (not isinstance(scale, int | float) or isinstance(scale, bool) or not scale > 0):
        return f"budget.steps_scale={scale} leaves no step; give a number above 0"
    for key, value in (("max_steps", most), ("eval_limit", limit)):
        if value is not None and not _count(value, 1):
            return f"budget.{key}={value} leaves nothing; give a whole number of at least 1, or null for no limit"
    return None


def possible_sizes(cfg: Config, choices: Choices) -> str | None:
    """Sizes of rows and batches are counts; a baseline that does not exist would be noticed after training."""
    for key in ("collate.max_length", "collate.pack_length", "evaluation.batch_size"):
        value = _at(cfg, key)
        if value is not None and not _count(value, 1):
            unlimited = ", or null for one sample a row" if key == "collate.pack_length" else ""
            return f"{key}={value} is not possible; give a whole number of at least 1{unlimited}"
    baselines = _at(cfg, "evaluation.baselines")
    for name in baselines if isinstance(baselines, list) else [baselines]:
        if name is not None and name not in BASELINES:
            return f"evaluation.baselines={name} is unknown; choose from {', '.join(BASELINES)}, or [] for none"
    return None


def possible_cache(cfg: Config, choices: Choices) -> str | None:
    """A cache has a folder, a size, and one of two ways to write features down."""
    if not _keeps(cfg):
        return None
    size, dtype, folder = (_at(cfg, f"cache.{key}") for key in ("max_gb", "dtype", "folder"))
    if size is not None and (not isinstance(size, int | float) or isinstance(size, bool) or not size > 0):
        return f"cache.max_gb={size} holds nothing; give a number above 0 (in 10^9 bytes), or null for no limit"
    if dtype not in (None, "bfloat16"):
        return f"cache.dtype={dtype} is unknown; choose bfloat16, or null for features as computed"
    if not isinstance(folder, str) or not folder:
        return f"cache.folder={folder} is no folder; give one on a disk of this machine, or choose cache=none"
    return None


def features_to_keep(cfg: Config, choices: Choices) -> str | None:
    """A cache stands before a tower, and every rank asks that tower alone for the images it lacks."""
    cache, strategy = f"cache={choices.get('cache')}", _at(cfg, "trainer.strategy")
    if not _keeps(cfg):
        return None
    if _blind(cfg):
        return f"{cache} keeps what an encoder sees and fusion={choices.get('fusion')} has none; choose cache=none"
    tower = _class(cfg.get("encoder"))
    if declared(tower, "has_tower") is False:
        chosen = _chosen("encoder", tower)
        return f"{cache} keeps what a tower computes and encoder={chosen} has no tower; choose cache=none"
    if strategy is not None and strategy not in WHOLE:
        return (
            f"{cache} asks the encoder on one rank at a time and trainer.strategy={strategy} splits it over ranks; "
            "choose cache=none, or trainer.strategy=ddp"
        )
    return None


def possible_name(cfg: Config, choices: Choices) -> str | None:
    """A run's name is a folder below outputs/ or sweeps/."""
    name = _at(cfg, "name")
    path = Path(str(name))
    if name is None or (not path.is_absolute() and path.parts and ".." not in path.parts):
        return None
    return f"name={name} is no folder below outputs; use letters, digits, - and _ (hydra.run.dir=... puts it elsewhere)"


def foreign_keys(cfg: Config, choices: Choices) -> str | None:
    """A preset may set keys of the choice it made, which another choice on the command line does not have."""
    given = {override_key(override) for override in choices.get("_overrides") or ()}
    for group in BUILT:
        node, file = cfg.get(group), conf_folder() / group / f"{choices.get(group)}.yaml"
        if not isinstance(node, Mapping) or not file.is_file():
            continue
        own = OmegaConf.load(file)
        if not isinstance(own, DictConfig) or node.get("_target_") != own.get("_target_"):
            continue
        known = {*own, *_filled(own)}
        for key in node:
            if key not in known and not any(name.startswith(f"{group}.{key}") for name in given):
                setter = "recipe" if choices.get("preset") in (None, "none") else "preset"
                return (
                    f"{group}.{key} is no key of {group}={choices[group]} and {setter}={choices.get(setter)} sets it; "
                    f"add ~{group}.{key} to the command, or leave {group} to the {setter}"
                )
    return None


def _filled(file: DictConfig) -> set[str]:
    """The keys that a choice's own defaults list fills from other groups, as in ``/memory_mask@sees: before``."""
    entries = (entry for entry in file.get("defaults") or () if isinstance(entry, Mapping))
    return {str(group).rpartition("@")[2].partition(".")[0] for entry in entries for group in entry}


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
    """A mask that says of itself that it shows later answers is a negative control, nothing to train with."""
    stages = _stages(cfg)
    masks = [("mask", cfg.get("mask")), *((f"recipe.stages.{n}.mask", s.get("mask")) for n, s in stages)]
    for key, mask in masks:
        target = _class(mask)
        if declared(target, "leaks") is True:
            chosen = _chosen("mask", target)
            return f"{key}={chosen} leaks later answers and is a control for tests only; choose mask=bidir"
    return None


def possible_fusion(cfg: Config, choices: Choices) -> str | None:
    """Keys of a fusion, or of several: words that its class knows, blocks at some layer, a memory mask."""
    for where, node in _described(cfg.get("fusion"), "fusion"):
        known = declared(_class(node), "words") or {}
        for key, value in node.items():
            name = f"{where}.{key}"
            if key in known and value not in known[key]:
                return f"{name}={value} is unknown; choose {' or '.join(known[key])}"
            if key == "every" and not _count(value, 1):
                return (
                    f"{name}={value} leaves no layer; give a whole number of at least 1, 1 for a block at every layer"
                )
            if key == "sees" and not _class(value):
                return f"{name}={value} is no memory mask; write memory_mask@{name}={value}"
    return None


def text_to_mix(cfg: Config, choices: Choices) -> str | None:
    """A fusion that reads the user's words does so by the encoder's text tower."""
    if not any(declared(target, "reads_text") is True for target in _classes(cfg.get("fusion"))):
        return None
    tower, family = _class(cfg.get("encoder")), str(_at(cfg, "encoder.architecture.model_type"))
    if declared(tower, "has_text") is not False and family not in WORDLESS:
        return None
    return (
        f"fusion={choices.get('fusion')} reads the user's words by the encoder's text tower and "
        f"encoder={choices.get('encoder') or _chosen('encoder', tower)} has none; choose a CLIP or SigLIP encoder "
        "(as encoder=clip_vit_l14_336), or fusion=concat"
    )


def _described(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every part of the configuration from `node` on that describes a class, with its key."""
    if not isinstance(node, Mapping):
        return
    if _class(node):
        yield where, node
    for key, value in node.items():
        yield from _described(value, f"{where}.{key}")


def prompt_learnt_in_the_open(cfg: Config, choices: Choices) -> str | None:
    """``prompt: text`` learns every word of the prompt, which some masks show to the words before it."""
    for name, stage in _stages(cfg):
        target = _class(stage.get("mask") or cfg.get("mask"))
        if stage.get("prompt") == "text" and declared(target, "shows_prompt") is True:
            chosen = _chosen("mask", target)
            return (
                f"recipe.stages.{name}.prompt=text learns the words of the prompt, which mask={chosen} shows to the "
                f"words that predict them; set recipe.stages.{name}.prompt=chat, or choose mask=bidir"
            )
    return None


def instruction_is_learnt(cfg: Config, choices: Choices) -> str | None:
    """What reads the user's words shows all of them to each, also where ``prompt: text`` learns them."""
    reading = _reading(cfg)
    mixing = any(declared(target, "reads_text") is True for target in _classes(cfg.get("fusion")))
    for name, stage in _stages(cfg):
        learns = f"recipe.stages.{name}.prompt=text learns the words of the prompt, which"
        if stage.get("prompt") == "text" and reading is not None:
            return (
                f"{learns} the connector reads ({reading}=true); set recipe.stages.{name}.prompt=chat, or "
                f"{reading}=false"
            )
        if stage.get("prompt") == "text" and mixing:
            return f"{learns} fusion={choices.get('fusion')} reads; set recipe.stages.{name}.prompt=chat"
    return None


def pairs_need_two_towers(cfg: Config, choices: Choices) -> str | None:
    """Some objectives compare pooled images with texts, which only ``ContrastiveModule`` makes."""
    for name, stage in _stages(cfg):
        paired = _declaring("pairs", cfg, stage)
        if stage.get("module") in LANGUAGE and paired:
            return (
                f"recipe.stages.{name} trains the LM's words and {_called(paired[0], cfg, choices)} wants pairs of an "
                f"image and a text; use objective=lm, or set recipe.stages.{name}.module={CONTRASTIVE}"
            )
    return None


def images_to_learn_from(cfg: Config, choices: Choices) -> str | None:
    """Some objectives read what the connector or the encoder gives, or visual tokens in the LM's sequence."""
    fusion, blind = f"fusion={choices.get('fusion')}", _blind(cfg)
    for name, stage in _stages(cfg):
        for target in _declaring("reads_images", cfg, stage) if blind else ():
            return (
                f"recipe.stages.{name} has {_called(target, cfg, choices)}, which reads images, and {fusion} leaves "
                "them out; use objective=lm, or fusion=concat"
            )
        for target in _declaring("reads_sequence", cfg, stage) if not blind and _in_sequence(cfg) is False else ():
            return (
                f"recipe.stages.{name} has {_called(target, cfg, choices)}, which reads visual tokens in the LM's "
                f"sequence, and {fusion} puts none there; use objective=lm, or fusion=concat"
            )
    return None


def queries_meet_texts(cfg: Config, choices: Choices) -> str | None:
    """itc, itm and itg read a caption inside the connector, beside its queries."""
    connector = cfg.get("connector")
    target = str(_at(cfg, "connector._target_"))
    able = offers(target, "joint")
    if not isinstance(connector, Mapping) or able is None:
        return None
    if able and (connector.get("text") is True or connector.get("instruction") is True):
        return None
    for name, stage in _stages(cfg):
        for objective in _declaring("reads_text_side", cfg, stage):
            key = "text" if "text" in connector else "instruction"
            remedy = f"set connector.{key}=true" if able else "use connector=qformer connector.text=true"
            return (
                f"recipe.stages.{name} has {_called(objective, cfg, choices)}, which compares queries with texts, and "
                f"connector={choices.get('connector')} has no text side; {remedy}, or connector=instruct_qformer"
            )
    return None


def objectives_with_weights(cfg: Config, choices: Choices) -> str | None:
    """An objective with weights of its own has a learning rate; found before the stages without it are trained."""
    for name, stage in _stages(cfg):
        train = stage.get("train") or {}
        for target in _objectives(cfg, stage):
            if train.get("objective") is None and offers(target, "attach"):
                plus = "" if "objective" in train else "+"
                return (
                    f"recipe.stages.{name} has {_called(target, cfg, choices)}, which has weights of its own, and "
                    f"gives them no learning rate; add {plus}recipe.stages.{name}.train.objective=1e-3"
                )
    return None


def loss_for_the_lm(cfg: Config, choices: Choices) -> str | None:
    """A stage that trains the LM has an objective that reaches it."""
    for name, stage in _stages(cfg):
        rate, targets = (stage.get("train") or {}).get("lm"), _objectives(cfg, stage)
        if rate is not None and targets and all(declared(target, "reaches_lm") is False for target in targets):
            called = " and ".join(_called(target, cfg, choices) for target in targets)
            return (
                f"recipe.stages.{name}.train.lm={rate} trains the LM, whose layers get no gradient from {called}; put "
                f"objective lm beside it (as conf/recipe/cg_vlm.yaml does), or set recipe.stages.{name}.train.lm=null"
            )
    return None


def towers_to_adapt(cfg: Config, choices: Choices) -> str | None:
    """``adapter.parts`` names towers that this composition has; found before the stages without adapter are trained."""
    for name, stage in _stages(cfg):
        adapter = stage.get("adapter", cfg.get("adapter"))
        parts = adapter.get("parts") if isinstance(adapter, Mapping) else None
        if not isinstance(adapter, Mapping) or parts is None:
            continue
        where = f"the adapter of recipe.stages.{name} has parts"
        wrong = [part for part in (parts if isinstance(parts, list) else [parts]) if part not in TOWERS]
        if wrong or not isinstance(parts, list):
            return f"{where}={parts}, which is no list of towers; set adapter.parts to [lm], [encoder] or both"
        kind = _class(adapter)
        if declared(kind, "lm_only") is True and parts != ["lm"]:
            chosen = _chosen("adapter", kind)
            return f"{where}={parts} and adapter={chosen} is read by the LM alone; set adapter.parts=[lm]"
        if "encoder" in parts and _blind(cfg):
            return f"{where}={parts} and fusion={choices.get('fusion')} leaves no encoder; set adapter.parts=[lm]"
    return None


def nothing_to_adapt(cfg: Config, choices: Choices) -> str | None:
    """Raw patches have no layer that an adapter could wrap, and some adapters want one transformers tower."""
    tower = _class(cfg.get("encoder"))
    for name, stage in _stages(cfg):
        adapter = stage.get("adapter", cfg.get("adapter"))
        if not isinstance(adapter, Mapping) or "encoder" not in (adapter.get("parts") or ()):
            continue
        where = f"the adapter of recipe.stages.{name} names encoder in its parts"
        if declared(tower, "has_tower") is False and _at(cfg, "encoder.features") is None:
            return (
                f"{where} and encoder={_chosen('encoder', tower)} has no layer to adapt; take encoder out of "
                "adapter.parts, or give encoder.features a width"
            )
        kind = _class(adapter)
        if declared(kind, "one_tower") is True and declared(tower, "one_tower") is False:
            wants = f"adapter={_chosen('adapter', kind)} wants a single tower there"
            return f"{where} and {wants}; set adapter.parts=[lm], or use adapter=lora"
    return None


def layers_hold_the_adapter(cfg: Config, choices: Choices) -> str | None:
    """A range of layers trains what is in them; the words of a soft prompt stand before the first."""
    for name, stage in _stages(cfg):
        kind = _class(stage.get("adapter", cfg.get("adapter")))
        if declared(kind, "in_layers") is False and (stage.get("layers") or {}).get("lm") is not None:
            return (
                f"recipe.stages.{name}.layers.lm chooses layers and adapter={_chosen('adapter', kind)} has no weights "
                f"in them; set recipe.stages.{name}.layers=null, or use adapter=lora"
            )
    return None


def contrastive_towers(cfg: Config, choices: Choices) -> str | None:
    """``ContrastiveModule`` compares the pooled output of one tower with a text."""
    names = [name for name, stage in _stages(cfg) if stage.get("module") == CONTRASTIVE]
    if not names:
        return None
    where = f"recipe.stages.{names[0]} is a ContrastiveModule and wants"
    if _blind(cfg):
        return f"{where} images, which fusion={choices.get('fusion')} leaves out; use fusion=concat"
    if declared(_class(cfg.get("encoder")), "one_tower") is False:
        return f"{where} one tower that pools; use encoder=scratch, embedded or hf with encoder.layers=null"
    if _at(cfg, "encoder.layers") is not None:
        return f"{where} the pooled output behind the last layer; set encoder.layers=null"
    return None


def files_exist(cfg: Config, choices: Choices) -> str | None:
    """What a data source names on disk is there."""
    data = cfg.get("data")
    for key, value in leaves(data if isinstance(data, Mapping) else {}, "data."):
        name = key.rpartition(".")[2]
        if name not in PATH_KEYS or not isinstance(value, str):
            continue
        if not (is_there(value) or (name.startswith("path") and is_id(value))):
            return f"{key}={value} does not exist; give the path of your data, as in {key}=/where/it/is"
    return None


def something_to_train(cfg: Config, choices: Choices) -> str | None:
    """Without vision (fusion=none) only the LM can learn; stages that train the vision side alone are skipped."""
    learns = any((stage.get("train") or {}).get("lm") is not None for _, stage in _stages(cfg))
    if _blind(cfg) and not learns:
        only = f"fusion={choices.get('fusion')} leaves only the LM"
        return f"{only} and no stage of the recipe trains lm; choose another fusion or recipe"
    trains = {
        part for _, stage in _stages(cfg) for part, rate in (stage.get("train") or {}).items() if rate is not None
    }
    weighted = _at(cfg, "encoder.features") is not None or _at(cfg, "encoder.newline")
    tower = _class(cfg.get("encoder"))
    if trains == {"encoder"} and declared(tower, "has_tower") is False and not weighted:
        return (
            f"encoder={_chosen('encoder', tower)} has no weights and the recipe trains nothing but the encoder; set "
            "encoder.features to a width, or choose another recipe"
        )
    return None


def contrastive_counts(cfg: Config, choices: Choices) -> str | None:
    """A contrastive loss compares the samples of one micro-batch, so that accumulation changes the loss."""
    for name, stage in _stages(cfg):
        for target in _objectives(cfg, stage) if int(stage.get("accumulate") or 1) > 1 else ():
            if declared(target, "per_micro_batch") is True:
                return (
                    f"recipe.stages.{name}.accumulate={stage['accumulate']} changes {_called(target, cfg, choices)}, "
                    f"which compares the samples of one micro-batch; set recipe.stages.{name}.accumulate=1"
                )
    return None


RULES: tuple[Rule, ...] = (
    known_precision,
    fp16_needs_gpu,
    possible_seed,
    possible_trainer,
    shards_for_several,
    compiler_at_hand,
    possible_budget,
    possible_sizes,
    possible_cache,
    features_to_keep,
    possible_name,
    foreign_keys,
    ranks_need_a_process_tree,
    leaking_mask,
    possible_fusion,
    text_to_mix,
    files_exist,
)
"""Checked before the recipe is parsed (``vlmlab.recipe.stage.parse`` has the rules of single stages)."""

STAGE_RULES: tuple[Rule, ...] = (
    something_to_train,
    contrastive_counts,
    pairs_need_two_towers,
    images_to_learn_from,
    queries_meet_texts,
    objectives_with_weights,
    loss_for_the_lm,
    prompt_learnt_in_the_open,
    instruction_is_learnt,
    towers_to_adapt,
    nothing_to_adapt,
    layers_hold_the_adapter,
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


def _keeps(cfg: Config) -> bool:
    """Whether features are kept on disk."""
    target = _class(cfg.get("cache"))
    return target != "" and declared(target, "keeps") is not False


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _class(node: Any) -> str:
    """The class that a part of the configuration describes; empty where it describes none."""
    return str(node.get("_target_") or "") if isinstance(node, Mapping) else ""


def _classes(node: Any) -> list[str]:
    """The classes in a part of the configuration, however deep."""
    described = node if isinstance(node, Mapping) else {}
    return [str(value) for key, value in leaves(described) if key.rpartition(".")[2] == "_target_"]


def _objectives(cfg: Config, stage: Mapping[str, Any]) -> list[str]:
    """The classes of a stage's objectives."""
    return _classes(stage.get("objective") or cfg.get("objective"))


def _declaring(name: str, cfg: Config, stage: Mapping[str, Any]) -> list[str]:
    """Those of a stage's objectives that declare something of themselves."""
    return [target for target in _objectives(cfg, stage) if declared(target, name) is True]


def _blind(cfg: Config) -> bool:
    """Whether the fusion reads no vision."""
    return declared(_class(cfg.get("fusion")), "reads") == "nothing"


def _in_sequence(cfg: Config) -> bool | None:
    """Whether the fusion, or one of several, puts visual tokens into the sequence; None where a class is not ours."""
    targets = _classes(cfg.get("fusion"))
    said = {declared(target, "in_sequence") for target in targets}
    if True in said:
        return True
    return False if False in said and all(_source(target) for target in targets) else None


def _called(target: str, cfg: Config, choices: Choices) -> str:
    """An objective as it is chosen on the command line."""
    if _at(cfg, "objective._target_") == target and choices.get("objective"):
        return f"objective={choices['objective']}"
    return f"objective={_chosen('objective', target)}"


def _chosen(group: str, target: str) -> str:
    """The first file of a group that chooses a class; the class itself where none does."""
    files = sorted((conf_folder() / group).glob("*.yaml"))
    return next((file.stem for file in files if OmegaConf.select(OmegaConf.load(file), "_target_") == target), target)


def _reading(cfg: Config) -> str | None:
    """The key by which a connector reads the user's words; None where none does, or nothing reads its tokens."""
    connector = cfg.get("connector")
    if _blind(cfg) or not isinstance(connector, Mapping):
        return None
    keys = (key for key, value in leaves(connector, "connector.") if value is True)
    return next((key for key in keys if key.rpartition(".")[2] == "instruction"), None)


def declared(target: str, name: str) -> Any:
    """What a class of this package, or one of ours that it inherits from, assigns to an attribute in its body.

    It is read from the source, since importing the class imports torch.

    Args:
        target: dotted path of the class.
        name: of the attribute.

    Returns:
        The constant, or a list or mapping of constants; None where the class is not ours or says nothing of the kind.
    """
    for kind in _lineage(target):
        for line in kind.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            value = getattr(line, "value", None)
            if value is not None and name in [getattr(t, "id", None) for t in targets]:
                with contextlib.suppress(ValueError):  # computed
                    return ast.literal_eval(value)
    return None


def offers(target: str, method: str) -> bool | None:
    """Whether a class of this package, or one of ours that it inherits from, has a method; None for a foreign class.

    Args:
        target: dotted path of the class.
        method: its name.
    """
    if _source(target) is None:
        return None
    return any(isinstance(line, ast.FunctionDef) and line.name == method for k in _lineage(target) for line in k.body)


def _lineage(target: str) -> Iterator[ast.ClassDef]:
    """A class of this package and those of ours that it inherits from, itself first."""
    found = _source(target)
    if found is None:
        return
    module, kind = found
    yield kind
    here = target.rpartition(".")[0]
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for base in kind.bases:
        if isinstance(base, ast.Name):
            yield from _lineage(origin.get(base.id, f"{here}.{base.id}"))


@cache
def _source(target: str) -> tuple[ast.Module, ast.ClassDef] | None:
    """The parsed file of a class of this package, and the class in it."""
    module, _, name = target.rpartition(".")
    package, *rest = module.split(".")
    file = package_folder().joinpath(*rest).with_suffix(".py") if rest else Path()
    if package != package_folder().name or not file.is_file():
        return None
    parsed = ast.parse(file.read_text(encoding="utf-8"))
    found = (node for node in parsed.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next(((parsed, node) for node in found), None)


def choices_of(hydra_cfg: HydraConf) -> dict[str, Any]:
    """The chosen file of every group, how Hydra was started (``_mode``: RUN or MULTIRUN) and with which overrides."""
    return {str(key): value for key, value in hydra_cfg.runtime.choices.items()} | {
        "_mode": getattr(hydra_cfg.mode, "name", None),
        "_overrides": list(hydra_cfg.overrides.task),
    }
