"""Where towers come from, and the hash of their weights."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.tiny import qwen2, siglip
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.towers import resolve, tower_hash


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
    for wrong in ("no/such/tower", "not an id at all", str(tmp_path / "gone")):
        with pytest.raises(UserError, match=r"lm\.path=.*neither"):
            resolve(wrong, "lm.path")
