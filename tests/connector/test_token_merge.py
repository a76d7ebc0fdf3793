"""Bipartite merging as a plain loop; without merging, transformers' BERT encoder."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

from vlmlab.connector.token_merge import TokenMergeConnector, matching, merged
from vlmlab.contracts.errors import UserError


def connector(merge: int, layers: int = 2, weighted: bool = True) -> TokenMergeConnector:
    made = TokenMergeConnector(32, 24, merge=merge, layers=layers, heads=2, hidden=16, weighted=weighted)
    return spread(made, scale=0.3)


def merge_by_hand(x: Tensor, keys: Tensor, size: list[float], pairs: int) -> tuple[Tensor, list[float]]:
    """(N, W) tokens of one image: the best pairs (even, odd) become the odd one."""
    similar = torch.nn.functional.cosine_similarity
    proposals = []
    for even in range(0, len(x), 2):
        scores = {odd: float(similar(keys[even], keys[odd], dim=0)) for odd in range(1, len(x), 2)}
        best = max(scores, key=lambda odd: scores[odd])
        proposals.append((scores[best], even, best))
    leaving = {even: odd for _, even, odd in sorted(proposals, reverse=True)[:pairs]}
    groups = [[even] for even in range(0, len(x), 2) if even not in leaving]
    groups += [[odd, *(e for e, o in leaving.items() if o == odd)] for odd in range(1, len(x), 2)]
    sizes = [sum(size[i] for i in group) for group in groups]
    means = [sum(size[i] * x[i] for i in group) / total for group, total in zip(groups, sizes, strict=True)]
    return torch.stack(means), sizes


@pytest.mark.parametrize("tokens", [8, 9])
@torch.no_grad()
def test_merging_by_a_plain_loop(tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, keys = (torch.randn(4, tokens, 6, generator=generator) for _ in range(2))
    size = torch.randint(1, 5, (4, tokens), generator=generator).float()
    for pairs in (1, 3, tokens // 2):
        got, sizes = merged(x, size, matching(keys, pairs), pairs)
        for image in range(4):
            want, want_sizes = merge_by_hand(x[image], keys[image], size[image].tolist(), pairs)
            assert worst(got[image], want) < 1e-5
            assert sizes[image].tolist() == want_sizes
        total = (x * size[..., None]).sum(1)  # the size-weighted mean is preserved
        assert worst((got * sizes[..., None]).sum(1), total) < 1e-4


@pytest.mark.parametrize("weighted", [True, False])
@torch.no_grad()
def test_two_layers_by_a_plain_loop(weighted: bool) -> None:
    ours = connector(merge=5, weighted=weighted)
    got = ours(visual())
    for image in range(2):
        x = ours.norm(ours.proj(ours.feature_norm(visual().grids[0][image])))  # (N, W)
        size = [1.0] * 16
        for block in ours.blocks:
            part = block.attention.self
            keys = torch.stack([part.key(token).unflatten(0, (2, 8)).mean(0) for token in x])
            counts = torch.tensor(size) if weighted else torch.ones(len(x))
            heads = []
            for head in range(2):
                mine = slice(head * 8, head * 8 + 8)
                scores = (part.query(x)[:, mine] @ part.key(x)[:, mine].T / 8**0.5).exp() * counts
                heads.append(scores / scores.sum(1, keepdim=True) @ part.value(x)[:, mine])
            x = block.attention.output(torch.cat(heads, -1), x)
            x, size = merge_by_hand(x, keys, size if weighted else [1.0] * len(x), 5)
            x = block.output(block.intermediate(x), x)
        assert worst(got[image], ours.out(x)) < 1e-5


@torch.no_grad()
def test_without_merging_it_is_transformers_bert() -> None:
    ours = connector(merge=0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config._attn_implementation = "eager"
    theirs = BertEncoder(config).eval()
    theirs.layer.load_state_dict(ours.blocks.state_dict())
    x = ours.norm(ours.proj(ours.feature_norm(visual().grids[0])))
    assert worst(ours(visual()), ours.out(theirs(x).last_hidden_state)) < 1e-5


def test_the_number_of_tokens() -> None:
    paper = TokenMergeConnector(8, 24, layers=12, heads=2, hidden=4)
    assert paper.tokens_per_image((1, 257)) == 257 - 12 * 19 == 29
    assert connector(merge=4).tokens_per_image((4, 4)) == 8
    with pytest.raises(UserError, match=r"connector\.merge=6 needs 12 tokens and layer 2 has 10"):
        connector(merge=6).tokens_per_image((4, 4))
    with pytest.raises(UserError, match=r"connector\.merge=-1 is not possible"):
        connector(merge=-1)
