"""``linear``: one linear layer (LLaVA, arXiv 2304.08485 section 4.1; PaliGemma, arXiv 2407.07726 section 3.1)."""

from __future__ import annotations

from torch import nn

from vlmlab.connector.mlp import MlpConnector


class LinearConnector(MlpConnector):
    """One linear layer; one visual token per feature.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
        zero: start with weight and bias 0, as PaliGemma does: every visual token is the zero vector at first.
    """

    def __init__(self, in_width: int, out_width: int, zero: bool = False) -> None:
        super().__init__(in_width, out_width, depth=1)
        if zero:
            for parameter in self.layers.parameters():
                nn.init.zeros_(parameter)
