"""``fdt``: images and texts as sparse mixtures of the same discrete tokens (FDT, arXiv 2303.14865)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.parts import PairHead
from vlmlab.contracts.tensors import Textual, Visual
from vlmlab.contracts.values import Count, Positive, Width


class FiniteDiscreteTokens(PairHead):
    """A codebook C (K, d) that both towers share.

    Of each side every feature has scores of all codes, q C^T / (sqrt(d) tau) with q = MLP(feature); the codes' scores
    of the whole image or text are their largest over its features, w = sparsemax(scores), and f = w C is compared.

    Args:
        codes: K (16,384 in the paper).
        width: d, of a code.
        temperature: tau.
        activation: "sparsemax", by which most codes have a weight of exactly zero, or "softmax".
        pool: of scores over features, "max" or "mean".
        scale: initial temperature of the comparison (1 / 0.07, as in CLIP).
    """

    pooled = False

    def __init__(
        self,
        codes: Count = 16384,
        width: Width = 512,
        temperature: Positive = 1.0,
        activation: Literal["sparsemax", "softmax"] = "sparsemax",
        pool: Literal["max", "mean"] = "max",
        scale: Positive = 1 / 0.07,
    ) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, width))
        self.width, self.temperature, self.pool = width, temperature, pool
        self.activation = sparsemax if activation == "sparsemax" else _softmax
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.bias = None

    def attach(self, image_width: int, text_width: int) -> None:
        """Make the two MLPs into the codebook's space."""
        self.image, self.text = (_mlp(own, self.width) for own in (image_width, text_width))

    def of_image(self, visual: Visual) -> Tensor:
        """(B, d), of unit length, of the patches."""
        features = torch.cat(visual.grids, -1)  # (B, N, Dv)
        return F.normalize(self.image_weights(features) @ self.codebook, dim=-1)

    def of_text(self, textual: Textual) -> Tensor:
        """(B, d), of unit length, of the words; padding has no say."""
        weights = self._weights(self.text(textual.states), textual.valid)  # (B, K)
        return F.normalize(weights @ self.codebook, dim=-1)

    def image_weights(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, K), not negative and of sum 1."""
        return self._weights(self.image(features), features.new_ones(features.shape[:2], dtype=torch.bool))

    def _weights(self, queries: Tensor, valid: Tensor) -> Tensor:
        """(B, N, d) and (B, N) bool -> (B, K)."""
        scores = queries @ self.codebook.T / (math.sqrt(self.width) * self.temperature)  # (B, N, K)
        if self.pool == "max":
            pooled = scores.masked_fill(~valid[..., None], -torch.inf).amax(1)
        else:
            pooled = (scores * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        return self.activation(pooled)


def _mlp(own: int, width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(own), nn.Linear(own, width), nn.GELU(), nn.Linear(width, width))


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex to every row (..., K) (arXiv 1602.02068, algorithm 1)."""
    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    place = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    kept = (1 + place * ordered > sums).sum(-1, keepdim=True)  # (..., 1) size of the support
    threshold = (sums.gather(-1, kept - 1) - 1) / kept
    return (scores - threshold).clamp(min=0)
