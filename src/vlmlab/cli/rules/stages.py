"""What a stage asks of the composition: objectives, adapters, towers, and something to train."""

from __future__ import annotations

from collections.abc import Mapping

from vlmlab.cli.rules.asking import (
    Choices,
    Config,
    called,
    choice_of,
    class_of,
    classes_in,
    declaring,
    each_stage,
    in_the_sequence,
    objectives_of,
    sees_nothing,
    trained_by,
    value_at,
)
from vlmlab.cli.rules.declared import declared, offers
from vlmlab.contracts.values import shown
from vlmlab.runs.trust import source_of

LANGUAGE = ("vlmlab.engine.alignment.AlignmentModule", "vlmlab.engine.instruction.InstructionTuningModule")

CONTRASTIVE = "vlmlab.engine.contrastive.ContrastiveModule"
PAIR = "vlmlab.engine.pair.PairModule"
CAPTIONS = ("short", "dense", "captions")
"""Sources of ``data.train`` that stages of alignment learn from."""


def captions_of_its_own(cfg: Config, choices: Choices) -> str | None:
    """Data without captions are aligned on those of the generated world only where the command says so."""
    data = cfg.get("data")
    if not isinstance(data, Mapping) or data.get("captions", "its own") is not None:
        return None
    for name, stage in each_stage(cfg):
        if stage.get("data") in CAPTIONS and stage.get("steps") != 0:
            return (
                f"recipe.stages.{name} learns from captions and data={choices.get('data')} has none; use recipe=joint, "
                "with init_from=<a run that was aligned on captions> where there is one, or data.captions=world for "
                "those of the generated 64-pixel world"
            )
    return None


def pairs_need_two_towers(cfg: Config, choices: Choices) -> str | None:
    """Some objectives compare pooled images with texts, which ``PairModule`` and ``ContrastiveModule`` make."""
    for name, stage in each_stage(cfg):
        paired = declaring("pairs", cfg, stage)
        if stage.get("module") in LANGUAGE and paired:
            return (
                f"recipe.stages.{name} trains the LM's words and {called(paired[0], cfg, choices)} wants pairs of an "
                f"image and a text; use objective=lm, or recipe=contrastive (module {PAIR})"
            )
    return None


def images_to_learn_from(cfg: Config, choices: Choices) -> str | None:
    """Some objectives read what the connector or the encoder gives, or visual tokens in the LM's sequence."""
    fusion, blind = f"fusion={choices.get('fusion')}", sees_nothing(cfg)
    for name, stage in each_stage(cfg):
        for target in declaring("reads_images", cfg, stage) if blind else ():
            return (
                f"recipe.stages.{name} has {called(target, cfg, choices)}, which reads images, and {fusion} leaves "
                "them out; use objective=lm, or fusion=concat"
            )
        for target in declaring("reads_sequence", cfg, stage) if not blind and in_the_sequence(cfg) is False else ():
            return (
                f"recipe.stages.{name} has {called(target, cfg, choices)}, which reads visual tokens in the LM's "
                f"sequence, and {fusion} puts none there; use objective=lm, or fusion=concat"
            )
    return None


def experts_to_balance(cfg: Config, choices: Choices) -> str | None:
    """An objective may read how a fusion's experts are chosen."""
    targets = classes_in(cfg.get("fusion"))
    if any(declared(target, "has_experts") is True or source_of(target) is None for target in targets):
        return None
    for name, stage in each_stage(cfg):
        for target in declaring("reads_experts", cfg, stage):
            return (
                f"recipe.stages.{name} has {called(target, cfg, choices)}, which reads how experts are chosen, and "
                f"fusion={choices.get('fusion')} has none; use fusion=moe, or leave that objective out"
            )
    return None


def trees_show_images_once(cfg: Config, choices: Choices) -> str | None:
    """Some objectives count images, or samples with all their answers, which are fewer where questions share them."""
    if value_at(cfg, "collate.questions") != "tree":
        return None
    for name, stage in each_stage(cfg):
        prompt = stage.get("prompt") or declared(str(stage.get("module")), "prompt")
        for need in ("pairs", "reads_images", "reads_sequence", "reads_text_side") if prompt == "chat" else ():
            for target in declaring(need, cfg, stage):
                return (
                    f"recipe.stages.{name} has {called(target, cfg, choices)}, which counts images, and "
                    "collate.questions=tree shows each once to several questions; set collate.questions=rows"
                )
    return None


