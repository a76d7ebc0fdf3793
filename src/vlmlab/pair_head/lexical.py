"""``lexical``: images and texts as sparse, non-negative weights of one vocabulary (LexVLA, arXiv 2407.17827)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.parts import PairHead
from vlmlab.contracts.tensors import Textual, Visual
from vlmlab.contracts.values import Positive, Vocabulary, Width


class Lexical(PairHead):
    """A codebook of words (V, d): the weight of a word is log(1 + relu(its largest score over patches, or tokens)).

    Scores are products of a side's mapped features with the codes of words. The text side here is a text tower whose
    states are mapped likewise; the paper's is a language model that is asked for words, which ties a code to a word of
    its vocabulary. Here codes get their meaning from the contrast alone.

    Args:
        words: V.
        width: d, of a code.
        scale: initial temperature of the comparison (1 / 0.07, as in CLIP).
    """

    pooled = False

    def __init__(self, words: Vocabulary = 512, width: Width = 128, scale: Positive = 1 / 0.07) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(words, width) / width**0.5)
        self.width = width
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.bias = None

    def attach(self, image_width: int, text_width: int) -> None:
        """Make the two maps into the codebook's space."""
        self.image, self.text = (
            nn.Sequential(nn.LayerNorm(own), nn.Linear(own, self.width)) for own in (image_width, text_width)
        )

    def of_image(self, visual: Visual) -> Tensor:
        """(B, V), of unit length and not negative, of the patches."""
        features = torch.cat(visual.grids, -1)  # (B, N, Dv)
        return F.normalize(self._words(self.image(features), None), dim=-1)

    def of_text(self, textual: Textual) -> Tensor:
        """(B, V), of unit length and not negative, of the tokens; padding has no say."""
        return F.normalize(self._words(self.text(textual.states), textual.valid), dim=-1)

    def _words(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(B, N, d) -> (B, V)."""
        scores = features @ self.codebook.T  # (B, N, V)
        if valid is not None:
            scores = scores.masked_fill(~valid[..., None], -torch.inf)
        return scores.amax(1).relu().log1p()
