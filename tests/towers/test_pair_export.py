"""The test-bed's vision tower and its text tower: what they learn from, what trains, what they leave."""

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
from vlmlab.data.world.sources import WorldContrasts
from vlmlab.encoder.text import open_text_tower
from vlmlab.encoder.tower import TowerEncoder, open_tower
from vlmlab.engine.pair import PairModule
from vlmlab.model.pair import PairedTowers
from vlmlab.objective.siglip import Siglip
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.towers.pair_export import ExportPair, contrast_accuracy
from vlmlab.towers.source import tower_hash

SMALL = ["text_tower.num_hidden_layers=1", "text_tower.tokenizer_samples=50", "encoder.num_hidden_layers=1"]


@pytest.fixture(scope="module")
def cfg() -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["recipe=embedded_siglip", *SMALL])


@pytest.fixture(scope="module")
def model(cfg: DictConfig) -> PairedTowers:
    torch.manual_seed(0)
    built = PairModule.build(cfg)
    assert isinstance(built, PairedTowers)
    return built


def test_every_image_of_a_sample_is_a_row_with_its_own_caption(cfg: DictConfig, model: PairedTowers) -> None:
    source = instantiate(cfg.data.train.contrasts)
    some = [source[0], source[1]]
    batch = PairModule.collator(cfg, model, "plain")(some)
    assert batch.pixels.shape == (8, 3, 72, 72) and len(batch.images) == 8 and batch.text_ids is not None
    captions = [turn.answer for sample in some for turn in sample.turns]
    for row, caption in zip(batch.text_ids, captions, strict=True):
        assert model.lm.tokenizer.decode(row[row >= 0]) == caption  # none is cut off
    assert list(batch.images.ids) == [name for sample in some for name in sample.image_ids]
    with pytest.raises(UserError, match=f"one text for each image, unlike {some[0].id}"):
        PairModule.collator(cfg, model, "plain")([replace(some[0], turns=some[0].turns[:3])])


def test_no_caption_is_longer_than_the_text_tower_reads(cfg: DictConfig, model: PairedTowers) -> None:
    source = instantiate(cfg.data.train.contrasts)
    captions = [turn.answer for index in range(150) for turn in source[index].turns]
    longest = max(len(ids) for ids in model.lm.tokenizer(captions)["input_ids"])
    assert longest <= model.lm.context


def test_both_towers_learn(cfg: DictConfig, model: PairedTowers) -> None:
    batch = PairModule.collator(cfg, model, "plain")([WorldContrasts("train", 2)[0]])
    total, _ = Siglip()(model(batch), batch)["siglip"]
    total.backward()
    for part in ("encoder", "lm", "pair"):
        assert all(p.grad is not None and p.grad.any() for _, p in model.parts()[part]), part
    assert model.sourced() == {}


def test_what_it_leaves_is_a_pair(cfg: DictConfig, model: PairedTowers, tmp_path: Path) -> None:
    short = [instantiate(cfg.recipe.finish.pairs.short)[index] for index in range(20)]
    export = ExportPair("contrast", {"short": short}, WorldContrasts("val", 5))  # type: ignore[dict-item]
    costs: dict[str, Any] = {"seconds": 12.3}
    scores = export({"contrast": model.eval()}, cfg, tmp_path, costs, {})
    assert set(scores) == {"towers/short/at_1", "towers/short/above", "towers/contrast"}
    vision, text = tmp_path / "towers" / "vision", tmp_path / "towers" / "text"
    card = (tmp_path / "towers" / "README.md").read_text()
    assert tower_hash(vision) in card and tower_hash(text) in card and "towers/contrast" in card
    tower, preprocess, _ = open_tower(str(vision), "float32")
    assert (preprocess.height, preprocess.width) == (72, 72)
    pixels = torch.from_numpy(preprocess(short[0].images[0]))[None]
    with torch.no_grad():
        again = TowerEncoder(tower, preprocess, pooled=True)(pixels).pooled
        assert again is not None and worst(again, model.encoder(pixels).pooled) <= 1e-5
    read = open_text_tower(str(text), "float32", layer=None)
    assert torch.equal(read.tokenise(["a red circle"]), model.lm.tokenise(["a red circle"]))
    for folder in (vision, text):
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(("turned", "share"), [(0, 1.0), (1, 0.0)])
def test_telling_apart_counts_right_ones(
    turned: int, share: float, cfg: DictConfig, model: PairedTowers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that have the very embedding of their own image, or of the next one of their sample."""
    model.lm.model.save_pretrained(tmp_path)
    model.lm.tokenizer.save_pretrained(tmp_path)
    contrasts = WorldContrasts("val", 3)
    encoder = model.encoder.eval()
    turn = iter(range(len(contrasts)))

    def pooled(*_: object) -> torch.Tensor:
        sample = contrasts[next(turn)]
        found = encoder(torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in sample.images])).pooled
        assert found is not None
        return torch.nn.functional.normalize(found, dim=-1).roll(turned, 0)

    monkeypatch.setattr("vlmlab.towers.pair_export.pooled_texts", pooled)
    assert contrast_accuracy(encoder, tmp_path, contrasts) == share
