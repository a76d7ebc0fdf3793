"""How vision may meet language: masks, fusions, and connectors that read the instruction."""

from __future__ import annotations

from vlmlab.cli.rules.asking import (
    Choices,
    Config,
    choice_of,
    class_of,
    classes_in,
    each_stage,
    parts_of,
    reading_key,
    trained_by,
    value_at,
)
from vlmlab.cli.rules.declared import declared

WORDLESS = ("dinov2",)
"""Families of towers, as a config.json names them, that were trained without texts."""


def leaking_mask(cfg: Config, choices: Choices) -> str | None:
    """A mask that says of itself that it shows later answers is a negative control, nothing to train with."""
    stages = each_stage(cfg)
    masks = [("mask", cfg.get("mask")), *((f"recipe.stages.{n}.mask", s.get("mask")) for n, s in stages)]
    for key, mask in masks:
        target = class_of(mask)
        if declared(target, "leaks") is True:
            chosen = choice_of("mask", target)
            return f"{key}={chosen} leaks later answers and is a control for tests only; choose mask=bidir"
    return None


def text_to_mix(cfg: Config, choices: Choices) -> str | None:
    """A fusion that reads the user's words does so by the encoder's text tower."""
    if not any(declared(target, "reads_text") is True for target in classes_in(cfg.get("fusion"))):
        return None
    tower, family = class_of(cfg.get("encoder")), str(value_at(cfg, "encoder.architecture.model_type"))
    if declared(tower, "has_text") is not False and family not in WORDLESS:
        return None
    return (
        f"fusion={choices.get('fusion')} reads the user's words by the encoder's text tower and "
        f"encoder={choices.get('encoder') or choice_of('encoder', tower)} has none; choose a CLIP or SigLIP encoder "
        "(as encoder=clip_vit_l14_336), or fusion=concat"
    )


def prompt_learnt_in_the_open(cfg: Config, choices: Choices) -> str | None:
    """``prompt: text`` learns every word of the prompt, which some masks show to the words before it."""
    for name, stage in each_stage(cfg):
        target = class_of(stage.get("mask") or cfg.get("mask"))
        if stage.get("prompt") == "text" and declared(target, "shows_prompt") is True:
            chosen = choice_of("mask", target)
            return (
                f"recipe.stages.{name}.prompt=text learns the words of the prompt, which mask={chosen} shows to the "
                f"words that predict them; set recipe.stages.{name}.prompt=chat, or choose mask=bidir"
            )
    return None


def instruction_is_learnt(cfg: Config, choices: Choices) -> str | None:
    """What reads the user's words shows all of them to each, also where ``prompt: text`` learns them."""
    reading = reading_key(cfg)
    mixing = any(declared(target, "reads_text") is True for target in classes_in(cfg.get("fusion")))
    for name, stage in each_stage(cfg):
        learns = f"recipe.stages.{name}.prompt=text learns the words of the prompt, which"
        if stage.get("prompt") == "text" and reading is not None:
            return (
                f"{learns} the connector reads ({reading}=true); set recipe.stages.{name}.prompt=chat, or "
                f"{reading}=false"
            )
        if stage.get("prompt") == "text" and mixing:
            return f"{learns} fusion={choices.get('fusion')} reads; set recipe.stages.{name}.prompt=chat"
    return None


def queries_that_learn(cfg: Config, choices: Choices) -> str | None:
    """Where a visual position sees itself alone, its query decides nothing and weights of its own never learn."""
    own = [part for part in parts_of(cfg.get("fusion")) if declared(part.get("_target_", ""), "visual_queries")]
    own = [
        part for part in own if part.get("sublayers") != "mlp" and "attention" in (part.get("untied") or "attention")
    ]
    if not own:
        return None
    remedy = "fusion.untied=[mlp,norms]" if "untied" in own[0] else "fusion.sublayers=mlp"
    for name, stage in each_stage(cfg):
        target = class_of(stage.get("mask") or cfg.get("mask"))
        if declared(target, "visual_alone") is True and "fusion" in trained_by(stage):
            chosen, fusion = choice_of("mask", target), choices.get("fusion")
            return (
                f"recipe.stages.{name} trains the queries of visual positions that fusion={fusion} has, and under "
                f"mask={chosen} they decide nothing; choose another mask, or {remedy}"
            )
    return None
