"""Shapes, the paper's formulas written out, and transformers' Q-Former."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.connector.features import visual
from tests.tiny import choices, spread, worst
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlmlab.connector.c_abstractor import CAbstractorConnector
from vlmlab.connector.ldp import LdpConnector
from vlmlab.connector.mlp import MlpConnector
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Visual

REACH = {LdpConnector: 1, CAbstractorConnector: 3}
"""Features beyond its own window that a token reads: by a convolution before and one after the pooling."""


def seeking(seen: Visual) -> Visual:
    """With a gradient at the features, so that a connector without weights has one too."""
    seen.grids[0].requires_grad_()
    return seen


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("path", choices("connector"), ids=lambda p: p.stem)
def test_every_connector_gives_the_tokens_it_promises(path: object, layers: int) -> None:
    connector = instantiate(OmegaConf.load(path), in_width=32 * layers, out_width=24)
    tokens = connector(seeking(visual(layers)))
    assert tokens.shape == (3, connector.tokens_per_image((4, 4)), connector.width or 24)
    tokens.square().sum().backward()
    assert [n for n, p in connector.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("path", choices("connector"), ids=lambda p: p.stem)
@torch.no_grad()
def test_images_do_not_see_each_other(path: object) -> None:
    connector = spread(instantiate(OmegaConf.load(path), in_width=32, out_width=24))
    seen = visual()
    other = Visual([seen.grids[0].flip(0)], None, seen.hw)
    assert worst(connector(seen).flip(0), connector(other)) < 1e-6


@pytest.mark.parametrize("path", choices("connector"), ids=lambda p: p.stem)
def test_every_connector_trains_in_bf16(path: object) -> None:
    connector = instantiate(OmegaConf.load(path), in_width=32, out_width=24)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = connector(seeking(visual()))
    tokens.float().square().sum().backward()
    assert torch.isfinite(tokens).all()
    assert [n for n, p in connector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("hw", [(3, 3), (2, 6), (5, 4)], ids=str)
@pytest.mark.parametrize("path", choices("connector"), ids=lambda p: p.stem)
@torch.no_grad()
def test_any_grid_gives_its_tokens_or_is_refused_by_the_key(path: object, hw: tuple[int, int]) -> None:
    connector = instantiate(OmegaConf.load(path), in_width=32, out_width=24)
    try:
        promised = connector.tokens_per_image(hw)
    except UserError as error:
        assert "connector" in str(error) and str(error).endswith(".")
        with pytest.raises((UserError, RuntimeError)):
            connector(visual(hw=hw))
        return
    assert connector(visual(hw=hw)).shape == (3, promised, connector.width or 24)


@pytest.mark.parametrize("path", choices("connector"), ids=lambda p: p.stem)
def test_every_feature_matters(path: object) -> None:
    """A connector that drops part of the image would show a feature without gradient."""
    connector = spread(instantiate(OmegaConf.load(path), in_width=32, out_width=24))
    seen = seeking(visual())
    weights = torch.randn(connector.width or 24, generator=torch.Generator().manual_seed(1))
    (connector(seen) * weights).sum().backward()
    assert (seen.grids[0].grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("hw", [(4, 4), (4, 6), (6, 2), (5, 3)], ids=str)
@pytest.mark.parametrize("path", choices("connector"), ids=lambda p: p.stem)
def test_a_token_of_the_grid_reads_its_own_part_of_the_picture(path: object, hw: tuple[int, int]) -> None:
    """The features that move a token most are where the token is, or as near as its convolutions reach."""
    connector = spread(instantiate(OmegaConf.load(path), in_width=32, out_width=24))
    try:
        count = connector.tokens_per_image(hw)
    except UserError:
        return
    grid = connector.grid(hw)
    if grid is None:
        return
    assert grid[0] * grid[1] == count
    seen = seeking(visual(images=1, hw=hw))
    tokens = connector(seen)[0].unflatten(0, grid)
    steps = [-(-side // tokens_on_it) for side, tokens_on_it in zip(hw, grid, strict=True)]
    for r, c in itertools.product(range(grid[0]), range(grid[1])):
        (moved,) = torch.autograd.grad(tokens[r, c].square().sum(), seen.grids[0], retain_graph=True)
        row, column = divmod(int(moved.norm(dim=-1).argmax()), hw[1])
        reach = REACH.get(type(connector), 0)
        for at, place, step in ((row, r, steps[0]), (column, c, steps[1])):
            assert place * step - reach <= at < (place + 1) * step + reach, f"token {r}, {c} reads {row}, {column}"


def test_who_has_a_grid() -> None:
    found = {path.stem for path in choices("connector") if _grid(path) is not None}
    assert found == {
        "none",
        "linear",
        "mlp",
        "pool",
        "pixel_shuffle",
        "ldp",
        "ldp_v2",
        "c_abstractor",
        "attention_pool",
        "sum",
    }


def _grid(path: object) -> tuple[int, int] | None:
    return instantiate(OmegaConf.load(path), in_width=32, out_width=24).grid((4, 4))


@torch.no_grad()
def test_mlp_formula() -> None:
    connector = spread(MlpConnector(32, 24, depth=3, hidden=20))
    first, second, third = (m for m in connector.layers if isinstance(m, torch.nn.Linear))
    x = visual().grids[0]
    gelu = lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))  # noqa: E731
    want = gelu(gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias) @ third.weight.T + third.bias
    assert first.weight.shape == (20, 32) and third.weight.shape == (24, 20)
    assert worst(connector(visual()), want) < 1e-5


def qformer(cross_every: int = 2) -> QFormerConnector:
    connector = QFormerConnector(20, 24, queries=5, hidden=16, layers=3, heads=2, cross_every=cross_every, dropout=0.1)
    return spread(connector)  # evaluation mode: no dropout


@torch.no_grad()
def test_qformer_is_transformers_blip2() -> None:
    ours = qformer()
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            cross_attention_frequency=2,
            encoder_hidden_size=20,
        )
    ).eval()
    theirs.load_state_dict(ours.qformer.state_dict())
    assert [hasattr(layer, "crossattention") for layer in theirs.encoder.layer] == [True, False, True]
    features = visual(width=20).grids[0]
    normed = F.layer_norm(features, (20,), ours.norm.weight, ours.norm.bias)
    out = theirs(query_embeds=ours.queries.expand(3, -1, -1), encoder_hidden_states=normed).last_hidden_state
    assert worst(ours(visual(width=20)), out @ ours.out.weight.T + ours.out.bias) < 1e-6


@torch.no_grad()
def test_one_cross_attention_by_a_plain_loop() -> None:
    ours = qformer()
    block = ours.qformer.encoder.layer[0].crossattention
    queries, features = ours.queries[0], visual(width=20).grids[0][0]
    part = block.attention
    want = torch.zeros_like(queries)
    for head in range(2):
        mine = slice(head * 8, head * 8 + 8)
        for i, query in enumerate(queries):
            q = (part.query.weight @ query + part.query.bias)[mine]
            keys = [(part.key.weight @ x + part.key.bias)[mine] for x in features]
            weights = torch.stack([q @ key / math.sqrt(8) for key in keys]).exp()
            values = [(part.value.weight @ x + part.value.bias)[mine] for x in features]
            want[i, mine] = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
    want = want @ block.output.dense.weight.T + block.output.dense.bias + queries
    norm = block.output.LayerNorm
    want = F.layer_norm(want, (16,), norm.weight, norm.bias, norm.eps)
    got = block(ours.queries, encoder_hidden_states=features[None])
    got = got[0] if isinstance(got, tuple) else got
    assert worst(got[0], want) < 1e-5
