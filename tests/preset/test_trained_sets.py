"""What the stages of published systems train, inside their parts too, and where a preset says that it deviates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.test_conf import CHOICES, composed

from vlmlab.analyse.table import final_table
from vlmlab.cli.rules import check
from vlmlab.engine.weights import StagedModel
from vlmlab.model.build import build_collator, build_model
from vlmlab.model.questions import read_questions
from vlmlab.recipe.preset import deviations
from vlmlab.recipe.stage import parse
from vlmlab.runs.config import config_hash, plain

QFORMER = {"connector.norm", "connector.queries", "connector.qformer", "connector.out"}
READING = {"connector.words", "connector.places"}
TRAINS: dict[str, dict[str, set[str]]] = {
    "minigpt4": {"queries": QFORMER, "pairs": {"connector.out"}, "curated": {"connector.out"}},
    "bliva": {
        "queries": QFORMER | READING,
        "align": {"connector.patches"},
        "instruct": QFORMER | READING | {"connector.patches"},
    },
    "llama_vid": {"align": {"connector.out", "connector.key", "connector.value", "connector.project"}},
    "ovis": {"table": {"connector.head", "connector.norm", "connector.table", "encoder.tower"}},
    "instructblip": {"align": QFORMER | READING, "instruct": QFORMER | READING},
}


@pytest.mark.parametrize("preset", TRAINS)
def test_each_stage_trains_what_the_paper_says(preset: str) -> None:
    cfg = composed(f"preset={preset}")
    check(cfg, plain(cfg), {"preset": preset})
    with torch.device("meta"):
        staged = StagedModel(build_model(cfg))
        for stage in parse(cfg):
            staged.enter(stage)
            want = TRAINS[preset].get(stage.name)
            assert want is None or {".".join(name.split(".")[:2]) for name in staged.trained()} == want, stage.name
            if preset == "ovis" and stage.name == "table":
                depth = len(staged.model.encoder.tower.encoder.layers)
                blocks = {name for name in staged.trained() if name.startswith("encoder.")}
                assert blocks and all(f".layers.{depth - 1}." in name for name in blocks)
            sizes = {part: trained for part, _, trained, _ in staged.table(stage)}
            assert sum(sizes.values()) == sum(p.numel() for p in staged.trained().values())


@pytest.mark.parametrize("preset", ["instructblip", "bliva", "llama_vid"])
def test_what_reads_the_question_learns_one_a_row(preset: str) -> None:
    cfg = composed(f"preset={preset}")
    with torch.device("meta"):
        model = build_model(cfg)
    assert read_questions(cfg, model, "chat") == ("rows", "the connector reads the question")
    assert build_collator(cfg, model, "chat").questions == "rows"
    cfg.collate.questions = "whole"
    assert build_collator(cfg, model, "chat").questions == "conversation"


def test_a_preset_says_where_it_deviates(tmp_path: Path) -> None:
    cfg = composed("preset=minigpt4")
    (said,) = deviations(cfg)
    assert said.startswith("the preset deviates from its paper: no pre-trained Q-Former is shipped")
    result: dict[str, Any] = {"metrics": {}, "cost": {}, "notes": [said]}
    assert "note: the preset deviates from its paper:" in final_table(result)
    before = config_hash(plain(cfg))
    cfg.preset.deviates = ["words"]
    assert config_hash(plain(cfg)) == before
    assert deviations(composed()) == []


@pytest.mark.parametrize("preset", [choice for group, choice in CHOICES if group == "preset"])
def test_deviations_are_sentences_without_an_end(preset: str) -> None:
    for said in OmegaConf.select(composed(f"preset={preset}"), "preset.deviates") or ():
        assert said[0].islower() and not said.endswith(".") and len(said) < 120
