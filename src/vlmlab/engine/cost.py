"""What a run costs: parameters, visual tokens, floating-point operations of one sample, memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from vlmlab.contracts.tensors import Batch

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products per query head; keys and values may have fewer heads, which not every torch's formula allows."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Five products: the scores again, and the gradients of scores, values, queries and keys."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _convolution_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    """Each gradient costs what the convolution did; torch's formula takes grouped ones as if every channel met all."""
    transposed, mask = rest[4], rest[7]
    return 2 * x[0] * prod((x if transposed else grad)[2:]) * prod(weight) * sum(mask[:2])


OWN: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}
"""What torch's table lacks or has otherwise, by the shapes of arguments: the CPU's fused attention, grouped kernels."""

FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{operator: shape_wrapper(formula) for operator, formula in OWN.items()},
}
"""Floating-point operations of every operator that has any, by its arguments and ``out_val``."""


def sample_cost(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Operations of one sample's forward pass (2 per multiply-add), and visual tokens of an image in the sequence.

    Args:
        model: on the batch's device; its mode is restored.
        batch: a micro-batch of one sample.
    """
    with answering(model), torch.no_grad(), counted() as counter:
        model(batch)
    return {"flops_sample": int(counter.get_total_flops()), "visual_tokens": _visual_tokens(batch)}


def counted() -> FlopCounterMode:
    """Counts the operations of everything that runs inside."""
    return FlopCounterMode(display=False, custom_mapping=OWN)


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """The model in the mode for answers while this is open; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _visual_tokens(batch: Batch) -> int:
    """Positions that an image takes in the sequence, on average; none where vision acts elsewhere."""
    images = len(batch.images)
    return round(int(batch.layout.visual.sum()) / images) if images else 0


def peak_bytes() -> int:
    """Most memory this process has held: on its GPU where it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cached(facts: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{"cache": the sum of all counts of the feature cache}, or nothing where it was never used."""
    counts = [found["cache"] for found in facts if "cache" in found]
    names = dict.fromkeys(name for count in counts for name in count)
    return {"cache": {name: sum(count.get(name, 0) for count in counts) for name in names}} if counts else {}
