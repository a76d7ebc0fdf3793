"""Where the features of an encoder lie: a name made of all that they depend on but the image.

The parts of an address:

- weights: the bits of every parameter and buffer as they are now, whatever was trained or adapted before;
- settings: the class of every module and its plain attributes (tapped layers, resizing, interpolation, scale of an
  adapter, ...), and the files these classes are written in;
- versions of torch and transformers, the pixels' shape, and the precision that is computed in;
- answer: the bits of what the encoder says of one picture of noise. It is the proof of the rest: a kernel, number of
  threads or device that rounds otherwise gives another answer, and with it another address.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.contracts.tensors import Visual
from vlmlab.digest import fingerprint

FORMAT = 1
"""Version of the files; part of the address, so that another one never reads them."""

PLACES = ("name_or_path",)
"""Attributes of transformers' models that say where they came from, which is not what they see."""


def describe(encoder: nn.Module, pixels: Tensor, answer: Visual, stored: Any) -> dict[str, Any]:
    """Everything that the features of an image depend on but the image.

    Args:
        encoder: frozen, in evaluation mode.
        pixels: (I, 3, H, W) like those it is to look at, on their device.
        answer: what it sees in the ``probe``.
        stored: the form in which features are written down, as plain values.
    """
    return {
        "format": FORMAT,
        "encoder": type(encoder).__qualname__,
        "weights": _weights(encoder),
        "settings": _digest(_settings(encoder)),
        "code": _digest(code_of([type(module) for module in encoder.modules()])),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "pixels": list(pixels.shape[1:]),
        "precision": precision(pixels.device),
        "answer": _digest([fingerprint(tensor) for tensor in tensors(answer)]),
        "stored": stored,
    }


def address(described: Mapping[str, Any]) -> str:
    """32 hexadecimal digits, equal for equal descriptions only."""
    return _digest(described)


def image_key(pixels: Tensor) -> bytes:
    """sha256 of the pixels (3, H, W) uint8 that the encoder gets, so of the image and its preprocessing."""
    return hashlib.sha256(pixels.contiguous().numpy().data).digest()


def probe(pixels: Tensor) -> Tensor:
    """(1, 3, H, W) of noise, always the same, of the size and on the device of these pixels."""
    noise = torch.randint(0, 256, pixels.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return noise[None].to(pixels.device)


def tensors(visual: Visual) -> list[Tensor]:
    """The tensors of a ``Visual``, images first, in a fixed order."""
    return [visual.hw, *visual.grids, *([] if visual.pooled is None else [visual.pooled])]


def precision(device: torch.device) -> str:
    """What a device computes in at this moment: its autocast type, or "full", and how it multiplies float32."""
    kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else "full"
    return f"{device.type} {kind} {torch.get_float32_matmul_precision()}"


def _weights(encoder: nn.Module) -> str:
    named = [*encoder.named_parameters(), *encoder.named_buffers()]
    return _digest([(name, list(t.shape), str(t.dtype), fingerprint(t)) for name, t in named])


def _settings(encoder: nn.Module) -> dict[str, Any]:
    """Module by name -> its class and public plain attributes, also those of a dataclass such as the preprocessing."""
    found: dict[str, Any] = {}
    for name, module in encoder.named_modules():
        values = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in vars(module).items()}
        own = {key: value for key, value in values.items() if not key.startswith("_") and key not in PLACES}
        plain = {key: value for key, value in own.items() if _is_plain(value)}
        found[name] = [f"{type(module).__module__}.{type(module).__qualname__}", plain]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def code_of(things: Iterable[Any]) -> dict[str, str]:
    """Class (with all it inherits from) or function -> sha256 of its file; one without a file has its name alone."""
    every = {kind for thing in things for kind in getattr(thing, "__mro__", (thing,)) if kind is not object}
    return {f"{kind.__module__}.{kind.__qualname__}": _file_hash(kind) for kind in every}


def _file_hash(kind: Any) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # typed into an interpreter, or built in
        return ""


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _as_json(value: Any) -> Any:
    """OmegaConf's containers are not dicts and lists."""
    return dict(value) if isinstance(value, Mapping) else list(value)
