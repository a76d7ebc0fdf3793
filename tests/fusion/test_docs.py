"""The fusion that ``docs/fusion.md`` shows in full is one that works."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from tests import tiny
from tests.tiny import ONE_TURN, SAMPLES, TEXT_ONLY, TWO_IMAGES, collator

from vlmlab.contracts.parts import Fusion
from vlmlab.fusion.none import NoFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.memory.before import ImagesBefore
from vlmlab.model.vlm import VLM

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "fusion.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The page's one block in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's file, under the name its YAML gives."""
    name = yaml.safe_load(block("yaml"))["_target_"].rpartition(".")[0]
    path = tmp_path_factory.mktemp("docs") / "mean_shift.py"
    path.write_text(block("python"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def built(shown: ModuleType) -> VLM:
    keys = {k: v for k, v in yaml.safe_load(block("yaml")).items() if k not in ("defaults", "_target_")}
    torch.manual_seed(0)
    fusion = shown.MeanShift(ImagesBefore(), **keys)
    assert isinstance(fusion, Fusion)
    return tiny.vlm(fusion=fusion)


@torch.no_grad()
def test_it_starts_as_it_says_and_then_sees(shown: ModuleType) -> None:
    model = built(shown)
    batch = collator(model)(SAMPLES)
    plain = VLM(None, None, NoFusion(), HfLanguageModel(str(tiny.qwen2())), model.mask).eval()
    assert torch.equal(model(batch).logits, plain(collator(plain)(SAMPLES)).logits)
    tiny.spread(model.fusion, seed=2)
    packed = collator(model, pack_length=1000)([TWO_IMAGES, ONE_TURN, TEXT_ONLY])
    before, pixels = model(packed).logits, packed.pixels.clone()
    pixels[2] = 0
    after = model(type(packed)(**{**vars(packed), "pixels": pixels})).logits
    changed = (before != after).any(-1)
    told = packed.layout.segment[:, 1:][packed.labels[:, 1:] != -100]
    assert changed[told == 1].all() and not changed[told != 1].any()
    assert len(model.generate(collator(model).ask([ONE_TURN, TEXT_ONLY]), 3)) == 2


def test_it_learns(shown: ModuleType) -> None:
    model = built(shown)
    batch = collator(model)(SAMPLES)
    for step in (0, 1):
        model.zero_grad()
        outputs = model(batch)
        torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
        still = {n for n, p in model.fusion.named_parameters() if p.grad is None or not p.grad.any()}
        assert still == (
            {n for n, _ in model.fusion.named_parameters() if model.fusion.waits(n)} if step == 0 else set()
        )
        with torch.no_grad():
            for parameter in model.fusion.parameters():
                parameter -= 0.1 * parameter.grad
