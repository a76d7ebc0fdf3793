"""``perceiver``: learned latents that read the features (Flamingo's resampler, arXiv 2204.14198 section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlmlab.connector.base import check_counts
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Depth, Width


class PerceiverConnector(Connector):
    """transformers' IDEFICS resampler and a linear layer to the LM's width; as many tokens as latents for any grid.

    Each block: the latents attend to the features and to themselves, then a feed-forward layer, both added to the
    latents. Its feed-forward layer has ReLU, as IDEFICS; the latents start as N(0, 1). The features' order does not
    matter: what position they carry comes from the encoder.

    Args:
        in_width: width of a feature (all tapped layers side by side), which is also the resampler's.
        out_width: width of the LM.
        latents: number of learned latents (64 in the paper).
        depth: number of blocks (6 in the paper).
        heads: attention heads (8 in OpenFlamingo, 16 in IDEFICS).
        head_dim: width of a head (64 in OpenFlamingo, 96 in IDEFICS).
        qk_norm: LayerNorm of queries and keys in each head (IDEFICS).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        latents: Width = 64,
        depth: Depth = 6,
        heads: Width = 8,
        head_dim: Width = 64,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        check_counts(latents=latents, depth=depth, heads=heads, head_dim=head_dim)
        config = IdeficsConfig(
            vision_config={"embed_dim": in_width}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
        )
        self.resampler = IdeficsPerceiverResampler(config, in_width, depth, heads, head_dim, latents)
        self.out = nn.Linear(in_width, out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per latent, whatever the grid."""
        return self.resampler.n_latents

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = torch.cat(visual.grids, -1)  # (I, N, Dv)
        return self.out(self.resampler(features))  # (I, M, Dv) -> (I, M, D)
