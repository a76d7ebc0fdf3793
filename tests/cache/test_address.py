"""The address of features changes with everything they depend on but the image, and with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.cache import address as module
from vlmlab.cache.address import address, describe, image_key, probe
from vlmlab.contracts.parts import Encoder
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.multi import MultiEncoder


def siglip(**settings: Any) -> Encoder:
    return HfEncoder(str(tiny.siglip()), **settings).eval().requires_grad_(False)


@torch.no_grad()
def of(encoder: Encoder, stored: Any = "as computed", answer: Any = None) -> str:
    noise = probe(torch.empty(1, 3, encoder.preprocess.height, encoder.preprocess.width))
    return address(describe(encoder, noise, answer or encoder(noise), stored))


def with_weight(name: str, change: float) -> Encoder:
    encoder = siglip()
    tensor = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    tensor[name].data.view(-1)[0] += change
    return encoder


def with_setting(name: str, value: Any) -> Encoder:
    encoder = siglip()
    setattr(encoder, name, value)
    return encoder


def with_adapter(alpha: int, scale: float = 1.0) -> Encoder:
    """An adapter that has learnt something."""
    encoder = siglip()
    torch.manual_seed(0)
    encoder.tower = LoraAdapter(parts=["encoder"], r=2, alpha=alpha).wrap(encoder.tower)
    for name, parameter in encoder.tower.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return encoder.eval().requires_grad_(False)


def moved(folder: Path) -> Encoder:
    shutil.copytree(tiny.siglip(), folder)
    return HfEncoder(str(folder)).eval().requires_grad_(False)


OTHERS: dict[str, Callable[[], Encoder]] = {
    "weight": lambda: with_weight("tower.encoder.layers.1.mlp.fc1.weight", 1e-4),
    "buffer": lambda: with_weight("mean", 1e-3),
    "layers": lambda: siglip(layers=[-2]),
    "another layer": lambda: siglip(layers=[-1]),
    "pooled": lambda: siglip(pooled=True),
    "half": lambda: siglip(dtype="bfloat16"),
    "size": lambda: siglip(image_size=96),
    "preprocessing": lambda: siglip(square=True),
    "resampling": lambda: with_setting("preprocess", replace(siglip().preprocess, resample=2)),
    "a setting that noise does not show": lambda: with_setting("threshold", 0.5),
    "adapter": lambda: with_adapter(2),
    "scale of an adapter": lambda: with_adapter(4),
    "another adapter": lambda: with_adapter(4, scale=0.5),
    "multi": lambda: MultiEncoder([siglip()]).eval(),
    "combine": lambda: MultiEncoder([siglip()], combine="average").eval(),
    "clip": lambda: HfEncoder(str(tiny.clip())).eval(),
}


def test_every_encoder_has_an_address_of_its_own() -> None:
    found = {"as it is": of(siglip())} | {name: of(make()) for name, make in OTHERS.items()}
    assert len(set(found.values())) == len(OTHERS) + 1, found


def test_the_same_encoder_has_the_same_address_wherever_it_was_loaded_from(tmp_path: Path) -> None:
    assert of(siglip()) == of(siglip()) == of(moved(tmp_path / "elsewhere"))
    assert of(siglip(layers=[1, -1])) == of(siglip(layers=[1, 3]))


def test_form_answer_precision_and_versions_are_in_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = siglip()
    answer = encoder(probe(torch.empty(1, 3, tiny.SIZE, tiny.SIZE)))
    plain = of(encoder, answer=answer)
    found = [plain, of(encoder, stored="rounded", answer=answer)]
    rounded = replace(answer, grids=[grid + 1e-7 for grid in answer.grids])  # another machine's last bits
    found.append(of(encoder, answer=rounded))
    contexts: list[AbstractContextManager[Any]] = [torch.autocast("cpu", torch.bfloat16), nullcontext()]
    for context in contexts:
        with context:
            found.append(of(encoder, answer=answer))
    assert found.pop() == plain
    monkeypatch.setattr(module.metadata, "version", lambda name: "0")
    found.append(of(encoder, answer=answer))
    monkeypatch.undo()
    monkeypatch.setattr(module, "FORMAT", 0)
    found.append(of(encoder, answer=answer))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "0")
    found.append(of(encoder, answer=answer))
    assert len(set(found)) == len(found)


def test_code_of_a_class_is_in_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def code(text: str) -> dict[str, str]:
        (tmp_path / "own_encoder.py").write_text(f"import torch\nclass Own(torch.nn.Module):\n    {text}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(module.inspect.sys.modules, "own_encoder", raising=False)
        import own_encoder

        return dict(module.code_of([own_encoder.Own]))

    assert code("x = 1") != code("x = 2")
    assert code("x = 1") == code("x = 1")


def test_keys_of_images() -> None:
    """Every pixel counts, and nothing but the pixels."""
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    keys = {image_key(image)}
    for place in range(image.numel()):
        other = image.clone()
        other.view(-1)[place] = 1
        keys.add(image_key(other))
    assert len(keys) == 49
    batch = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8).permute(2, 0, 1)
    assert image_key(batch) == image_key(batch.contiguous()) and len(image_key(batch)) == 32
