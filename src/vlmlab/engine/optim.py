"""The optimizers of a stage: AdamW, or Muon on the hidden matrices with AdamW on all the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from vlmlab.engine.shards import assembled, cut_like, is_shard, own

Group = dict[str, Any]


def hidden_matrices(model: nn.Module) -> set[int]:
    """Identities of the two-dimensional weights inside stacks of layers; embeddings, heads and vectors are none."""
    found: set[int] = set()
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            tables = {id(m.weight) for m in stack.modules() if isinstance(m, nn.Embedding)}
            found |= {id(p) for p in stack.parameters() if p.ndim == 2} - tables
    return found


class CpuMuon(Muon):
    """torch's Muon with its Newton-Schulz steps in float32: torch takes them in bfloat16, which most CPUs emulate.

    There they cost up to twenty times as much, more than the rest of a small model's step (``benchmarks/README.md``).
    Groups, state and rates are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step, after the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: Group) -> None:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        rate = float(group["lr"])
        parameter.mul_(1 - rate * group["weight_decay"])
        rms = 0.2 * math.sqrt(max(parameter.shape))  # arXiv 2502.16982, section 2.2
        parameter.add_(orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"]), alpha=-rate * rms)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(M, N) -> (M, N): singular values near 1, by the quintic Newton-Schulz iteration of Muon (Jordan 2024)."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _muon(groups: list[Group], **settings: Any) -> Muon:
    """The Muon for the device that the groups' parameters are on."""
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    return (CpuMuon if on_cpu else Muon)(groups, **settings)


class MuonAdamW(Optimizer):
    """torch's Muon for the groups with ``muon: True`` and torch's AdamW for the others, after one optimizer.

    Muon (Jordan 2024) orthogonalises the momentum of a hidden matrix by five Newton-Schulz steps; its rate is scaled
    to AdamW's RMS (arXiv 2502.16982, section 2.2), so that one learning rate serves both.

    Args:
        groups: parameter groups, each with the key ``muon``.
        betas: AdamW's.
        momentum: Muon's, with Nesterov.
    """

    def __init__(self, groups: Iterable[Group], betas: tuple[float, float], momentum: float = 0.95) -> None:
        groups = list(groups)
        hidden, rest = ([g for g in groups if g["muon"] is muon] for muon in (True, False))
        self._inner: dict[bool, Optimizer] = {}
        if hidden:
            self._inner[True] = _muon(hidden, lr=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        if rest:  # an adapter may be matrices only
            self._inner[False] = AdamW(rest, lr=0.0, betas=betas)
        super().__init__([group for inner in self._inner.values() for group in inner.param_groups], {})
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()  # loading replaces the groups and the state

    def _link(self) -> None:
        """Both act on this optimizer's own groups and state."""
        for muon, inner in self._inner.items():
            inner.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both, after the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon, inner in self._inner.items():
            if muon and any(is_shard(p) for group in inner.param_groups for p in group["params"]):
                _whole_matrices(inner)
            else:
                inner.step()
        return loss


def _whole_matrices(muon: Optimizer) -> None:
    """Muon's step where ranks have shards: matrices whole on all ranks, one after the other; each keeps its rows."""
    for group in muon.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            alone = nn.Parameter(assembled(parameter))
            alone.grad = assembled(parameter.grad)
            once = _muon([{**group, "params": [alone]}])
            once.state[alone] = {key: assembled(value) for key, value in muon.state[parameter].items()}
            once.step()
            own(parameter).copy_(own(cut_like(parameter, alone)))
            muon.state[parameter] = {key: cut_like(parameter, value) for key, value in once.state[alone].items()}
