"""Which combinations cannot work, and why: small functions in order, answered before torch is imported.

To add a rule, write a function ``(cfg, choices) -> sentence or None`` beside those of its kind and list it in
``RULES``. ``cfg`` is the resolved configuration as plain values, ``choices`` the chosen file of every group
(``{"fusion": "none", ...}``).
"""

from __future__ import annotations

from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig

from vlmlab.cli.entry import ConfigError
from vlmlab.cli.flags import other_kind
from vlmlab.cli.rules.asking import Choices, Config, Rule
from vlmlab.cli.rules.machine import (
    compiler_at_hand,
    fp16_needs_gpu,
    nodes_are_found,
    ranks_need_a_process_tree,
    shards_for_several,
)
from vlmlab.cli.rules.run import (
    best_look,
    features_to_keep,
    files_exist,
    logger_to_make,
    possible_name,
    possible_names,
    slices,
    watched,
)
from vlmlab.cli.rules.stages import (
    captions_of_its_own,
    contrastive_counts,
    contrastive_towers,
    experts_to_balance,
    images_to_learn_from,
    layers_hold_the_adapter,
    loss_for_the_lm,
    nothing_to_adapt,
    objectives_with_weights,
    paired_towers,
    pairs_need_two_towers,
    queries_meet_texts,
    something_to_train,
    towers_to_adapt,
    trees_show_images_once,
)
from vlmlab.cli.rules.values import lost_reference, missing_sections, wrong_values
from vlmlab.cli.rules.vision import (
    instruction_is_learnt,
    leaking_mask,
    prompt_learnt_in_the_open,
    queries_that_learn,
    text_to_mix,
)
from vlmlab.contracts.errors import UserError
from vlmlab.recipe.stage import parse
from vlmlab.runs.config import plain


def admitted(cfg: DictConfig, hydra_cfg: HydraConf, own: Any = None) -> dict[str, Any]:
    """The resolved configuration of a composition in which everything is possible.

    Args:
        cfg: the composed configuration.
        hydra_cfg: Hydra's own.
        own: what of the schema has the keys that a verb has beside those of a run.

    Raises:
        ConfigError: the first thing that is not, in one sentence.
    """
    for sentence in missing_sections(cfg):
        raise ConfigError(sentence)
    try:
        config = plain(cfg)
    except UserError as error:
        raise ConfigError(str(error)) from error
    choices = choices_of(hydra_cfg)
    words = [str(word) for word in (*hydra_cfg.overrides.hydra, *hydra_cfg.overrides.task)]
    for found in (lost_reference(cfg, hydra_cfg), other_kind(words, choices["_mode"] == "MULTIRUN")):
        if found is not None:
            raise ConfigError(found)
    for sentence in wrong_values(cfg, config, choices, own):
        raise ConfigError(sentence)
    check(cfg, config, choices)
    return config


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


RULES: tuple[Rule, ...] = (
    fp16_needs_gpu,
    shards_for_several,
    compiler_at_hand,
    watched,
    slices,
    best_look,
    logger_to_make,
    features_to_keep,
    possible_name,
    possible_names,
    nodes_are_found,
    ranks_need_a_process_tree,
    leaking_mask,
    text_to_mix,
    files_exist,
)
"""Checked before the recipe is parsed (``vlmlab.recipe.stage.parse`` has the rules of single stages)."""

STAGE_RULES: tuple[Rule, ...] = (
    something_to_train,
    captions_of_its_own,
    contrastive_counts,
    pairs_need_two_towers,
    images_to_learn_from,
    experts_to_balance,
    trees_show_images_once,
    queries_meet_texts,
    objectives_with_weights,
    loss_for_the_lm,
    prompt_learnt_in_the_open,
    instruction_is_learnt,
    queries_that_learn,
    towers_to_adapt,
    nothing_to_adapt,
    layers_hold_the_adapter,
    contrastive_towers,
    paired_towers,
)
"""Checked after, on stages that are well-formed."""


def choices_of(hydra_cfg: HydraConf) -> dict[str, Any]:
    """The chosen file of every group, how Hydra was started (``_mode``: RUN or MULTIRUN) and with which overrides."""
    return {str(key): value for key, value in hydra_cfg.runtime.choices.items()} | {
        "_mode": getattr(hydra_cfg.mode, "name", None),
        "_overrides": list(hydra_cfg.overrides.task),
    }
