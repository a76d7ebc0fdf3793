"""``linear``: one linear layer (LLaVA, arXiv 2304.08485 section 4.1)."""

from __future__ import annotations

from vlmlab.connector.mlp import MlpConnector


class LinearConnector(MlpConnector):
    """One linear layer; one visual token per feature.

    Args:
        in_width: width of a feature.
        out_width: width of the LM.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width, depth=1)
