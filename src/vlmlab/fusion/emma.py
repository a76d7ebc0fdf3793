"""``emma``: visual tokens mixed with each other and with the instruction before the connector (arXiv 2410.02080)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Visual
from vlmlab.fusion.base import side_by_side


class InstructionMixing(Fusion):
    """EMMA's visual alignment: X~ = A [X; GELU(Z W_p + b_p)] + b along the token axis, the same for all channels.

    X (N, Dv) are the encoder's features and Z (T, Dt) the instruction as the encoder's paired text tower reads it. A
    (N, N + T) is a weight and does not depend on the input; it starts as [I | 0] with b = 0, so that X~ = X, and has no
    weight decay, which would pull it away from there. It only changes features: another fusion beside it
    (``fusion.several``) brings them to the LM. At step 0 `mix` has a gradient and `project` has none, since the text's
    half of A is zero; from step 1 all have.

    Parameters: N (N + T) + N + Dt Dv + Dv; 1,164,160 for CLIP ViT-L/14-336.

    Args:
        mask_padding: leave out the states after the last token of a short instruction. The published code keeps them
            (``clip_encoder.py``), since CLIP's 77 states are all it has.
    """

    reads = "tokens"
    in_sequence = False
    starts_as = "text_only"
    reads_text = True
    waiting = ("project.weight", "project.bias")

    def __init__(self, mask_padding: bool = False) -> None:
        super().__init__()
        self.mask_padding = mask_padding

    def attach(self, model: VisionLanguageModel) -> None:
        """Size the weights by the encoder's grid and the text tower's context.

        Raises:
            UserError: the model has no text tower.
        """
        if model.text is None:
            raise UserError("fusion=emma reads the instruction by the encoder's text tower and this encoder has none.")
        rows, columns = model.encoder.hw
        self.tokens, self.width = rows * columns, int(model.encoder.width)
        self.project = nn.Linear(model.text.width, self.width)
        self.mix = nn.Linear(self.tokens + model.text.context, self.tokens)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(self.tokens, self.mix.in_features))
            self.mix.bias.zero_()

    def features(self, visual: Visual, batch: Batch, text: Tensor | None) -> Visual:
        """Features (I, N, Dv) of each layer or tower, mixed; Dv are the widths of all of them together.

        Raises:
            UserError: the encoder gives another number of features than its grid has cells.
        """
        assert text is not None and batch.text_ids is not None
        x, widths = side_by_side(visual, self.tokens, self.width)  # (I, N, Dv)
        words = F.gelu(self.project(text))  # (I, T, Dv)
        if self.mask_padding:
            words = words * (batch.text_ids >= 0)[..., None]
        mixed = self.mix(torch.cat([x, words], 1).mT).mT  # (I, N, Dv)
        return Visual(list(mixed.split(widths, -1)), visual.pooled, visual.hw)

    def undecayed(self) -> Sequence[Tensor]:
        """A, whose identity block decay would shrink."""
        return [self.mix.weight]


def share_taken(mix: Tensor, tokens: int) -> dict[str, float]:
    """From which tokens the mixed ones take how much (EMMA's Figure 5a; the names of the measures are ours).

    Args:
        mix: (N, N + T) the matrix A.
        tokens: N.

    Returns:
        The mean over visual and over text columns of their l1 and l2 norms (1 and 0 before training), the share of |A|
        that visual tokens take from other visual tokens, and the share that they take from text.
    """
    size = mix.detach().double().abs()
    own, visual = size[:, :tokens].diagonal().sum(), size[:, :tokens].sum()
    columns = {"l1": size.sum(0), "l2": size.square().sum(0).sqrt()}
    means = {
        f"{norm}, {name}": float(each.mean())
        for norm, column in columns.items()
        for name, each in (("visual", column[:tokens]), ("text", column[tokens:]))
    }
    whole = size.sum()
    return means | {"from other visual": float((visual - own) / whole), "from text": float((whole - visual) / whole)}
