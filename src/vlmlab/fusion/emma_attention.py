"""``emma_attention``: EMMA's mixing with weights that depend on the image and the question; ours, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Visual
from vlmlab.contracts.values import Width
from vlmlab.fusion.base import check_counts, side_by_side


class InstructionAttention(Fusion):
    """X~ = X + W_o attention(LN(X) W_q; [LN(X); E] W_k, [LN(X); E] W_v), with E = GELU(Z W_p + b_p) as in EMMA.

    EMMA (arXiv 2410.02080) mixes by one matrix for all images and questions, which its public reviews point out: a
    static matrix cannot follow where the informative word is. This counterpart is not in the paper; all of it but E
    is ours. X (N, Dv) are the encoder's features, Z (T, Dt) the instruction as the encoder's paired text tower reads
    it; states after the last token of an instruction are not looked at. W_o starts at zero, so X~ = X as with EMMA;
    at step 0 it alone has a gradient, from step 1 all have.

    Parameters, with c channels inside: 2 Dv + Dt Dv + Dv + 4 Dv c + 2 c + Dv.

    Args:
        heads: of the attention.
        inner: c; null is Dv. A multiple of `heads`.

    Raises:
        UserError: a count below 1; from ``attach``: `inner` is not a multiple of `heads`, or there is no text tower.
    """

    reads = "tokens"
    in_sequence = False
    starts_as = "text_only"
    reads_text = True

    def __init__(self, heads: Width = 8, inner: Width | None = None) -> None:
        super().__init__()
        check_counts(heads=heads, inner=inner)
        self.heads, self.inner = heads, inner

    def attach(self, model: VisionLanguageModel) -> None:
        """Size the weights by the encoder and its text tower."""
        if model.text is None:
            raise UserError(
                "fusion=emma_attention reads the instruction by the encoder's text tower and this encoder has none."
            )
        rows, columns = model.encoder.hw
        self.tokens, self.width = rows * columns, int(model.encoder.width)
        c = self.inner or self.width
        if c % self.heads:
            raise UserError(f"{c} channels cannot be shared among fusion.heads={self.heads}; give a divisor of {c}.")
        self.norm = nn.LayerNorm(self.width)
        self.project = nn.Linear(model.text.width, self.width)
        self.q, self.v = nn.Linear(self.width, c), nn.Linear(self.width, c)
        self.k = nn.Linear(self.width, c, bias=False)  # a softmax does not see its bias
        self.o = nn.Linear(c, self.width)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def features(self, visual: Visual, batch: Batch, text: Tensor | None) -> Visual:
        """Features (I, N, Dv) of each layer or tower, with what they find; Dv are the widths of all of them together.

        Raises:
            UserError: the encoder gives another number of features than its grid has cells.
        """
        assert text is not None and batch.text_ids is not None
        x, widths = side_by_side(visual, self.tokens, self.width)  # (I, N, Dv)
        normed = self.norm(x)
        together = torch.cat([normed, F.gelu(self.project(text))], 1)  # (I, N + T, Dv)
        seen = F.pad(batch.text_ids >= 0, (self.tokens, 0), value=True)  # (I, N + T)
        read = self.q(normed), self.k(together), self.v(together)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in read)  # (I, H, N or N + T, c / H)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])  # (I, H, N, c / H)
        changed = x + self.o(found.transpose(1, 2).flatten(2))  # (I, N, Dv)
        return Visual(list(changed.split(widths, -1)), visual.pooled, visual.hw)

    def waits(self, name: str) -> bool:
        """All but W_o and its bias."""
        return not name.startswith("o.")
