"""How a mask policy reaches transformers' attention.

In training the policy travels as a 4-D tensor, or as nothing where it is plain causal attention. Inside
``generate()`` transformers builds the masks itself, step by step; there the registered implementation below asks the
policy for the rows of the new queries. This registration is transformers' own extension point; a context variable
carries the policy, and only inside ``generate()``.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vlmlab.contracts.parts import Mask
from vlmlab.contracts.tensors import Layout
from vlmlab.lm.inside import attend

IMPLEMENTATION = "vlmlab_sdpa"

_generating: contextvars.ContextVar[tuple[Mask, Layout] | None] = contextvars.ContextVar("generating", default=None)


@contextmanager
def generating(mask: Mask, layout: Layout) -> Iterator[None]:
    """While this is open, every attention mask that transformers builds follows the policy on this layout."""
    token = _generating.set((mask, layout))
    try:
        yield
    finally:
        _generating.reset(token)


def _policy_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0, **kwargs: Any
) -> Tensor | None:
    """(B, 1, Q, KV) bool. Generated tokens are answer text of the last packed sample; beams repeat their row.

    transformers gives the window of a sliding layer as ``local_size``.
    """
    state = _generating.get()
    if state is None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            **kwargs,
        )
    mask, layout = state
    device = layout.kind.device
    repeats = batch_size // layout.kind.shape[0]
    if repeats > 1:
        layout = layout.select(torch.arange(layout.kind.shape[0], device=device).repeat_interleave(repeats))
    layout = layout.extended(kv_length + kv_offset)
    q = torch.arange(q_length, device=device) + q_offset
    allowed = within(mask(layout, q), layout, q, kwargs.get("local_size"))
    return allowed[:, None, :, kv_offset : kv_offset + kv_length]


def within(allowed: Tensor, layout: Layout, q: Tensor, window: int | None) -> Tensor:
    """(B, Q, S) restricted to keys less than `window` positions before their query; None: no window.

    Positions are counted as the layout does: the branches of a tree do not move each other away from what they share.
    """
    if window is None:
        return allowed
    return allowed & (layout.position[:, q, None] - layout.position[:, None, :] < window)


def plainly_causal(allowed: Tensor, layout: Layout, q: Tensor) -> bool:
    """Whether every real token sees exactly the positions up to its own, from the row's first one.

    So it is under ``causal``, and under any policy that comes to it (``bidir`` without an image), where a row holds one
    sample with padding after it or none. It is found by looking at what is allowed, so a policy need not declare it.

    Args:
        allowed: the policy (B, S, S) on all positions.
        layout: what they are.
        q: the positions (S,), from 0.
    """
    if bool((layout.valid & (layout.position != q)).any()):  # packed, or padded on the left
        return False
    return not bool((layout.valid[..., None] & (allowed != (q[:, None] >= q))).any())


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, _policy_mask)
