"""``visual_expert``: visual tokens in the sequence have linear maps of their own in the LM's layers (CogVLM)."""

from __future__ import annotations

from typing import Literal

import torch

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Memory, Seen
from vlmlab.contracts.values import Layers, Width
from vlmlab.fusion.base import InSequence, beside, check_words, chosen_layers, copies_beside
from vlmlab.lm.inside import open_ports

Sublayers = Literal["both", "attention", "mlp"]
ATTENTION = ("linear.q", "linear.k", "linear.v", "linear.qkv", "linear.o")
MLP = ("linear.gate", "linear.up", "linear.gate_up", "linear.down")
SUBLAYERS = {"both": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}


class VisualExpert(InSequence):
    """Own copies of a layer's linear maps compute the visual positions; all positions attend to each other as before.

    As in CogVLM (arXiv 2311.03079 and its code): queries, keys, values, attention output and the whole MLP of visual
    tokens have weights of their own, which start as copies of the LM's, so that the composition starts as ``concat``;
    norms are shared. With the LM frozen a text without images is answered as by the LM alone. An adapter on the LM acts
    on all positions.

    In the LM's last layer there are copies of the maps to keys and values alone: what else it computes at a visual
    position reaches no word, and such copies would never have a gradient.

    CogVLM's single position id for all tokens of an image is not here: generation counts positions by itself. Nor are
    its learned begin and end vectors of an image.

    Parameters: those of the copied maps.

    Args:
        every: the last layer of every group of so many has copies; 1: each.
        layers: indices of the layers instead; null takes `every`.
        sublayers: the linear maps of "attention", of the "mlp", or of "both".
        last_as_text: an image's last token is computed by the LM's own maps, as CogVLM does with its end vector there.

    Raises:
        UserError: an unknown choice; from ``attach``: a layer that does not exist, or nothing that would be copied.
    """

    starts_as = "concat"
    visual_queries = True

    def __init__(
        self, every: Width = 1, layers: Layers | None = None, sublayers: Sublayers = "both", last_as_text: bool = False
    ) -> None:
        super().__init__()
        check_words(sublayers=(sublayers, Sublayers))
        self.every, self.layers, self.sublayers = every, layers, sublayers
        self.last_as_text = last_as_text

    def attach(self, model: VisionLanguageModel) -> None:
        """Copy the LM's maps and let the copies take visual positions over."""
        super().attach(model)
        ports = open_ports(model.lm.model)
        if self.last_as_text and model.tokens_per_image < 2:
            raise UserError("fusion.last_as_text=true leaves no visual token of an image of one; set it to false.")
        layers = chosen_layers(len(ports), self.every, self.layers)
        self.experts = copies_beside(ports, layers, SUBLAYERS[self.sublayers], self.key)
        if not len(self.experts):
            raise UserError(
                "fusion.sublayers=mlp in the LM's last layer alone reaches no word; name an earlier one, too."
            )

    def memory(self, seen: Seen, batch: Batch) -> Memory:
        """Which positions the copies compute."""
        visual, image = batch.layout.visual, batch.layout.image
        if self.last_as_text:
            goes_on = torch.zeros_like(visual)
            goes_on[:, :-1] = visual[:, 1:] & (image[:, 1:] == image[:, :-1])
            visual = visual & goes_on
        return beside(batch, visual)
