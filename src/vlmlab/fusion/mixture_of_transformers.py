"""``mixture_of_transformers``: visual tokens have a transformer of their own, and one attention serves both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import MinLen

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Memory, Seen
from vlmlab.contracts.values import Layers, Width
from vlmlab.fusion.base import InSequence, beside, check_words, chosen_layers, copies_beside
from vlmlab.lm.inside import open_ports

Untied = Literal["attention", "mlp", "norms"]
PORTS = {
    "attention": ("linear.q", "linear.k", "linear.v", "linear.qkv", "linear.o"),
    "mlp": ("mlp",),
    "norms": ("norm.attention", "norm.attention_out", "norm.mlp", "norm.mlp_out"),
}


class MixtureOfTransformers(InSequence):
    """All weights of a layer are separate for visual positions; attention goes over all positions together.

    As in Mixture-of-Transformers (arXiv 2411.04996, section 2): linear maps of the attention, feed-forward network and
    norms, by modality. The copies start as the LM's own, as where such a model is grown from a trained one, so that the
    composition starts as ``concat``; the paper itself trains from scratch. With the LM frozen a text without images is
    answered as by the LM alone. Norms of queries and keys within a head (Qwen3, Gemma 3) are shared.

    In the LM's last layer there are copies of what makes keys and values alone: what else it computes at a visual
    position reaches no word, and such copies would never have a gradient. The LM's last norm has no copy for that
    reason. An adapter around a linear map of the attention acts on all positions, one in the network on text.

    Parameters: those of the copies.

    Args:
        every: the last layer of every group of so many has copies; 1: each.
        layers: indices of the layers instead; null takes `every`.
        untied: of "attention", "mlp" and "norms", what has copies.

    Raises:
        UserError: an unknown word; from ``attach``: a layer that does not exist, or nothing that would be copied.
    """

    starts_as = "concat"
    visual_queries = True

    def __init__(
        self,
        every: Width = 1,
        layers: Layers | None = None,
        untied: Annotated[Sequence[Untied], MinLen(1)] = ("attention", "mlp", "norms"),
    ) -> None:
        super().__init__()
        for word in untied:
            check_words(untied=(word, Untied))
        self.every, self.layers, self.untied = every, layers, tuple(untied)

    def attach(self, model: VisionLanguageModel) -> None:
        """Copy what is untied and let the copies take visual positions over."""
        super().attach(model)
        ports = open_ports(model.lm.model)
        wanted = [port for word in self.untied for port in PORTS[word]]
        self.copies = copies_beside(ports, chosen_layers(len(ports), self.every, self.layers), wanted, self.key)
        if not len(self.copies):
            raise UserError(
                "fusion.untied=[mlp] in the LM's last layer alone reaches no word; name an earlier one, too."
            )

    def memory(self, seen: Seen, batch: Batch) -> Memory:
        """Which positions the copies compute."""
        return beside(batch, batch.layout.visual)
