"""What every mask policy is built from: the common ground rule and the two tensors of a query-key pair."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmlab.contracts.parts import Mask
from vlmlab.contracts.tensors import Kind, Layout, Role


def pair(field: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """A field (B, S) as seen by queries, (B, Q, 1), and by keys, (B, 1, S)."""
    return field[:, q, None], field[:, None, :]


def not_later(layout: Layout, q: Tensor) -> Tensor:
    """(1, Q, S): keys that do not come after the query."""
    keys = torch.arange(layout.kind.shape[1], device=q.device)
    return keys[None, None, :] <= q[None, :, None]


def same_place(layout: Layout, q: Tensor) -> Tensor:
    """(1, Q, S): the key is the query."""
    keys = torch.arange(layout.kind.shape[1], device=q.device)
    return keys[None, None, :] == q[None, :, None]


def same_era(layout: Layout, q: Tensor) -> Tensor:
    """(B, Q, S): no answer token is between query and key (the leak rule of every opening beyond causal)."""
    q_era, k_era = pair(layout.era, q)
    return q_era == k_era


def ground(rule: Tensor, layout: Layout, q: Tensor) -> Tensor:
    """A policy's rule (B, Q, S) restricted to one's own packed sample and branch of a tree, and to real tokens.

    A padded query may see itself: a row without any key would be a softmax over nothing.
    """
    q_segment, k_segment = pair(layout.segment, q)
    q_branch, k_branch = pair(layout.branch, q)
    q_valid, k_valid = pair(layout.valid, q)
    own = (q_segment == k_segment) & ((k_branch == -1) | (q_branch == k_branch))
    return (rule & own & q_valid & k_valid) | (same_place(layout, q) & ~q_valid)


def causal_on_text(mask: Mask) -> bool:
    """Whether a policy is causal where no visual token is in the sequence; found by asking it, not by its name."""
    role = torch.tensor([[Role.SYSTEM, Role.USER, Role.USER, Role.ANSWER, Role.ANSWER, Role.USER, Role.USER]])
    none = torch.full_like(role, -1)
    layout = Layout(
        kind=torch.full_like(role, Kind.TEXT),
        image=none,
        tile=none,
        segment=torch.zeros_like(role),
        role=role,
        position=torch.arange(role.shape[1])[None],
    )
    q = torch.arange(role.shape[1])
    return torch.equal(mask(layout, q), not_later(layout, q))
