"""Each rule on plain values, and those that a choice on the command line can break on the real configuration."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from tests import tiny

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules import check, choices_of
from vlmlab.cli.rules.declared import declared, offers
from vlmlab.cli.rules.machine import compiler_at_hand
from vlmlab.cli.rules.run import features_to_keep
from vlmlab.cli.rules.stages import CONTRASTIVE, LANGUAGE, captions_of_its_own
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.runs.config import leaves, plain

SIGLIP = "vlmlab.objective.siglip.Siglip"
CLIP = "vlmlab.objective.clip.Clip"
QUERY_TEXT = "vlmlab.objective.query_text.QueryTextAlignment"
PATCH_TEXT = "vlmlab.objective.patch_text_contrast.PatchTextContrast"
ASVR = "vlmlab.objective.asvr.SemanticReconstruction"
PATCH = "vlmlab.encoder.patch.PatchEncoder"
MULTI = "vlmlab.encoder.multi.MultiEncoder"
MMA = "vlmlab.adapter.mma.MmaAdapter"
CONTROL = "vlmlab.mask.visual_rows_open.VisualRowsOpen"
SOFT_PROMPT = "vlmlab.adapter.soft_prompt.SoftPromptAdapter"
FUSIONS = {path.stem: plain(OmegaConf.load(path)) for path in (conf_folder() / "fusion").glob("*.yaml")}

GOOD: dict[str, Any] = {
    "seed": 0,
    "precision": {"name": "auto"},
    "trainer": {"devices": 1, "accelerator": "auto", "threads": 1, "workers": 0, "save_every_s": 30},
    "budget": {"steps_scale": 1.0, "max_steps": None, "eval_limit": None},
    "mask": {"_target_": "vlmlab.mask.bidir.Bidirectional"},
    "data": {"train": {"short": {"_target_": "x.Y", "path": None}}},
    "objective": {"_target_": "vlmlab.objective.lm.LanguageModelling"},
    "recipe": {
        "stages": {
            "align": {"module": "a.B", "train": {"connector": 1e-3}, "data": "short", "steps": 1, "batch_size": 4},
            "tune": {"module": "a.B", "train": {"lm": 1e-3}, "data": "short", "steps": 1, "batch_size": 4},
        }
    },
}
CHOICES = {"fusion": "concat", "mask": "bidir", "hydra/launcher": "pool", "_mode": "RUN"}


def changed(changes: dict[str, Any], choices: dict[str, Any] | None) -> DictConfig:
    cfg = OmegaConf.create(copy.deepcopy(GOOD))
    fusion = FUSIONS[(CHOICES | (choices or {}))["fusion"]]
    for key, value in ({"fusion": fusion} | changes).items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def refused(changes: dict[str, Any], choices: dict[str, Any] | None = None) -> str:
    cfg = changed(changes, choices)
    with pytest.raises(ConfigError) as caught:
        check(cfg, plain(cfg), CHOICES | (choices or {}))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_good_composition_passes() -> None:
    cfg = OmegaConf.create(GOOD)
    check(cfg, plain(cfg), CHOICES)
    passes({}, {"fusion": "none"})  # the LM still learns


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision.name": "fp16", "trainer.accelerator": "cpu"}, "needs a GPU"),
        ({"mask._target_": CONTROL}, "visual_rows_open leaks"),
        (
            {"recipe.stages.tune.mask": {"_target_": "vlmlab.mask.visual_rows_open.VisualRowsOpen"}},
            "recipe.stages.tune.mask=",
        ),
        ({"data.train.short.path": "/no/such"}, "data.train.short.path=/no/such does not exist"),
        ({"recipe.stages.align.train": {"brain": 1e-3}}, "brain"),
        ({"recipe.stages.align.data": "shrot"}, "recipe.stages.align.data=shrot"),
        ({"recipe.stages.align.steps": -1}, "recipe.stages.align.steps=-1"),
        ({"recipe.stages.align.batch_size": 0}, "recipe.stages.align.batch_size=0"),
        ({"objective": {"_target_": SIGLIP}, "recipe.stages.tune.accumulate": 2}, "recipe.stages.tune.accumulate=2"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(changes: dict[str, Any], words: str) -> None:
    assert words in refused(changes)


def test_data_without_captions_align_on_no_others_in_silence() -> None:
    """Unless the command says so, or no stage learns from captions."""
    data = {"train": {"short": {"_target_": "x.Y", "path": None}}, "captions": None}
    assert refused({"data": data}, {"data": "vqa"}).startswith(
        "recipe.stages.align learns from captions and data=vqa has"
    )
    for changes in ({"data": {**data, "captions": "world"}}, {"data": data, "recipe.stages.align.steps": 0}):
        config = plain(changed({**changes, "recipe.stages.tune.data": "instruct"}, None))
        assert captions_of_its_own(config, CHOICES) is None


def test_a_contrastive_objective_among_several_is_found() -> None:
    several = {"lm": {"_target_": "a.B"}, "pair": {"_target_": SIGLIP}}
    assert "accumulate=4" in refused({"recipe.stages.align.objective": several, "recipe.stages.align.accumulate": 4})


def test_no_vision_and_no_lm_trained_is_nothing_to_train() -> None:
    assert "fusion=none" in refused({"recipe.stages.tune.train": {"connector": 1e-3}}, {"fusion": "none"})


def test_ranks_cannot_be_swept_by_the_basic_launcher() -> None:
    cfg = OmegaConf.create(copy.deepcopy(GOOD))
    cfg.trainer.devices = 2
    basic = {"hydra/launcher": "basic", "_mode": "MULTIRUN"}
    assert "hydra/launcher=pool" in refused({"trainer.devices": 2}, basic)
    check(cfg, plain(cfg), CHOICES | {"hydra/launcher": "basic"})


def test_compiling_wants_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for on, compiler, words in (
        (True, "/no/such/compiler", "needs a C++ compiler and /no/such/compiler is not to be found"),
        (True, sys.executable, None),
        (False, "/no/such/compiler", None),
    ):
        monkeypatch.setenv("CXX", compiler)
        said = compiler_at_hand({"trainer": {"compile": on}}, {})
        assert said is None if words is None else words in str(said)


def test_a_file_that_is_there_passes(tmp_path: Path) -> None:
    cfg = OmegaConf.create(copy.deepcopy(GOOD))
    cfg.data.train.short.path = str(tmp_path)
    check(cfg, plain(cfg), CHOICES)


def passes(changes: dict[str, Any], choices: dict[str, Any] | None = None) -> None:
    cfg = changed(changes, choices)
    check(cfg, plain(cfg), CHOICES | (choices or {}))


def test_the_leaking_mask_is_refused_from_the_command_line() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("train", ["mask=visual_rows_open"], return_hydra_config=True)
    cfg = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    with pytest.raises(ConfigError) as caught:
        check(cfg, plain(cfg), choices_of(composed.hydra))
    assert str(caught.value) == (
        "mask=visual_rows_open leaks later answers and is a control for tests only; choose mask=bidir"
    )


MASKS = {path.stem: plain(OmegaConf.load(path)) for path in sorted((conf_folder() / "mask").glob("*.yaml"))}
TEXT = {"recipe.stages.tune.prompt": "text"}


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "visual_rows_open"])
def test_a_prompt_that_is_learnt_is_not_shown(mask: str) -> None:
    passes({"mask": MASKS[mask]})
    passes({"mask": MASKS[mask], "recipe.stages.tune.prompt": "plain"})
    if declared(MASKS[mask]["_target_"], "shows_prompt"):
        words = f"recipe.stages.tune.prompt=text learns the words of the prompt, which mask={mask} shows"
        assert refused({"mask": MASKS[mask], **TEXT}).startswith(words)
    else:
        passes({"mask": MASKS[mask], **TEXT})


def test_a_stages_own_mask_counts() -> None:
    own = {"recipe.stages.tune.mask": MASKS["prefix_lm"]}
    passes(own)
    assert "mask=prefix_lm shows" in refused({**own, **TEXT})
    passes({"mask": MASKS["prefix_lm"], "recipe.stages.tune.mask": MASKS["causal"], **TEXT})


def test_an_adapter_needs_layers() -> None:
    bare, wide = ({"_target_": PATCH, "features": features} for features in (None, 32))
    both, alone = ({"_target_": "x.Y", "parts": parts} for parts in (["lm", "encoder"], ["lm"]))
    assert "recipe.stages.tune names encoder" in refused({"encoder": bare, "recipe.stages.tune.adapter": both})
    assert "encoder.features" in refused({"encoder": bare, "adapter": both})
    passes({"encoder": bare, "adapter": both, **{f"recipe.stages.{n}.adapter": None for n in ("align", "tune")}})
    passes({"encoder": wide, "adapter": both})
    passes({"encoder": bare, "adapter": alone})


def test_an_adapter_that_wants_one_tower() -> None:
    mma = {"_target_": MMA, "parts": ["encoder"]}
    assert "adapter=mma wants a single tower" in refused({"encoder": {"_target_": MULTI}, "adapter": mma})
    passes({"encoder": {"_target_": MULTI}, "adapter": mma | {"parts": ["lm"]}})
    passes({"encoder": {"_target_": "vlmlab.encoder.hf.HfEncoder"}, "adapter": mma})


DISK = {"_target_": "vlmlab.cache.disk.DiskCache", "folder": "x", "max_gb": 50, "dtype": None}


def test_a_cache_wants_a_whole_tower() -> None:
    off = {"_target_": "vlmlab.cache.none.NoCache"}
    blind, patches = FUSIONS["none"], {"_target_": PATCH}
    chosen = {"cache": "disk", "fusion": "none"}
    assert "cache=disk keeps what an encoder sees and fusion=none has none" in refused(
        {"cache": DISK, "fusion": blind}, chosen
    )
    assert "encoder=patch has no tower" in refused({"cache": DISK, "encoder": patches})
    passes({"cache": off, "fusion": blind})
    passes({"cache": off, "encoder": patches})
    passes({"cache": DISK, "encoder": {"_target_": MULTI}, "fusion": {"_target_": "vlmlab.fusion.concat.ConcatFusion"}})
    split = {"cache": DISK, "trainer": {"strategy": "split"}}
    assert "trainer.strategy=split splits it over ranks" in str(features_to_keep(split, CHOICES))
    assert features_to_keep({**split, "cache": off}, CHOICES) is None


def test_a_range_of_layers_holds_the_adapter() -> None:
    words = {"_target_": SOFT_PROMPT, "parts": ["lm"]}
    layers = {"recipe.stages.tune.layers": {"lm": [-2, -1]}}
    assert "recipe.stages.tune.layers.lm chooses layers" in refused({"adapter": words, **layers})
    passes({"adapter": words, "recipe.stages.tune.adapter": None, **layers})
    passes({"adapter": words, "recipe.stages.tune.layers": {"lm": None}})
    passes({"adapter": words | {"_target_": "vlmlab.adapter.lora.LoraAdapter"}, **layers})


def test_a_contrastive_stage_wants_a_pooled_tower() -> None:
    stage = {"recipe.stages.align.module": CONTRASTIVE}
    for target in (PATCH, MULTI):
        assert "recipe.stages.align is a ContrastiveModule" in refused({"encoder": {"_target_": target}, **stage})
    assert "set encoder.layers=null" in refused({"encoder": {"_target_": "a.B", "layers": [-2]}, **stage})
    assert "fusion=none leaves out" in refused(stage, {"fusion": "none"})
    passes({"encoder": {"_target_": "a.B", "layers": None}, **stage})


def test_a_pair_stage_wants_two_towers_and_an_objective_of_pairs() -> None:
    align = {"recipe.stages.align.module": "vlmlab.engine.pair.PairModule"}
    pair = {**align, "recipe.stages.align.objective": {"_target_": SIGLIP}}
    text = {"text_tower": {"_target_": "a.B"}}
    assert "recipe.stages.align is a PairModule and wants a text tower; add +text_tower=" in refused(pair)
    for target in (PATCH, MULTI):
        assert "PairModule and wants one tower that pools" in refused({"encoder": {"_target_": target}, **pair, **text})
    lm = {"_target_": "vlmlab.objective.lm.LanguageModelling"}
    assert "choose objective=siglip or clip" in refused({**align, **text, "recipe.stages.align.objective": lm})
    passes({**pair, **text})
    passes({**pair, **text, "recipe.stages.align.accumulate": 2})  # a gradient cache


def test_raw_patches_alone_cannot_train() -> None:
    only = {f"recipe.stages.{name}.train": {"encoder": 1e-3, "lm": None} for name in ("align", "tune")}
    assert "encoder=patch has no weights" in refused({"encoder": {"_target_": PATCH}, **only})
    passes({"encoder": {"_target_": PATCH, "newline": True}, **only})
    passes({"encoder": {"_target_": PATCH, "features": 8}, **only})
    passes({"encoder": {"_target_": PATCH}})


LM = {"_target_": "vlmlab.objective.lm.LanguageModelling"}
QFORMER = "vlmlab.connector.qformer.QFormerConnector"
WITH_TEXT = {"_target_": QFORMER, "text": True, "instruction": False}
ALIGN = "recipe.stages.align"
HEADS = {f"{ALIGN}.train": {"connector": 1e-3, "objective": 1e-3}}


def of_align(*targets: str) -> dict[str, Any]:
    """The objectives of the stage that trains the connector alone."""
    several = {f"o{i}": {"_target_": target} for i, target in enumerate(targets)}
    return {f"{ALIGN}.objective": several if len(targets) > 1 else {"_target_": targets[0]}}


@pytest.mark.parametrize(("target", "word"), [(SIGLIP, "siglip"), (CLIP, "clip")])
def test_pairs_of_embeddings_need_their_module(target: str, word: str) -> None:
    for module in LANGUAGE:
        assert f"objective={word} wants pairs" in refused(
            {**of_align(LM["_target_"], target), f"{ALIGN}.module": module}
        )
    passes({**of_align(target), f"{ALIGN}.module": CONTRASTIVE, "encoder": {"_target_": "a.B", "layers": None}})


@pytest.mark.parametrize(
    ("connector", "remedy"),
    [
        ({"_target_": "vlmlab.connector.mlp.MlpConnector"}, "use connector=qformer connector.text=true"),
        ({"_target_": "vlmlab.connector.several.StackConnector", "parts": {"a": WITH_TEXT}}, "use connector=qformer"),
        (WITH_TEXT | {"text": False}, "set connector.text=true"),
        ({"_target_": "vlmlab.connector.bliva.BlivaConnector", "instruction": False}, "set connector.instruction=true"),
    ],
)
def test_queries_and_texts_need_a_connector_with_a_text_side(connector: dict[str, Any], remedy: str) -> None:
    said = refused({"connector": connector, **of_align(QUERY_TEXT), **HEADS}, {"connector": "chosen"})
    assert said.startswith(f"{ALIGN} has objective=blip2, which compares queries with texts, and connector=chosen has")
    assert remedy in said
    passes({"connector": connector})


@pytest.mark.parametrize(
    "connector",
    [
        WITH_TEXT,
        WITH_TEXT | {"text": False, "instruction": True},
        {"_target_": "vlmlab.connector.bliva.BlivaConnector", "instruction": True},
        {"_target_": "vlmlab.connector.two_token.TwoTokenConnector", "instruction": True},
        {"_target_": "somebody.elses.Connector"},
    ],
)
def test_a_connector_with_a_text_side_passes(connector: dict[str, Any]) -> None:
    passes({"connector": connector, **of_align(QUERY_TEXT), **HEADS})


def test_an_objective_is_called_as_it_was_chosen() -> None:
    chosen = {"objective": {"_target_": QUERY_TEXT}, "connector": {"_target_": "vlmlab.connector.mlp.MlpConnector"}}
    assert "objective=itm, which compares" in refused(chosen, {"objective": "itm", "connector": "mlp"})


@pytest.mark.parametrize(("target", "word"), [(QUERY_TEXT, "blip2"), (ASVR, "asvr")])
def test_an_objective_with_weights_has_a_rate(target: str, word: str) -> None:
    both = {"connector": WITH_TEXT, **of_align(LM["_target_"], target)}
    said = refused(both)
    assert said.startswith(
        f"{ALIGN} has objective={word}, which has weights of its own, and gives them no learning rate"
    )
    assert said.endswith(f"add +{ALIGN}.train.objective=1e-3")
    null = {**both, f"{ALIGN}.train": {"connector": 1e-3, "objective": None}}
    assert refused(null).endswith(f"add {ALIGN}.train.objective=1e-3")
    passes({**both, **HEADS})


@pytest.mark.parametrize("target", [QUERY_TEXT, ASVR])
def test_what_reads_images_has_some(target: str) -> None:
    objective = {"connector": WITH_TEXT, **of_align(target), **HEADS}
    assert "fusion=none leaves them out" in refused(objective, {"fusion": "none"})
    passes(objective)


@pytest.mark.parametrize("targets", [(QUERY_TEXT,), (PATCH_TEXT,), (PATCH_TEXT, QUERY_TEXT)])
def test_the_lm_is_trained_by_an_objective_that_reaches_it(targets: tuple[str, ...]) -> None:
    stage = {"connector": WITH_TEXT, **of_align(*targets)}
    with_lm = {f"{ALIGN}.train": {"connector": 1e-3, "lm": 1e-3, "objective": 1e-3}}
    said = refused({**stage, **with_lm})
    assert said.startswith(
        f"{ALIGN}.train.lm=0.001 trains the LM, whose layers get no gradient from objective="
    ) and said.endswith(f"set {ALIGN}.train.lm=null")
    passes({**stage, **HEADS})
    passes({**stage, **with_lm, **of_align(LM["_target_"], *targets)})
    passes({**stage, **with_lm, **of_align(*targets, "somebody.elses.Loss")})


def test_samples_are_compared_within_one_micro_batch() -> None:
    for target in (SIGLIP, CLIP, PATCH_TEXT, QUERY_TEXT):
        changes = {"connector": WITH_TEXT, **of_align(LM["_target_"], target), **HEADS, f"{ALIGN}.accumulate": 2}
        assert f"{ALIGN}.accumulate=2 changes objective=" in refused(changes)
    passes({**of_align(LM["_target_"], ASVR), **HEADS, f"{ALIGN}.accumulate": 2})


@pytest.mark.parametrize("target", [PATCH_TEXT, ASVR])
def test_what_reads_visual_tokens_in_the_sequence_has_some(target: str) -> None:
    objective = {**of_align(LM["_target_"], target), **HEADS}
    inside, beside = FUSIONS["gated_xattn"], FUSIONS["concat"]
    several = {"_target_": "vlmlab.fusion.several.SeveralFusion", "parts": {"a": inside}}
    for fusion in (inside, several):
        said = refused({"fusion": fusion, **objective})
        assert "which reads visual tokens in the LM's sequence, and fusion=concat puts none there" in said
    passes({"fusion": several | {"parts": {"a": inside, "b": beside}}, **objective})
    passes({"fusion": several | {"parts": {"a": inside, "b": {"_target_": "somebody.elses.Fusion"}}}, **objective})


def test_experts_that_are_balanced_are_there() -> None:
    objective = of_align(LM["_target_"], "vlmlab.objective.balance.ExpertBalance")
    said = "objective=balance, which reads how experts are chosen, and fusion=concat has none; use fusion=moe"
    assert said in refused(objective)
    several = {"_target_": "vlmlab.fusion.several.SeveralFusion", "parts": {"a": FUSIONS["moe"]}}
    for fusion in (FUSIONS["moe"], several, {"_target_": "somebody.elses.Fusion"}):
        passes({"fusion": fusion, **objective})


def test_a_prompt_that_is_learnt_is_not_read_by_the_fusion() -> None:
    passes({}, {"fusion": "emma"})
    assert "learns the words of the prompt, which fusion=emma reads" in refused(TEXT, {"fusion": "emma"})


def test_queries_of_visual_positions_decide_something() -> None:
    alone = {"mask": {"_target_": "vlmlab.mask.visual_self_only.VisualSelfOnly"}}
    trained = alone | {"recipe.stages.tune.train": {"connector": 1e-3, "fusion": 1e-3}}
    said = refused(trained, {"fusion": "visual_expert"})
    assert "under mask=visual_self_only they decide nothing; choose another mask, or fusion.sublayers=mlp" in said
    own = {"fusion": "mixture_of_transformers"}
    assert "choose another mask, or fusion.untied=[mlp,norms]" in refused(trained, own)
    passes(trained | {"fusion": {**FUSIONS["mixture_of_transformers"], "untied": ["mlp", "norms"]}}, own)
    passes(trained | {"fusion": FUSIONS["visual_expert"] | {"sublayers": "mlp"}}, {"fusion": "visual_expert"})
    passes(alone, {"fusion": "visual_expert"})  # they stay as they are
    passes(trained)


DECLARED = {
    "mask": ("leaks", "shows_prompt", "visual_alone"),
    "fusion": ("reads", "in_sequence", "reads_text", "visual_queries", "has_experts"),
    "objective": (
        *(
            "per_micro_batch",
            "pairs",
            "of_embeddings",
            "reads_images",
            "reads_sequence",
            "reads_text_side",
            "reads_experts",
        ),
        "reaches_lm",
    ),
    "encoder": ("has_tower", "one_tower", "has_text"),
    "adapter": ("lm_only", "one_tower", "in_layers"),
    "cache": ("keeps",),
}


@pytest.mark.parametrize("group", DECLARED)
def test_what_is_read_from_a_source_file_is_so(group: str) -> None:
    """The rules know a class by its text, and by that of the classes it inherits from; here is the class itself."""
    from hydra.utils import get_class

    said = set()
    for file in sorted((conf_folder() / group).glob("*.yaml")):
        nested = [
            value for key, value in leaves(OmegaConf.to_container(OmegaConf.load(file))) if key.endswith("_target_")
        ]
        for target, name in itertools.product(nested, DECLARED[group]):
            of_class = getattr(get_class(target), name, None)
            assert declared(target, name) == of_class, (target, name)
            said.add((name, str(of_class)))
    for name in DECLARED[group]:
        assert len({value for own, value in said if own == name}) > 1, f"no choice differs from the others in {name}"


def test_a_method_is_found_in_the_text_where_the_class_has_it() -> None:
    from hydra.utils import get_class

    for group, method in (("objective", "attach"), ("connector", "joint")):
        for file in sorted((conf_folder() / group).glob("*.yaml")):
            target = tiny.loaded(file)._target_
            assert offers(target, method) is hasattr(get_class(target), method), target
    assert offers("somebody.elses.Class", "attach") is None and offers("vlmlab.no.such.Class", "attach") is None
    assert declared("somebody.elses.Class", "leaks") is None and declared("vlmlab.no.such.Class", "leaks") is None
