"""``idefics2``: a gated MLP to the LM's width, then a perceiver there (Idefics2, arXiv 2405.02246 section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler

from vlmlab.connector.base import check_counts
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Depth, Width


class Idefics2Connector(Connector):
    """transformers' modality projection and perceiver of Idefics2; as many tokens as latents for any grid.

    The latents start as N(0, 1) (Flamingo's): transformers fills them with ones for checkpoints to overwrite, and
    equal latents would stay equal for ever.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM, which is also the resampler's.
        latents: number of learned latents (64 in the paper).
        depth: number of blocks (3).
        heads: attention heads (16).
        head_dim: width of a head (96).
        kv_heads: heads of keys and values, shared by groups of ``heads / kv_heads`` queries (4).
        hidden: width inside the gated MLP (14336, that of Mistral's own); null means four times the LM's.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        latents: Width = 64,
        depth: Depth = 3,
        heads: Width = 16,
        head_dim: Width = 96,
        kv_heads: Width = 4,
        hidden: Width | None = None,
    ) -> None:
        super().__init__()
        wide = 4 * out_width if hidden is None else hidden
        check_counts(latents=latents, depth=depth, heads=heads, head_dim=head_dim, kv_heads=kv_heads, hidden=wide)
        if heads % kv_heads:
            raise UserError(
                f"connector.kv_heads={kv_heads} does not divide connector.heads={heads}; "
                f"choose a divisor of {heads} for connector.kv_heads."
            )
        self.mlp = Idefics2MLP(in_width, wide, out_width, hidden_act="silu")
        config = Idefics2PerceiverConfig(
            hidden_size=out_width,
            resampler_n_latents=latents,
            resampler_depth=depth,
            resampler_n_heads=heads,
            resampler_head_dim=head_dim,
            num_key_value_heads=kv_heads,
        )
        self.resampler = Idefics2PerceiverResampler(config)
        nn.init.normal_(self.resampler.latents)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per latent, whatever the grid."""
        return self.resampler.n_latents

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = self.mlp(torch.cat(visual.grids, -1))  # (I, N, Dv) -> (I, N, D)
        every = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        return self.resampler(context=features, attention_mask=every)  # (I, M, D)
