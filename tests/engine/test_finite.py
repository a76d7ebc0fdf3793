"""Weights that are not numbers are seen, and a look changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmlab.engine.finite import as_evaluated, nonfinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_seen(dtype: torch.dtype, value: float) -> None:
    good, bad = torch.randn(30, 20).to(dtype), torch.randn(30, 20).to(dtype)
    bad[7, 3] = value
    assert nonfinite([("good", good), ("bad", bad), ("none", good[:0]), ("turned", bad.T)]) == ["bad", "turned"]


def test_so_large_that_no_norm_is_left_is_no_number_either() -> None:
    assert nonfinite([("far", torch.full((4,), 1e20)), ("near", torch.full((4,), 1e15))]) == ["far"]
    assert nonfinite([("counts", torch.full((4,), 2**60))]) == []


def test_a_look_leaves_modes_random_numbers_and_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    model[1].eval()
    before, mean = torch.random.get_rng_state(), model[1].running_mean.clone()
    with as_evaluated(model):
        out = model(torch.randn(5, 3))
        torch.rand(3)
    assert not out.requires_grad and torch.equal(torch.random.get_rng_state(), before)
    assert [m.training for m in model] == [True, False, True] and torch.equal(model[1].running_mean, mean)
