"""JSON that every reader takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.runs.files import read_rows, to_json, write_json
from vlmlab.runs.folder import RunFolder

NAN, INF = float("nan"), float("inf")


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({"loss": NAN}, {"loss": "nan"}),
        ([INF, -INF, 1.5, None, True], ["inf", "-inf", 1.5, None, True]),
        ({"a": {"b": (1, NAN)}, "path": Path("x")}, {"a": {"b": [1, "nan"]}, "path": "x"}),
        (1e308, 1e308),
    ],
)
def test_numbers_that_are_none_become_words(tmp_path: Path, value: Any, read: Any) -> None:
    assert strict(to_json(value)) == read
    write_json(tmp_path / "x.json", value)
    assert strict((tmp_path / "x.json").read_text()) == read


def test_a_row_of_metrics_with_no_number_is_kept_and_cut_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"stage": "a", "step": 1, "loss": NAN, "gradient_norm": INF})
    run.log({"stage": "a", "step": 2, "loss": 1.0})
    run.cut_back("a", 1)
    assert [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"stage": "a", "step": 1, "loss": "nan", "gradient_norm": "inf"}
    ]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("metrics", "cost", "name"), [({"b/score": NAN}, {}, "b/score"), ({}, {"seconds": INF}, "seconds")]
)
def test_no_result_has_a_number_that_is_none(
    tmp_path: Path, metrics: dict[str, float], cost: dict[str, float], name: str
) -> None:
    with RunFolder(tmp_path) as run:
        run.open({"seed": 0})
        with pytest.raises(UserError, match=f"^{name} is (nan|inf) and no result"):
            run.finish(metrics, cost)
    assert not (tmp_path / "result.json").exists() and RunFolder(tmp_path).state()["state"] != "done"
