"""How many seeds a claim needs, in words, from pilot cells."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from vlmlab.analyse.foretell import Claim, foretell
from vlmlab.analyse.power import power_of, seeds_needed
from vlmlab.contracts.errors import UserError


@pytest.fixture
def pilot(tmp_path: Path, cells: ModuleType) -> Path:
    """Two compositions whose differences are 0.00, 0.02 and 0.04, half an hour each."""
    for seed, second in enumerate((0.5, 0.52, 0.54)):
        for mask, score in (("bidir", 0.5), ("causal", second)):
            result = cells.result(score) | {"cost": {"seconds": 1800.0}}
            cells.write_cell(tmp_path, f"mask={mask}", f"seed={seed}", result=result)
    return tmp_path


def test_without_a_pilot_only_the_floor_is_known() -> None:
    first, reach, hint = foretell(Claim(4, 3, 0.03, 0.8))
    assert first == "4 compositions with 3 seeds each: 12 cells, 3 comparisons with one baseline"
    assert reach.startswith("with 3 seeds and 3 comparisons nothing can be significant") and "7 seeds can" in reach
    assert "pilot=<folder of a sweep, or its cells.csv>" in hint
    assert foretell(Claim(2, 9, None, 0.8))[1] == "6 seeds are the fewest with which any can be significant"


def test_a_claim(pilot: Path) -> None:
    text = "\n".join(foretell(Claim(2, 8, 0.03, 0.8), pilot))
    needed = seeds_needed(0.03, 0.02, 0.8)
    assert "a difference has a standard deviation of 0.02 between seeds (from differences of the same seed" in text
    assert f"a difference of 0.03 is found with power 0.8 by {needed} seeds (" in text
    assert f"8 seeds find it with power {power_of(8, 0.03, 0.02):.2f}" in text
    assert f"that is {2 * (needed or 0)} cells, {needed} h of training at the pilot's speed" in text


def test_a_record_is_as_good_a_pilot_as_its_sweep(pilot: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    record = tmp_path_factory.mktemp("record") / "cells.csv"
    lines = ["cell,overrides,config,data,code,cost.seconds,quiz/vqa_accuracy"]
    for seed, second in enumerate((0.5, 0.52, 0.54)):
        for mask, score in (("bidir", 0.5), ("causal", second)):
            words = json.dumps([f"mask={mask}", f"seed={seed}"]).replace('"', '""')
            lines.append(f'{mask}{seed},"{words}",{mask}{seed},d,c,1800.0,{score}')
    record.write_text("\n".join(lines) + "\n")
    first, second = (foretell(Claim(2, 8, 0.03, 0.8), at, "quiz/vqa_accuracy") for at in (record, pilot))
    assert [line.replace(str(record), str(pilot)) for line in first] == second
    (record.parent / "none.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="is not a record of cells"):
        foretell(Claim(2, 8, 0.03, 0.8), record.parent / "none.csv")


def test_no_claim_names_the_effect_that_can_be_seen(pilot: Path) -> None:
    text = "\n".join(foretell(Claim(2, 8, None, 0.8), pilot))
    assert "8 seeds find 0.02" in text and "with power 0.8" in text and "that is 16 cells, 8 h" in text
    assert "no number of seeds" in "\n".join(foretell(Claim(2, 8, 1e-7, 0.8), pilot))


@pytest.mark.parametrize(
    ("claim", "metric", "sentence"),
    [
        (Claim(1, 8, 0.03, 0.8), None, "one composition has nothing to be compared with"),
        (Claim(2, 8, 0.03, 0.8), "quiz/f1", r"has metric=quiz/f1; its table has quiz/vqa_accuracy"),
    ],
)
def test_refusals(claim: Claim, metric: str | None, sentence: str, pilot: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        foretell(claim, pilot, metric)


def test_a_pilot_that_shows_nothing(tmp_path: Path, cells: ModuleType) -> None:
    with pytest.raises(UserError, match="no finished cells with a metric in common"):
        foretell(Claim(2, 8, 0.03, 0.8), tmp_path)
    cells.write_cell(tmp_path, "mask=bidir", "seed=0", result=cells.result(0.5))
    cells.write_cell(tmp_path, "mask=causal", "seed=0", result=cells.result(0.5))
    with pytest.raises(UserError, match="no composition with two seeds"):
        foretell(Claim(2, 8, 0.03, 0.8), tmp_path)
