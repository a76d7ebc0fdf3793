"""Muon and AdamW behind one optimizer, against torch's own run apart; its Newton-Schulz steps are made float32 here."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import vlm
from torch import nn
from torch.optim import AdamW, Muon

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.engine.optim import MuonAdamW, hidden_matrices, orthogonal
from vlmlab.engine.stage import StageModule
from vlmlab.recipe.stage import Stage

BETAS = (0.9, 0.95)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own Muon, without its cast to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4, 6), (5,), (7, 3))]


def groups(p: list[nn.Parameter], split: int = 2) -> list[dict]:
    kinds = [{"params": p[:split], "muon": True, "weight_decay": 0.1, "part": "lm"}] if split else []
    return [*kinds, {"params": p[split:], "muon": False, "weight_decay": 0.01, "part": "lm"}]


def steps(optimizers: list[torch.optim.Optimizer], p: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in p:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (number + 1)
            optimizer.step()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("split", [0, 2])
def test_it_is_torchs_two_run_apart(split: int) -> None:
    ours, theirs = parameters(), parameters()
    steps([MuonAdamW(groups(ours, split), BETAS)], ours, range(4))
    apart: list[torch.optim.Optimizer] = [AdamW(theirs[split:], betas=BETAS, weight_decay=0.01)]
    if split:
        apart.append(Muon(theirs[:2], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    steps(apart, theirs, range(4))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("exact")
def test_matrices_alone_need_no_adamw() -> None:
    ours, theirs = parameters()[:2], parameters()[:2]
    steps([MuonAdamW(groups(ours)[:1], BETAS)], ours, range(2))
    steps([Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")], theirs, range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_on_a_cpu_it_is_torchs_up_to_bfloat16() -> None:
    ours, theirs = parameters()[:2], parameters()[:2]
    steps([MuonAdamW(groups(ours)[:1], BETAS)], ours, range(1))
    steps([Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")], theirs, range(1))
    for a, b in zip(ours, theirs, strict=True):
        assert 0 < (a - b).abs().max() < 2**-7 * 0.01 * 0.2 * 6**0.5 * 1.5  # of the step's largest entry


def test_singular_values_come_near_one() -> None:
    """As far as five of Muon's steps bring them (Jordan 2024: 0.7 to 1.2)."""
    tall = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(tall, (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert values.min() > 0.6 and values.max() < 1.3


def test_it_goes_on_bit_for_bit_from_its_state() -> None:
    whole = parameters()
    steps([MuonAdamW(groups(whole), BETAS)], whole, range(5))
    first = parameters()
    before = MuonAdamW(groups(first), BETAS)
    steps([before], first, range(3))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    after = MuonAdamW(groups(second), BETAS)
    after.load_state_dict(before.state_dict())
    assert [g["part"] for g in after.param_groups] == ["lm", "lm"]
    steps([after], second, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, whole, strict=True))


def test_the_closure_runs_once_with_gradients() -> None:
    ours, calls = parameters(), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.zeros(())

    assert MuonAdamW(groups(ours), BETAS).step(closure) is not None and calls == [True]


def test_muon_takes_the_matrices_inside_layers() -> None:
    model = vlm()
    hidden = hidden_matrices(model)
    for name, parameter in model.named_parameters():
        in_layers = ".layers." in name and name.split(".")[0] in ("lm", "encoder")
        assert (id(parameter) in hidden) == (in_layers and parameter.ndim == 2), name


@pytest.mark.parametrize("adapted", [False, True])
def test_a_stage_chooses_it(adapted: bool) -> None:
    model = vlm()
    if adapted:
        model.set_adapter(LoraAdapter(r=2))
    stage = Stage(0, "s", "a.B", {"lm": 1.0}, "short", {}, steps=1, batch_size=1, optimizer="muon", weight_decay=0.1)
    module = StageModule(model, stage, {}, {"lm": 1.0})
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, MuonAdamW)
    hidden = hidden_matrices(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["muon"] == (id(parameter) in hidden)
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
    assert adapted == all(group["muon"] for group in optimizer.param_groups), "a LoRA is matrices inside layers"
