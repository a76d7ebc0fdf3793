"""Several connectors: their tokens in order, or added; every part is built with the towers' widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tests.connector.features import visual
from tests.tiny import spread, worst

from vlmlab.connector.several import StackConnector, SumConnector
from vlmlab.contracts.errors import UserError

MLP = {"_target_": "vlmlab.connector.mlp.MlpConnector", "depth": 1}
POOL = {"_target_": "vlmlab.connector.pool.PoolConnector", "side": 2}
AS_THEY_ARE = {"_target_": "vlmlab.connector.none.NoConnector"}
SHUFFLE = {"_target_": "vlmlab.connector.pixel_shuffle.PixelShuffleConnector"}


def several(kind: type[StackConnector], **parts: Any) -> StackConnector:
    """As a run builds it."""
    config = {"_target_": f"{kind.__module__}.{kind.__name__}", "_recursive_": False, "parts": parts}
    return spread(instantiate(config, in_width=32, out_width=24))


@torch.no_grad()
def test_tokens_stand_in_the_order_of_the_parts() -> None:
    connector = several(StackConnector, pool=POOL, whole=MLP)
    tokens = connector(visual())
    assert connector.tokens_per_image((4, 4)) == tokens.shape[1] == 4 + 16
    assert torch.equal(tokens[:, :4], connector.parts["pool"](visual()))
    assert torch.equal(tokens[:, 4:], connector.parts["whole"](visual()))


@torch.no_grad()
def test_tokens_are_added() -> None:
    connector = several(SumConnector, pool=POOL, layout=SHUFFLE)
    want = connector.parts["pool"](visual()) + connector.parts["layout"](visual())
    assert connector.tokens_per_image((4, 4)) == 4
    assert worst(connector(visual()), want) < 1e-6


@torch.no_grad()
def test_lists_of_lists_and_parts_left_out() -> None:
    inner = {"_target_": "vlmlab.connector.several.SumConnector", "_recursive_": False, "parts": {"a": POOL, "b": POOL}}
    connector = several(StackConnector, inner=inner, gone=None, whole=MLP)
    assert list(connector.parts) == ["inner", "whole"]
    assert connector(visual()).shape == (3, 20, 24)


def test_impossible_lists_are_refused() -> None:
    with pytest.raises(UserError, match="different numbers"):
        several(SumConnector, pool=POOL, whole=MLP).tokens_per_image((4, 4))
    with pytest.raises(UserError, match=r"connector\.parts\.pool: connector\.side=2 does not divide"):
        several(StackConnector, pool=POOL).tokens_per_image((3, 3))
    with pytest.raises(UserError, match=r"connector\.parts\.pool: connector\.side=0 is not possible"):
        StackConnector(32, 24, {"pool": {**POOL, "side": 0}})
    with pytest.raises(UserError, match="lists no connector"):
        StackConnector(32, 24, {"gone": None})
    with pytest.raises(UserError, match=r"connector\.parts\.odd is not a connector"):
        StackConnector(32, 24, {"odd": {"_target_": "builtins.dict"}})


@torch.no_grad()
def test_the_instruction_reaches_the_part_that_reads_it() -> None:
    reader = {"_target_": "tests.connector.features.Reader"}
    connector = several(StackConnector, pool=POOL, reader=reader)
    assert connector.reads_instruction and not several(StackConnector, pool=POOL).reads_instruction
    said = torch.tensor([[5, 7], [6, -1], [8, -1]])
    assert connector(visual(), said)[:, 4, 0].tolist() == [5, 6, 8]


def test_the_grid_is_that_of_all_parts() -> None:
    reader = {"_target_": "tests.connector.features.Reader"}
    assert several(SumConnector, pool=POOL, layout=SHUFFLE).grid((4, 4)) == (2, 2)
    assert several(SumConnector, pool={**POOL, "side": 1}, reader=reader).grid((4, 4)) is None
    tall = {**POOL, "side": None}  # 2 x 3 of 4 x 6
    assert several(SumConnector, tall=tall, layout=SHUFFLE).grid((4, 6)) == (2, 3)
    assert several(StackConnector, whole=MLP).grid((4, 6)) == (4, 6)
    assert several(StackConnector, pool=POOL, whole=MLP).grid((4, 4)) is None


@torch.no_grad()
def test_the_width_is_that_of_all_parts() -> None:
    assert several(StackConnector, pool=POOL).width is None
    features = several(StackConnector, a=AS_THEY_ARE, b=AS_THEY_ARE)
    assert features.width == 32 == features(visual()).shape[-1]
    with pytest.raises(UserError, match=r"different widths \(pool 24, raw 32\)"):
        SumConnector(32, 24, {"pool": POOL, "raw": AS_THEY_ARE})
    equal = StackConnector(24, 24, {"pool": POOL, "raw": AS_THEY_ARE})
    assert equal.width is None
