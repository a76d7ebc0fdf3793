"""Attention weights, kept while a forward pass computes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Watch:
    """Keeps the attention weights of some positions of a batch of one row.

    It travels with what the layers are given: to the LM's attention as the keyword `watch`, to blocks that look at
    images in their ``Memory``. The weights are those of the very queries, keys and masks that the kernels are given.

    Attributes:
        queries: (T,) the positions whose weights are kept.
        own: for each layer (H, T, S): over the positions of the LM's sequence.
        images: for each look at the images, in the order of computation, (H, T, J * M): over the tokens of the row's
            J images; zero where a position sees none.
        ahead: how many tokens of images are in front of the keys of the next layer's own, in one softmax with them.
    """

    queries: Tensor
    own: list[Tensor] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    ahead: int = 0

    def layer(self, query: Tensor, key: Tensor, mask: Tensor, scale: float) -> None:
        """Keep the weights of a layer's attention.

        Args:
            query: (1, H, S, dh).
            key: (1, G, K, dh); further keys are in front of those of the S positions.
            mask: (1, 1 or H, S, K), bool or added to the scores.
            scale: of the scores.
        """
        weights = self._weights(query, key, mask, scale)
        further = key.shape[2] - query.shape[2]
        self.own.append(weights[..., further:])
        if self.ahead:
            self.images.append(weights[..., further - self.ahead : further])
            self.ahead = 0

    def look(self, query: Tensor, key: Tensor, mask: Tensor, sees: Tensor, scale: float | None) -> None:
        """Keep the weights of a look at the images.

        Args:
            query: (1, H, S, dh).
            key: (1, H, J * M, dh).
            mask: (1, 1, S, J * M) bool.
            sees: (1, S, 1) bool: positions that see an image.
            scale: of the scores; None is 1 / sqrt(dh).
        """
        weights = self._weights(query, key, mask, scale or query.shape[-1] ** -0.5)
        self.images.append(weights * sees[0, self.queries])

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
        """(H, T, K)."""
        asked = query[0, :, self.queries].float()  # (H, T, dh)
        keys = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], 0)  # (H, K, dh)
        scores = scale * asked @ keys.mT
        shown = mask[0, :, self.queries]  # (1 or H, T, K)
        scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown
        return scores.softmax(-1)