def queries_meet_texts(cfg: Config, choices: Choices) -> str | None:
    """itc, itm and itg read a caption inside the connector, beside its queries."""
    connector = cfg.get("connector")
    target = str(value_at(cfg, "connector._target_"))
    able = offers(target, "joint")
    if not isinstance(connector, Mapping) or able is None:
        return None
    if able and (connector.get("text") is True or connector.get("instruction") is True):
        return None
    for name, stage in each_stage(cfg):
        for objective in declaring("reads_text_side", cfg, stage):
            key = "text" if "text" in connector else "instruction"
            remedy = f"set connector.{key}=true" if able else "use connector=qformer connector.text=true"
            return (
                f"recipe.stages.{name} has {called(objective, cfg, choices)}, which compares queries with texts, and "
                f"connector={choices.get('connector')} has no text side; {remedy}, or connector=instruct_qformer"
            )
    return None


def objectives_with_weights(cfg: Config, choices: Choices) -> str | None:
    """An objective with weights of its own has a learning rate; found before the stages without it are trained."""
    for name, stage in each_stage(cfg):
        train = stage.get("train") or {}
        for target in objectives_of(cfg, stage):
            if "objective" not in trained_by(stage) and offers(target, "attach"):
                plus = "" if "objective" in train else "+"
                return (
                    f"recipe.stages.{name} has {called(target, cfg, choices)}, which has weights of its own, and "
                    f"gives them no learning rate; add {plus}recipe.stages.{name}.train.objective=1e-3"
                )
    return None


def loss_for_the_lm(cfg: Config, choices: Choices) -> str | None:
    """A stage that trains the LM has an objective that reaches it."""
    for name, stage in each_stage(cfg):
        targets = objectives_of(cfg, stage)
        if "lm" in trained_by(stage) and targets and all(declared(target, "reaches_lm") is False for target in targets):
            objectives = " and ".join(called(target, cfg, choices) for target in targets)
            rate = shown(stage["train"].get("lm"))
            return (
                f"recipe.stages.{name}.train.lm={rate} trains the LM, whose layers get no gradient from {objectives}; "
                "put objective lm beside it (as conf/recipe/cg_vlm.yaml does), or set "
                f"recipe.stages.{name}.train.lm=null"
            )
    return None


def towers_to_adapt(cfg: Config, choices: Choices) -> str | None:
    """``adapter.parts`` names parts that this composition has; found before the stages without adapter are trained."""
    for name, stage in each_stage(cfg):
        adapter = stage.get("adapter", cfg.get("adapter"))
        parts = adapter.get("parts") if isinstance(adapter, Mapping) else None
        if not isinstance(adapter, Mapping) or not isinstance(parts, list):
            continue
        where = f"the adapter of recipe.stages.{name} has parts"
        kind = class_of(adapter)
        if declared(kind, "lm_only") is True and parts != ["lm"]:
            chosen = choice_of("adapter", kind)
            return f"{where}={parts} and adapter={chosen} is read by the LM alone; set adapter.parts=[lm]"
        if declared(kind, "towers_only") is True and (others := sorted({*parts} - {"lm", "encoder"})):
            chosen = choice_of("adapter", kind)
            return f"{where}={parts} and adapter={chosen} wraps lm and encoder alone; take out {' and '.join(others)}"
        gone = [part for part in ("encoder", "connector") if part in parts]
        if gone and sees_nothing(cfg):
            return f"{where}={parts} and fusion={choices.get('fusion')} leaves no {gone[0]}; set adapter.parts=[lm]"
        bare = all(declared(target, "has_weights") is False for target in classes_in(cfg.get("fusion")))
        if "fusion" in parts and bare:
            return f"{where}={parts} and fusion={choices.get('fusion')} has no weights; take out fusion"
    return None


def nothing_to_adapt(cfg: Config, choices: Choices) -> str | None:
    """Raw patches have no layer that an adapter could wrap, and some adapters want one transformers tower."""
    tower = class_of(cfg.get("encoder"))
    for name, stage in each_stage(cfg):
        adapter = stage.get("adapter", cfg.get("adapter"))
        if not isinstance(adapter, Mapping) or "encoder" not in (adapter.get("parts") or ()):
            continue
        where = f"the adapter of recipe.stages.{name} names encoder in its parts"
        if declared(tower, "has_tower") is False and value_at(cfg, "encoder.features") is None:
            return (
                f"{where} and encoder={choice_of('encoder', tower)} has no layer to adapt; take encoder out of "
                "adapter.parts, or give encoder.features a width"
            )
        kind = class_of(adapter)
        if declared(kind, "one_tower") is True and declared(tower, "one_tower") is False:
            wants = f"adapter={choice_of('adapter', kind)} wants a single tower there"
            return f"{where} and {wants}; set adapter.parts=[lm], or use adapter=lora"
    return None


