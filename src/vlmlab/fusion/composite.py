"""``composite``: visual tokens in the sequence ask nothing (EE-MLLM, arXiv 2408.11795)."""

from __future__ import annotations

from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Memory, Seen
from vlmlab.fusion.base import InSequence, beside
from vlmlab.lm.inside import open_ports


class CompositeAttention(InSequence):
    """The keys and values of all tokens, the queries of text alone; a visual token is updated by its own value.

    In every layer, with U = norm(X), text gets softmax(Q K^T / sqrt(dh) + mask) V W_o as ever, Q = U_t W_q of text
    alone, and a visual token (U_v W_v) W_o; both then go through the MLP. That equals ``concat`` under
    ``mask=visual_self_only``, since a softmax over one key is 1, but neither queries nor scores of visual tokens are
    computed. For V visual and T other tokens of width d this saves 2 V d^2 + 4 V (T + V) d FLOPs a layer.

    No weight is added. What the mask says of words holds; what it says of visual tokens does not.

    It starts as nothing else that is there: ``concat`` under another mask than that of the composition.
    """

    starts_as = "nothing"
    has_weights = False

    def attach(self, model: VisionLanguageModel) -> None:
        """Skip the queries in every layer.

        Raises:
            UserError: the connector's tokens are not as wide as the LM, or the family's layers are not known.
        """
        super().attach(model)
        for ports in open_ports(model.lm.model):
            ports.skip_queries(self.key)

    def memory(self, seen: Seen, batch: Batch) -> Memory:
        """Whose queries are skipped: those of visual tokens, and of padding, whose states are never used."""
        return beside(batch, batch.layout.visual | ~batch.layout.valid)
