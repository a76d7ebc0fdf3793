"""The softmax contrast by a double loop, by cross-entropy, and over ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Pairing
from vlmlab.objective import clip
from vlmlab.objective.clip import Clip

NONE: Batch = None  # type: ignore[assignment]


def pairing(n: int = 5, scale: float = 10.0) -> Pairing:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return Pairing(image, text, torch.tensor(scale).log().requires_grad_(), torch.tensor(-3.0, requires_grad=True))


def outputs(pair: Pairing | None) -> Outputs:
    return Outputs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), pairing=pair)


def test_it_is_the_double_loop() -> None:
    pair = pairing()
    total, count = Clip()(outputs(pair), NONE)["clip"]
    want = 0.0
    scores = (10 * pair.image @ pair.text.T).tolist()
    for i in range(5):
        for row in (scores[i], [scores[j][i] for j in range(5)]):
            want += (math.log(sum(math.exp(v) for v in row)) - row[i]) / 2
    assert abs(float(total.detach()) - want) < 1e-4 and int(count) == 5


def test_it_has_the_papers_form_and_gradients() -> None:
    found = []
    for ours in (True, False):
        pair = pairing()
        if ours:
            total, count = Clip()(outputs(pair), NONE)["clip"]
            loss = total / count
        else:
            scores, own = pair.text @ pair.image.T * pair.log_scale.exp(), torch.arange(5)
            loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        loss.backward()
        found.append([loss.detach(), pair.image.grad, pair.text.grad, pair.log_scale.grad])
        assert not ours or float(pair.bias.grad) == 0.0, "the bias cancels, and the proof wants a gradient"
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_scale_is_bounded_and_can_come_back() -> None:
    far, bound = pairing(scale=400.0), pairing(scale=100.0)
    a, b = (Clip()(outputs(p), NONE)["clip"][0] for p in (far, bound))
    assert torch.allclose(a, b, rtol=1e-5)
    a.backward()
    assert float(far.log_scale.grad) != 0.0


def test_gradients_of_two_ranks_sum_to_one_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pairing()
    Clip()(outputs(whole), NONE)["clip"][0].backward()
    sums: dict[str, Tensor] = {}
    for own in (slice(0, 3), slice(3, 5)):
        pair = pairing()

        def others(rows: Tensor, own: slice = own, pair: Pairing = pair, called: list[int] = []) -> tuple:  # noqa: B006
            everything = (pair.text if called else pair.image).detach().clone()
            called.append(1)
            return everything.index_copy(0, torch.arange(own.start, own.stop), rows), own

        monkeypatch.setattr(clip, "gathered", others)
        mine = replace(pair, image=pair.image[own], text=pair.text[own])
        total, count = Clip()(outputs(mine), NONE)["clip"]
        assert int(count) == own.stop - own.start
        total.backward()
        for name in ("image", "text", "log_scale"):
            sums[name] = sums.get(name, 0.0) + getattr(pair, name).grad
    for name, total in sums.items():
        assert torch.allclose(total, getattr(whole, name).grad, atol=1e-5), name


def test_without_a_pair_it_is_refused() -> None:
    with pytest.raises(UserError, match="ContrastiveModule"):
        Clip()(outputs(None), NONE)
