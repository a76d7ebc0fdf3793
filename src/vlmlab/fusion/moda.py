"""``moda``: keys of the other modality are brought into the space of one's own (MODA, arXiv 2507.04635)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Layers, Positive, Width
from vlmlab.fusion.base import InSequence, beside, check_counts, check_words, chosen_layers
from vlmlab.lm.inside import Attend, of_keys, open_ports, shown

Fuse = Literal["concat", "add"]
Pseudo = Literal["none", "fixed", "score", "learnable"]


class DuplexAttention(InSequence):
    """A query meets its own modality's keys k as they are, and the other's as W [k; ||G|| k] or k + rho ||G|| k.

    MODA's duplex aligner (arXiv 2507.04635, equations 5 and 6): G is the Gram matrix K^T K of the keys of the query's
    modality, in both directions. Its modular mask (equations 9 and 10): every row also has scores for the positions
    after it, up to `length`, which take their share of the softmax and give nothing.

    The paper leaves much open, and what follows is ours. G is of each head, over those keys that the query sees, since
    a Gram matrix of all text would show later answers to earlier ones; keys are as they enter the scores, rotated.
    ||G|| is G dh / trace(G), which leaves keys of white noise as they are. W (dh, 2 dh), one for each direction and
    layer and the same for all heads, starts as [I | 0] and is kept as its difference from that; rho, a number a head,
    starts at 0. Both modalities share one softmax. So the composition starts as ``concat``. With pseudo-scores it
    starts as nothing, since they take their share at once: j positions ahead the score is 0 ("fixed"), -(j - 1) beta
    ("score", the paper's), or a number a head that is learnt ("learnable"). Of the paper's mask of minus infinity,
    which is not a score at all, the name here is "none".

    G is never made: G q is the sum over those keys k of k (k q), which costs two products of the size of attention's,
    and the changed scores cost a third.

    Parameters per layer: 4 dh^2, or 2 H with ``fuse=add``; H with ``pseudo=learnable``.

    Args:
        every: the last layer of every group of so many; 1: each.
        layers: indices of the layers instead; null takes `every`.
        aligner: whether keys of the other modality are changed at all.
        fuse: "concat" (W) or "add" (rho).
        pseudo: "none", "fixed", "score" or "learnable".
        beta: decay of "score" a position; null is ALiBi's slope of each head, 2^(-8 h / H).
        length: positions of a row, with those after it; later rows have no pseudo-scores.

    Raises:
        UserError: an unknown fuse or pseudo, a length below 1, or nothing that differs from ``concat``; from
            ``attach``: a layer that does not exist.
    """

    def __init__(
        self,
        every: Width = 1,
        layers: Layers | None = None,
        aligner: bool = True,
        fuse: Fuse = "concat",
        pseudo: Pseudo = "none",
        beta: Positive | None = None,
        length: Width = 2048,
    ) -> None:
        super().__init__()
        check_words(fuse=(fuse, Fuse), pseudo=(pseudo, Pseudo))
        check_counts(length=length)
        if not aligner and pseudo == "none":
            raise UserError(
                "fusion.aligner=false and fusion.pseudo=none leave concat; choose that, or set one of them."
            )
        self.every, self.layers = every, layers
        self.aligner, self.fuse = aligner, fuse
        self.pseudo, self.beta, self.length = pseudo, beta, length
        self.starts_as = "concat" if pseudo == "none" else "nothing"

    def attach(self, model: VisionLanguageModel) -> None:
        """Put a block around the attention of each layer."""
        super().attach(model)
        ports = open_ports(model.lm.model)
        config = model.lm.model.config
        heads = int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        fuse = self.fuse if self.aligner else None
        chosen = chosen_layers(len(ports), self.every, self.layers)
        self.blocks = nn.ModuleList(DuplexBlock(heads, head, fuse, self.pseudo, self.beta, self.length) for _ in chosen)
        for layer, block in zip(chosen, self.blocks, strict=True):
            ports[layer].put("attention", block, self.key)

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """Nothing to read; without images and pseudo-scores nothing acts at all."""
        return {self.key: beside(batch)} if len(batch.images) or self.pseudo != "none" else {}


class DuplexBlock(nn.Module):
    """A block around a layer's attention.

    Args:
        heads: H.
        head: dh.
        fuse: how keys of the other modality are changed; None: not at all.
        pseudo, beta, length: as in ``DuplexAttention``.
    """

    slopes: Tensor

    def __init__(self, heads: int, head: int, fuse: str | None, pseudo: str, beta: float | None, length: int) -> None:
        super().__init__()
        self.fuse, self.pseudo, self.length = fuse, pseudo, length
        if fuse == "concat":  # W - [I | 0], of text and of visual queries
            self.change = nn.Parameter(torch.zeros(2, head, 2 * head))
        elif fuse == "add":
            self.rho = nn.Parameter(torch.zeros(2, heads))
        if pseudo == "learnable":
            self.score = nn.Parameter(torch.zeros(heads))
        alibi = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", alibi if beta is None else torch.full((heads,), beta), persistent=False)

    def forward(
        self,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        layout: Layout,
        keys: Layout,
        memory: Memory,
    ) -> Tensor:
        """(B, Q, H, dh)."""
        allowed = shown(mask, query, key)  # (B, 1, Q, K)
        scores = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, -torch.inf)
        if self.fuse is not None:
            same = layout.visual[:, :, None] == of_keys(keys.visual, key.shape[2])[:, None]  # (B, Q, K)
            every = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # (B, H, K, dh)
            moved = self._moved(query, every, allowed & same[:, None], layout.visual)  # (B, H, Q, dh)
            changed = (scale * (moved @ every.mT)).to(query.dtype)
            scores = scores + changed.masked_fill(same[:, None], 0.0)  # (B, H, Q, K)
        if self.pseudo != "none":
            sink = self._sink(layout.position).to(query.dtype)  # (B, H, Q)
            wide = scores.expand(len(query), query.shape[1], -1, -1)
            scores = torch.cat([sink[..., None], wide], -1)  # (B, H, Q, 1 + K)
            key, value = F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))  # a key and a value of zeros
        return attend(query, key, value, scores)

    def _moved(self, query: Tensor, key: Tensor, own: Tensor, visual: Tensor) -> Tensor:
        """The change of q (B, H, Q, dh) to that q' of which q' k is the score of a key of the other modality.

        W [k; ||G|| k] q is k (W_1^T q + ||G|| W_2^T q), since G is symmetric.

        Args:
            query: (B, H, Q, dh).
            key: (B, H, K, dh).
            own: (B, 1, Q, K): keys of its own modality that a query sees.
            visual: (B, Q): queries of visual tokens.
        """
        which = visual[:, None, :, None]  # (B, 1, Q, 1)
        if self.fuse == "add":
            told = self._gram(query, key, own)
            return torch.where(which, self.rho[1, :, None, None] * told, self.rho[0, :, None, None] * told)
        text, image = (query @ part.to(query.dtype) for part in self.change)  # (B, H, Q, 2 dh): W^T q
        turned, inner = torch.where(which, image, text).chunk(2, -1)
        return turned + self._gram(inner, key, own)

    def _gram(self, inner: Tensor, key: Tensor, own: Tensor) -> Tensor:
        """||G|| x of every query's x (B, H, Q, dh), G over its own keys."""
        share = own.to(inner.dtype)
        told = ((inner @ key.mT) * share) @ key  # (B, H, Q, dh)
        trace = share @ key.square().sum(-1, keepdim=True)  # (B, H, Q, 1)
        return told * key.shape[-1] / trace.clamp(min=torch.finfo(trace.dtype).tiny)

    def _sink(self, position: Tensor) -> Tensor:
        """(B, H, Q) log of what the pseudo-scores of a row at `position` (B, Q) sum to, exponentiated."""
        ahead = (self.length - 1 - position).clamp(min=0)[:, None]  # (B, 1, Q)
        slopes = self.slopes[:, None]  # (H, 1)
        if self.pseudo == "score":  # a geometric series
            return (-torch.expm1(-slopes * ahead)).log() - (-torch.expm1(-slopes)).log()
        base = self.score[:, None] if self.pseudo == "learnable" else torch.zeros_like(slopes)
        return ahead.to(slopes.dtype).log() + base
