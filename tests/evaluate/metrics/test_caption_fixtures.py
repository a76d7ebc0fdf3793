"""Caption scores against the reference implementation (values in caption_metric_fixtures/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from vlmlab.evaluate.metrics.bleu import bleu
from vlmlab.evaluate.metrics.cider import cider_d
from vlmlab.evaluate.metrics.ptb import PUNCTUATION, tokenize
from vlmlab.evaluate.metrics.rouge import rouge_l


def _load(shared_data: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shared_data / "caption_metric_fixtures" / name).read_text(encoding="utf-8"))
    return loaded


def _tokens(items: list[dict[str, Any]]) -> tuple[list[list[str]], list[list[list[str]]]]:
    candidates = [item["hypothesis"].split() for item in items]
    return candidates, [[text.split() for text in item["references"]] for item in items]


def test_coco_example(shared_data: Path) -> None:
    example = _load(shared_data, "coco_fakecap_500.json")
    items, expected = example["items"], example["expected_corpus"]
    candidates, references = _tokens(items)
    cider = cider_d(candidates, references)
    rouge = [rouge_l(candidate, image) for candidate, image in zip(candidates, references, strict=True)]
    assert cider == pytest.approx([item["expected"]["CIDEr"] for item in items], abs=1e-12)
    assert rouge == pytest.approx([item["expected"]["ROUGE_L"] for item in items], abs=1e-12)
    assert fmean(cider) == pytest.approx(expected["CIDEr"], abs=1e-12)
    for n in (1, 2, 3, 4):
        assert bleu(candidates, references, n) == pytest.approx(expected[f"Bleu_{n}"], abs=1e-6)


def test_tokenizer_on_the_raw_captions(shared_data: Path) -> None:
    items = _load(shared_data, "coco_fakecap_500.json")["items"]
    assert [tokenize(item["hypothesis_raw"]) for item in items] == [item["hypothesis"].split() for item in items]


@pytest.mark.parametrize(
    ("part", "key"), [("with_punctuation_removed", "ptb_nopunct"), ("with_punctuation_kept", "ptb")]
)
def test_tokenizer_against_stanford(shared_data: Path, part: str, key: str) -> None:
    pairs = _load(shared_data, "ptb_tokenizer_pairs.json")[part]["pairs"]
    dropped = PUNCTUATION | {"??"}
    expected = [[word for word in pair[key].split() if word not in dropped] for pair in pairs]
    assert [tokenize(pair["raw"]) for pair in pairs] == expected


def test_nlg_eval_cases(shared_data: Path) -> None:
    for case in _load(shared_data, "nlg_eval_published.json")["cases"]:
        candidates, references = _tokens(case["items"])
        expected, tolerance = case["expected"], case["tolerance"]
        assert fmean(map(rouge_l, candidates, references)) == pytest.approx(expected["ROUGE_L"], abs=tolerance)
        assert bleu(candidates, references, 1) == pytest.approx(expected["Bleu_1"], abs=tolerance)
        if len(candidates) > 1:
            assert fmean(cider_d(candidates, references)) == pytest.approx(expected["CIDEr"], abs=tolerance)
            assert bleu(candidates, references) == pytest.approx(expected["Bleu_4"], abs=tolerance)


def test_aac_metrics_readme(shared_data: Path) -> None:
    example = _load(shared_data, "aac_metrics_readme_published.json")
    candidates = [tokenize(item["hypothesis"]) for item in example["items"]]
    references = [[tokenize(text) for text in item["references"]] for item in example["items"]]
    assert cider_d(candidates, references) == pytest.approx(example["expected"]["cider_d_items"], abs=5e-5)
