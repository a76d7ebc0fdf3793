"""The shipped text tower's recipe in small: what it learns from, what trains, what it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file
from tests.tiny import CONF, worst

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample
from vlmlab.encoder.embedded import EmbeddedEncoder
from vlmlab.encoder.text import open_text_tower
from vlmlab.engine.pair import PairModule
from vlmlab.model.pair import PairedTowers
from vlmlab.objective.siglip import Siglip
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.towers.source import embedded, tower_hash
from vlmlab.towers.text_export import ExportTextTower, retrieval


@pytest.fixture(scope="module")
def cfg() -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["recipe=embedded_text_tower", "text_tower.num_hidden_layers=1"])


def model_of(cfg: DictConfig) -> PairedTowers:
    torch.manual_seed(0)
    model = PairModule.build(cfg)
    assert isinstance(model, PairedTowers)
    return model


def samples(cfg: DictConfig, count: int) -> list[Sample]:
    source = instantiate(cfg.data.train.statements)
    return [source[index] for index in range(count)]


def test_a_batch_has_one_image_and_one_text_a_row(cfg: DictConfig) -> None:
    model, some = model_of(cfg), samples(cfg, 6)
    batch = PairModule.collator(cfg, model, "plain")(some)
    assert batch.pixels.shape == (6, 3, 64, 64) and batch.pixels.dtype == torch.uint8
    assert batch.text_ids is not None and batch.text_ids.shape == batch.input_ids.shape == (6, model.lm.context)
    assert torch.equal(batch.layout.valid, batch.text_ids >= 0) and not batch.layout.visual.any()
    assert batch.supervised == 0 and len(batch.images) == 6 and batch.images.row.tolist() == list(range(6))
    for row, sample in zip(batch.text_ids, some, strict=True):
        read = model.lm.tokenizer.decode(row[row >= 0])
        assert read and sample.turns[0].answer.startswith(read)
    two = replace(some[0], images=some[0].images * 2)
    with pytest.raises(UserError, match=f"one text for each image, unlike {two.id}"):
        PairModule.collator(cfg, model, "plain")([two])


def test_the_loss_teaches_all_of_the_text_tower_and_nothing_of_the_vision_tower(cfg: DictConfig) -> None:
    model = model_of(cfg)
    model.encoder.requires_grad_(False)
    batch = PairModule.collator(cfg, model, "plain")(samples(cfg, 8))
    outputs = model(batch)
    assert outputs.pairing is not None
    assert worst(outputs.pairing.image.norm(dim=1), torch.ones(8)) < 1e-5
    assert worst(outputs.pairing.text.norm(dim=1), torch.ones(8)) < 1e-5
    total, count = Siglip()(outputs, batch)["siglip"]
    assert int(count) == 8
    total.backward()
    parts = model.parts()
    assert all(p.grad is not None and p.grad.any() for _, p in (*parts["lm"], *parts["pair"]))
    assert set(parts) == {"encoder", "lm", "pair"} and not any(p.grad is not None for _, p in parts["encoder"])
    assert model.sourced() == {"encoder": tower_hash(embedded("vision"))}


def test_what_it_leaves_is_a_text_tower(cfg: DictConfig, tmp_path: Path) -> None:
    model = model_of(cfg).eval()
    pairs = [instantiate(cfg.recipe.finish.pairs.caption)[index] for index in range(40)]
    costs: dict[str, Any] = {"seconds": 12.3}
    scores = ExportTextTower("text", {"caption": pairs})({"text": model}, cfg, tmp_path, costs, {})
    assert set(scores) == {"text_tower/caption/at_1", "text_tower/caption/above"}
    home = tmp_path / "towers" / "text"
    card = (tmp_path / "towers" / "README.md").read_text()
    assert tower_hash(home) in card and tower_hash(embedded("vision")) in card and "text_tower/caption/at_1" in card
    tower = open_text_tower(str(home), "float32", layer=None)
    ids = tower.tokenise([pair.turns[0].answer for pair in pairs])
    filled = torch.where(ids < 0, model.lm.pad, ids)
    want = model.lm.model(input_ids=filled).last_hidden_state
    assert torch.equal(ids, model.lm.tokenise([pair.turns[0].answer for pair in pairs]))
    assert worst(tower(ids), want) <= 1e-6
    assert {tensor.dtype for tensor in load_file(home / "model.safetensors").values()} == {torch.float16}
    assert retrieval(EmbeddedEncoder(pooled=True), home, pairs) == {
        key.rsplit("/")[-1]: value for key, value in scores.items()
    }


@pytest.mark.parametrize(("turned", "at_1"), [(0, 1.0), (1, 0.0)])
def test_retrieval_counts_right_ones(
    turned: int, at_1: float, cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that have the very embedding of their own image, or of another one's."""
    home = tmp_path / "text"
    model = model_of(cfg)
    model.lm.model.save_pretrained(home)
    model.lm.tokenizer.save_pretrained(home)
    pairs = [instantiate(cfg.recipe.finish.pairs.caption)[index] for index in range(10)]
    encoder = EmbeddedEncoder(pooled=True)
    pixels = torch.stack([torch.from_numpy(encoder.preprocess(pair.images[0])) for pair in pairs])
    with torch.no_grad():
        pooled = encoder(pixels).pooled
    assert pooled is not None
    monkeypatch.setattr("vlmlab.towers.text_export.pooled_texts", lambda *_: pooled.roll(turned, 0))
    found = retrieval(encoder, home, pairs)
    assert found["at_1"] == at_1 and (found["above"] == 1.0) == (at_1 == 1.0)
