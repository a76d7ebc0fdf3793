"""``balance``: experts get equal shares of the tokens (MoE-LLaVA, arXiv 2401.15947, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import NotNegative


class ExpertBalance:
    """The sum over layers of E sum_i F_i P_i, an extra term beside the LM's loss.

    F_i is the share of tokens whose likeliest expert is i, without gradient, P_i the router's mean probability of i;
    padding counts nowhere. It is 1 a layer where all shares are equal. F and P are of a micro-batch, as in the library
    beneath the released code; micro-batches count by their tokens.

    Args:
        weight: factor of this objective in the total loss; the paper's is 0.01.
    """

    per_micro_batch = False
    reads_experts = True

    def __init__(self, weight: NotNegative = 0.01) -> None:
        self.weight = weight

    def counts(self, batch: Batch) -> dict[str, int]:
        """{"balance": tokens}."""
        return {"balance": int(batch.layout.valid.sum())}

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Any]]:
        """{"balance": (sum over tokens, tokens)}.

        Raises:
            UserError: the composition has no experts.
        """
        routed = [memory.notes["router"] for memory in outputs.memories.values() if "router" in memory.notes]
        if not routed:
            raise UserError(
                "objective=balance reads the router of a fusion's experts and this one has none; use fusion=moe, or "
                "leave the objective out."
            )
        valid = batch.layout.valid
        number = valid.sum()
        total = sum(_unbalanced(p, valid) for p in routed) * number
        return {"balance": (torch.as_tensor(total), number)}


def _unbalanced(p: Tensor, valid: Tensor) -> Tensor:
    """E sum_i F_i P_i of the real tokens among (B, S, E)."""
    experts, number = p.shape[-1], valid.sum().clamp(min=1)
    share = (F.one_hot(p.argmax(-1), experts) * valid[..., None]).sum((0, 1)) / number  # (E,)
    mean = (p * valid[..., None]).sum((0, 1)) / number  # (E,)
    return experts * (share * mean).sum()
