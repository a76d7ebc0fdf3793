"""``saisa``: every layer's visual states are projected from the image anew, and ask nothing (arXiv 2502.02458)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Width
from vlmlab.fusion.base import InSequence, at_their_places, beside, memory_tokens, scattered
from vlmlab.lm.inside import nothing, open_ports


class SaisaFusion(InSequence):
    """Before each layer visual positions have the states W_2 gelu(W_1 v), v the connector's tokens, W the layer's own.

    Text looks at them as ever; they themselves ask nothing, and their attention output and MLP are not computed, since
    the next layer overwrites them. So a visual token costs a layer its keys, its values and that projection. SAISA
    reads the encoder's features: ``connector=none``. Two linear maps with GELU, and their widths, are ours: the card
    has one MLP a layer.

    It starts as nothing else that is there, since the states of visual positions are none of the LM's.

    Parameters, a projection: Dt h + h + h d + d.

    Args:
        every: groups of so many layers share a projection; SAISA 1.
        hidden: h; null is the LM's width.

    Raises:
        UserError: from ``attach``: `every` is larger than the number of layers.
    """

    starts_as = "nothing"

    def __init__(self, every: Width = 1, hidden: Width | None = None) -> None:
        super().__init__()
        self.every, self.hidden = every, hidden

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the projections and leave out what is overwritten."""
        ports = open_ports(model.lm.model)
        if self.every > len(ports):
            raise UserError(f"fusion.every={self.every} is too large; give a number from 1 to {len(ports)}.")
        self.model_tokens = model.connector.tokens_per_image(model.encoder.hw), model.token_width
        d = model.lm.width
        h = self.hidden or d
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(model.token_width, h), nn.GELU(), nn.Linear(h, d))
            for _ in range(0, len(ports), self.every)
        )
        for layer, at in enumerate(ports):
            at.skip_queries(self._named(layer))
            if layer:  # the first layer's are in the sequence
                at.put("before", overwrite, self._named(layer))
            for port in ("linear.o", "mlp"):
                at.take_over(port, partial(nothing, d), self._named(layer))

    def _named(self, layer: int) -> str:
        return f"{self.key}.{layer // self.every}"

    def embed(self, seen: Seen, embeds: Tensor, batch: Batch) -> Tensor:
        """(B, S, D) with the first layer's states of visual positions."""
        tokens = None if seen.tokens is None else self.projections[0](seen.tokens)  # (I, M, D)
        return scattered(tokens, embeds, batch)

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """The states of every layer after the first, once per image."""
        tokens = memory_tokens(seen, *self.model_tokens, next(self.parameters()))  # (I, M, Dt)
        shared = beside(batch, batch.layout.visual)
        made: dict[str, Memory] = {}
        for k, project in enumerate(self.projections):
            in_layers = k or self.every > 1  # the first layer finds its states in the sequence
            made[f"{self.key}.{k}"] = replace(shared, tensors={"states": project(tokens)}) if in_layers else shared
        return made


def overwrite(states: Tensor, *, layout: Layout, memory: Memory) -> Tensor:
    """(B, Q, D) states before a layer, those of visual positions (V,) as the memory has them."""
    assert memory.split is not None
    new = at_their_places(memory.tensors["states"], layout, memory)  # (V, D)
    return states.flatten(0, 1).index_copy(0, memory.split.here, new.to(states.dtype)).view_as(states)
