"""Where towers come from, and the hash of their weights."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tests.tiny import CONF, qwen2, siglip

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.encoder.hf import HfEncoder
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.towers.source import embedded, resolve, tower_hash


def test_the_hash_is_of_the_weights(tmp_path: Path) -> None:
    want = hashlib.sha256((siglip() / "model.safetensors").read_bytes()).hexdigest()
    assert tower_hash(siglip()) == want == HfEncoder(str(siglip())).source
    assert HfLanguageModel(str(qwen2())).source == tower_hash(qwen2()) != want
    copy = tmp_path / "copy"
    shutil.copytree(siglip(), copy)
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(raw))
    assert tower_hash(copy) != want


def test_resolve(tmp_path: Path) -> None:
    assert resolve(str(siglip()), "encoder.path") == siglip()
    with pytest.raises(UserError, match=r"encoder\.path=.*config\.json"):
        resolve(str(tmp_path), "encoder.path")
    shutil.copy(siglip() / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"encoder\.path=.* no weights in safetensors; load it once in transformers"):
        resolve(str(tmp_path), "encoder.path")
    assert resolve(str(tmp_path), "encoder.path", weights=False) == tmp_path
    for wrong in ("no/such/tower", "not an id at all", str(tmp_path / "gone")):
        with pytest.raises(UserError, match=r"lm\.path=.*neither"):
            resolve(wrong, "lm.path")


def test_the_lm_saw_no_image_and_the_vision_tower_no_question() -> None:
    """From the recipe's own data list: what each stage of ``embedded_towers`` is given."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["recipe=embedded_towers"])
    seen = {name: instantiate(cfg.data.train[stage.data]) for name, stage in cfg.recipe.stages.items()}
    assert set(seen) == {"vision", "loose", "language", "cells", "relations"}
    for index in range(60):
        for told in (seen[name][index] for name in ("language", "cells", "relations")):
            assert told.images == () and not any(IMAGE_TAG in turn.prompt for turn in told.turns)
        for shown in (seen["vision"][index], seen["loose"][index]):
            assert len(shown.images) == 1
            assert [turn.kind for turn in shown.turns] == ["cells_caption"] and "?" not in shown.turns[0].prompt


def test_the_shipped_towers_are_those_of_their_card() -> None:
    card = (embedded("lm").parent / "README.md").read_text()
    for name in ("vision", "lm", "text"):
        assert f"sha256 of {name} | `{tower_hash(embedded(name))}`" in card
    assert f"trained against | `{tower_hash(embedded('vision'))}`" in card
    card = (embedded("lm", "testbed").parent / "README.md").read_text()
    for name in ("vision", "lm", "text"):
        assert f"sha256 of {name} | `{tower_hash(embedded(name, 'testbed'))}`" in card
    size = sum(path.stat().st_size for path in embedded("lm").parent.rglob("*") if path.is_file())
    assert size <= 20_000_000


def test_the_test_bed_saw_captions_and_sentences_and_no_cells() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        pairs, text = (compose("train", [f"recipe={name}"]) for name in ("embedded_siglip", "embedded_text"))
    assert [stage.data for stage in pairs.recipe.stages.values()] == ["contrasts"]
    assert [stage.data for stage in text.recipe.stages.values()] == ["text"]
    shown, told = instantiate(pairs.data.train.contrasts), instantiate(text.data.train.text)
    for index in range(40):
        assert not any("?" in turn.answer or turn.prompt for turn in shown[index].turns)
        assert told[index].images == () and not any(IMAGE_TAG in turn.prompt for turn in told[index].turns)
    assert set(told.forms) == {"dense", "coordinates", "told", "caption"}


def test_an_unknown_pair_is_refused() -> None:
    with pytest.raises(UserError, match=r"no shipped pair 'other'.*demo, testbed"):
        embedded("lm", "other")
