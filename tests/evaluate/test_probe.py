"""The map that is fitted and never trained, and where its answers come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tests import tiny
from tests.evaluate.test_run import config

from vlmlab.contracts.sample import Sample
from vlmlab.evaluate import probe
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.evaluate.probe import address, fitted, probes
from vlmlab.evaluate.run import evaluate_model
from vlmlab.model.vlm import VLM


class Words:
    """A few images, each of whose patches has a word of its own."""

    forms = ("short", "long")

    def __init__(self, count: int = 6) -> None:
        self.samples = [s for s in tiny.SAMPLES if s.images][:count]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def words(self, index: int, rows: int, columns: int, form: str) -> list[str]:
        own = "abcdefghij"[(index * 3) % 10]
        return [f" {own}" + (f" {place % 7}" if form == "long" else "") for place in range(rows * columns)]


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny.vlm().eval()


def probed() -> DictConfig:
    cfg = config()
    cfg.encoder = {"_target_": "vlmlab.encoder.hf.HfEncoder", "path": str(tiny.siglip())}
    cfg.lm = {"_target_": "vlmlab.lm.hf.HfLanguageModel", "path": str(tiny.qwen2())}
    cfg.mask = {"_target_": "vlmlab.mask.causal.Causal"}
    cfg.data.probe = {"_target_": "tests.evaluate.test_probe.Words"}
    cfg.data.val = {}
    return cfg


def test_it_is_the_ridge_solution(model: VLM) -> None:
    """At the solution the gradient of squared error plus penalty is zero, weights and bias alike."""
    assert model.encoder is not None
    labels = Words()
    linear = fitted(model.encoder, model.lm, labels, "long")
    rows, columns = model.encoder.hw
    table = model.lm.model.get_input_embeddings().weight.detach()
    x, y = [], []
    for index in range(len(labels)):
        pixels = torch.from_numpy(model.encoder.preprocess(labels[index].images[0]))[None]
        with torch.no_grad():
            x.append(torch.cat(model.encoder(pixels).grids, -1)[0])
        for words in labels.words(index, rows, columns, "long"):
            ids = model.lm.tokenizer(words, add_special_tokens=False)["input_ids"]
            y.append(sum(table[i] for i in ids))
    ones = torch.cat([torch.cat(x), torch.ones(len(y), 1)], 1).double()
    theta = torch.cat([linear.layer.weight.T, linear.layer.bias[None]]).detach().double()
    error = ones @ theta - torch.stack(y).double()
    penalty = probe.RIDGE * ones.square().sum(0).mean()
    gradient = ones.T @ error + penalty * theta
    assert gradient.abs().max() < 1e-3 * (ones.T @ torch.stack(y).double()).abs().max()


def test_its_answers_stand_beside_the_others(model: VLM, tmp_path: Path) -> None:
    cfg = probed()
    cfg.evaluation.probe = True
    scores = evaluate_model(model, cfg, tmp_path, lambda _: None)
    assert 0 <= scores["toy/vqa_accuracy/probe"] <= 1
    rows = read_rows(tmp_path / "predictions" / "toy.probe.jsonl")
    assert [row.id for row in rows] == [row.id for row in read_rows(tmp_path / "predictions" / "toy.jsonl")]


def test_known_answers_are_taken_and_others_are_not_computed(
    model: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = probed()
    assert "toy/vqa_accuracy/probe" not in evaluate_model(model, cfg, tmp_path, lambda _: None)
    ids = [row.id for row in read_rows(tmp_path / "predictions" / "toy.jsonl")]
    key = address(cfg, model, cfg.data.benchmarks.toy)
    assert key is not None
    monkeypatch.setattr("vlmlab.evaluate.run.shipped", lambda: {key: dict.fromkeys(ids, "a known answer")})
    evaluate_model(model, cfg, tmp_path, lambda _: None)
    rows = read_rows(tmp_path / "predictions" / "toy.probe.jsonl")
    assert [row.id for row in rows] == ids and {row.prediction for row in rows} == {"a known answer"}


def test_the_address_is_that_of_towers_data_and_mask(model: VLM) -> None:
    cfg = probed()
    benchmark = cfg.data.benchmarks.toy
    first = address(cfg, model, benchmark)
    assert address(OmegaConf.merge(cfg, {"seed": 3}), model, benchmark) == first  # type: ignore[arg-type]
    for other in ({"mask": {"_target_": "vlmlab.mask.bidir.Bidirectional"}}, {"data": {"probe": {"count": 5}}}):
        assert address(OmegaConf.merge(cfg, other), model, benchmark) != first  # type: ignore[arg-type]
    assert address(cfg, model, OmegaConf.merge(benchmark, {"max_new_tokens": 4})) != first  # type: ignore[arg-type]


def test_data_that_cannot_be_told_has_none(model: VLM) -> None:
    cfg = probed()
    cfg.data.probe = None
    assert probes(cfg, model) == [] and address(cfg, model, cfg.data.benchmarks.toy) is None


def test_what_ships_is_of_the_worlds_benchmarks() -> None:
    for answers in probe.shipped().values():
        assert len(answers) in (300, 600, 2100) and json.dumps(answers)