def layers_hold_the_adapter(cfg: Config, choices: Choices) -> str | None:
    """A range of layers trains what is in them; the words of a soft prompt come before the first."""
    for name, stage in each_stage(cfg):
        kind = class_of(stage.get("adapter", cfg.get("adapter")))
        if declared(kind, "in_layers") is False and (stage.get("layers") or {}).get("lm") is not None:
            return (
                f"recipe.stages.{name}.layers.lm chooses layers and adapter={choice_of('adapter', kind)} has no "
                f"weights in them; set recipe.stages.{name}.layers=null, or use adapter=lora"
            )
    return None


def contrastive_towers(cfg: Config, choices: Choices) -> str | None:
    """``ContrastiveModule`` compares the pooled output of one tower with a text."""
    names = [name for name, stage in each_stage(cfg) if stage.get("module") == CONTRASTIVE]
    if not names:
        return None
    where = f"recipe.stages.{names[0]} is a ContrastiveModule and wants"
    if sees_nothing(cfg):
        return f"{where} images, which fusion={choices.get('fusion')} leaves out; use fusion=concat"
    if declared(class_of(cfg.get("encoder")), "one_tower") is False:
        return f"{where} one tower that pools; use encoder=scratch, embedded or hf with encoder.layers=null"
    if value_at(cfg, "encoder.layers") is not None:
        return f"{where} the pooled output after the last layer; set encoder.layers=null"
    return None


def paired_towers(cfg: Config, choices: Choices) -> str | None:
    """``PairModule`` compares the pooled output of one tower with that of a text tower, by objectives of pairs."""
    for name, stage in each_stage(cfg):
        if stage.get("module") != PAIR:
            continue
        where = f"recipe.stages.{name} is a PairModule and"
        if not class_of(cfg.get("text_tower")):
            return f"{where} wants a text tower; add +text_tower=scratch, hf, embedded or embedded_siglip"
        tower = class_of(cfg.get("encoder"))
        if declared(tower, "one_tower") is False or declared(tower, "has_tower") is False:
            return f"{where} wants one tower that pools; use encoder=scratch, embedded or hf"
        for target in objectives_of(cfg, stage):
            if offers(target, "__call__") is not None and declared(target, "pairs") is not True:
                return (
                    f"{where} has {called(target, cfg, choices)}, which reads words or visual tokens of a language "
                    "model; choose objective=siglip or clip"
                )
    return None


def something_to_train(cfg: Config, choices: Choices) -> str | None:
    """Without vision (fusion=none) only the LM can learn; stages that train the vision side alone are skipped."""
    learns = any("lm" in trained_by(stage) for _, stage in each_stage(cfg))
    if sees_nothing(cfg) and not learns:
        only = f"fusion={choices.get('fusion')} leaves only the LM"
        return f"{only} and no stage of the recipe trains lm; choose another fusion or recipe"
    trains = {part for _, stage in each_stage(cfg) for part in trained_by(stage)}
    weighted = value_at(cfg, "encoder.features") is not None or value_at(cfg, "encoder.newline")
    tower = class_of(cfg.get("encoder"))
    if all(declared(target, "has_weights") is False for target in classes_in(cfg.get("fusion"))):
        trains -= {"fusion"}
    if trains == {"encoder"} and declared(tower, "has_tower") is False and not weighted:
        return (
            f"encoder={choice_of('encoder', tower)} has no weights and the recipe trains nothing but the encoder; set "
            "encoder.features to a width, or choose another recipe"
        )
    return None


def contrastive_counts(cfg: Config, choices: Choices) -> str | None:
    """A contrastive loss compares the samples of one micro-batch, so that accumulation changes it without a cache."""
    for name, stage in each_stage(cfg):
        for target in objectives_of(cfg, stage) if int(stage.get("accumulate") or 1) > 1 else ():
            cached = declared(target, "of_embeddings") is True and declared(str(stage.get("module")), "caches") is True
            if declared(target, "per_micro_batch") is True and not cached:
                return (
                    f"recipe.stages.{name}.accumulate={stage['accumulate']} changes {called(target, cfg, choices)}, "
                    f"which compares the samples of one micro-batch; set recipe.stages.{name}.accumulate=1"
                )
    return None
