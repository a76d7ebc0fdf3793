"""Where towers come from, and the hash of their weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"decoy.safetensors": b"", "pytorch_model.bin": b"a pickle"}, "has no weights in safetensors"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'}, "has .pytorch_model.bin"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "has .../x.safetensors"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, "lacks b.safetensors"),
        ({"model.safetensors.index.json": b"[]", "decoy.safetensors": b""}, "has None among its weights"),
        ({"model.safetensors": b"", "adapter_config.json": b"{}"}, "has an adapter beside its weights"),
        ({"model.safetensors": b"", "config.json": b'{"transformers_weights": "x.bin"}'}, "names its weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_safetensors_are_weights(files: dict[str, bytes], why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"lm\.path=.* {why}.*; load it once in transformers") as caught:
        resolve(str(tmp_path), "lm.path")
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("part", ["lm", "encoder"])
def test_code_beside_a_tower_is_not_run_and_nobody_is_asked(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qwen2() if part == "lm" else siglip()
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asked"))
    monkeypatch.setattr("signal.alarm", lambda seconds: pytest.fail("it waited for an answer"))
    code = f"open({str(tmp_path / 'mark')!r}, 'w')"
    for known in (True, False):
        folder = shutil.copytree(source, tmp_path / f"{part}-{known}")
        (folder / "evil.py").write_text(f"{code}\nclass Config: ...\n")
        maps = {"auto_map": {f"Auto{kind}": "evil.Config" for kind in ("Config", "Model", "ModelForCausalLM")}}
        settings = json.loads((folder / "config.json").read_text()) | maps
        if not known:
            settings["model_type"] = "nobody_knows"
        (folder / "config.json").write_text(json.dumps(settings))
        make = HfLanguageModel if part == "lm" else HfEncoder
        if known:  # transformers' own class reads it
            make(str(folder))
            continue
        with pytest.raises(UserError, match=rf"{part}\.path=.* config.json .it brings code of its own") as e:
            make(str(folder))
        assert len(str(e.value)) <= 300
        with torch.device("meta"), pytest.raises(UserError, match="brings code of its own"):
            make(str(folder))
    assert not (tmp_path / "mark").exists()


def test_damaged_weights_and_tokenizers_are_one_sentence(tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2(), tmp_path / "lm")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"lm\.path=.* has no readable weights .*; give a folder of a family"):
        HfLanguageModel(str(folder))
    shutil.copy(qwen2() / "model.safetensors", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("[")
    with pytest.raises(UserError, match=r"lm\.path=.* has no readable tokenizer"):
        HfLanguageModel(str(folder))


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
