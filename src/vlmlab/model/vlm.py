"""The vision-language model, in the order of the data: encoder -> connector -> fusion into the LM, under a mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.cache.none import NoCache
from vlmlab.contracts.parts import Connector, Encoder, FeatureCache, Fusion, Mask, TextTower
from vlmlab.contracts.tensors import Batch, Images, Layout, Outputs, Seen
from vlmlab.contracts.watch import Watch
from vlmlab.lm.causal import CausalLanguageModel
from vlmlab.lm.inside import Inside, has_ports
from vlmlab.model.branches import Unfolded, unfold
from vlmlab.model.parts import Parts


class VLM(Parts):
    """A vision-language model made of named parts.

    Args:
        encoder: pixels -> Visual; None where the fusion reads no vision.
        connector: Visual -> (I, M, D) visual tokens; None likewise.
        fusion: how vision acts on the LM.
        lm: the language model.
        mask: who may look at whom.
        text: the encoder's paired text tower, where the fusion reads the user's words through it.

    Attributes:
        cache: what is before the encoder; nothing but while a ``FeatureCache`` is serving.

    Raises:
        UserError: the fusion does not go with the other parts.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        connector: Connector | None,
        fusion: Fusion,
        lm: CausalLanguageModel,
        mask: Mask,
        text: TextTower | None = None,
    ) -> None:
        super().__init__(encoder, connector, fusion, lm, mask, text)
        self.cache: FeatureCache = NoCache()
        fusion.attach(self)

    # -- the way of the data -------------------------------------------------------------------------------------

    @property
    def tokens_per_image(self) -> int:
        """Positions that one image takes in the LM's sequence."""
        if self.encoder is None or self.connector is None:
            return 0
        return self.fusion.tokens_per_image(self.connector.tokens_per_image(self.encoder.hw))

    @property
    def token_width(self) -> int:
        """Width of the connector's tokens: the LM's, where the connector does not say otherwise."""
        own = None if self.connector is None else self.connector.width
        return self.lm.width if own is None else own

    def see(self, batch: Batch) -> Seen:
        """What the encoder saw, after the fusion's change of features, and the visual tokens (I, M, D)."""
        if self.encoder is None or self.connector is None or batch.pixels.shape[0] == 0:
            return Seen()
        visual = self.cache(self.encoder, batch.pixels)
        visual = self.fusion.features(visual, batch, self.text_states(batch))
        read = replace(visual, grids=visual.grids[-self.fusion.read_by_connector(len(visual.grids)) :])
        return Seen(visual, self.connector(read, batch.instructions() if self.connector.reads_instruction else None))

    def text_states(self, batch: Batch) -> Tensor | None:
        """(I, T, Dt) what the user says to each image, as the encoder's text tower reads it."""
        return None if self.text is None or batch.text_ids is None else self.text(batch.text_ids)

    def embed(self, batch: Batch, seen: Seen | None = None) -> Tensor:
        """(B, S, D) embeddings with vision fused in; without `seen` the model looks first."""
        return self.fusion.embed(self.see(batch) if seen is None else seen, self.lm.embed(batch.input_ids), batch)

    def inside(self, batch: Batch, seen: Seen, watch: Watch | None = None) -> Inside | None:
        """What the blocks at the ports of the LM's layers are given; None where there are none."""
        if not has_ports(self.lm.model):
            return None
        memories = self.fusion.memories(seen, batch)
        if watch is not None:
            memories = {key: replace(memory, watch=watch) for key, memory in memories.items()}
        return Inside(batch.layout, memories, _with_image(batch))

    def forward(
        self, batch: Batch, mask: Mask | None = None, in_step: bool = False, watch: Watch | None = None
    ) -> Outputs:
        """Logits at the positions that predict a supervised token, and their targets.

        Args:
            batch: the micro-batch.
            mask: in place of the model's own.
            in_step: some rank has an image in its micro-batch and weights are cut into shards, so that all ranks have
                to go through the encoder and the fusion, and back through the LM, together.
            watch: keeps attention weights of a batch of one row.
        """
        alone = in_step and batch.pixels.shape[0] == 0
        batch = self._with_blank(batch) if alone else batch
        seen = self.see(batch)
        embeds = self.embed(batch, seen)  # (B, S, D)
        if in_step:
            embeds = self._in_step(embeds, seen)
        inside = self.inside(batch, seen, watch)
        states = self.lm.states(embeds, batch.layout, mask or self.mask, inside, watch=watch)  # (B, S, D)
        chosen = batch.labels[:, 1:] != -100  # (B, S - 1)
        logits = self.lm.logits(states[:, :-1][chosen])  # (T, V)
        targets = batch.labels[:, 1:][chosen]
        seen = Seen() if alone else seen
        noted = {} if inside is None else inside.memories
        return Outputs(logits=logits, targets=targets, seen=seen, states=states, embeds=embeds, memories=noted)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, **options: Any) -> list[str]:
        """Greedy cached decoding of left-padded prompts, as text without special tokens, up to where answers end.

        Of a tree every branch is a prompt, in their order; what they share is computed once.
        """
        seen = self.see(batch)
        embeds, layout, inside = self.embed(batch, seen), batch.layout, self.inside(batch, seen)
        if bool((layout.branch >= 0).any()):
            rows = unfold(layout)
            embeds, layout = rows.of(embeds), rows.layout(layout)
            inside = None if inside is None else rows.inside(inside)
            options |= self._shared(rows, embeds, layout, inside)
        ids = self.lm.generate(embeds, layout, self.mask, max_new_tokens, inside, **options)
        own = options.get("eos_token_id")
        return self.lm.texts(ids, self.lm.stop_ids if own is None else own if isinstance(own, list) else [own])

    def _shared(self, rows: Unfolded, embeds: Tensor, layout: Layout, inside: Inside | None) -> dict[str, Any]:
        """The cache of what the questions of each tree share, for each question; nothing where they share nothing."""
        if not rows.trunk:
            return {}
        shared = torch.arange(rows.trunk, device=embeds.device)
        within = None if inside is None else inside.of(rows.first).at(shared)
        known = layout.select(rows.first).at(shared)
        cache = self.lm.prefill(embeds[rows.first][:, : rows.trunk], known, self.mask, within)
        cache.batch_select_indices(rows.tree)
        return {"past_key_values": cache}

    # -- ranks that share weights --------------------------------------------------------------------------------

    def _with_blank(self, batch: Batch) -> Batch:
        """The batch with a blank image that belongs to no row, so that no position sees it."""
        if self.encoder is None:
            return batch
        size, device = (self.encoder.preprocess.height, self.encoder.preprocess.width), batch.input_ids.device
        zero = torch.zeros(1, dtype=torch.long, device=device)
        table = Images(zero - 1, zero - 1, zero, zero, zero, zero, torch.tensor([size], device=device), zero, ["blank"])
        asked = None if self.text is None else self.text.tokenise([""]).to(device)
        return replace(batch, pixels=zero.to(torch.uint8).expand(1, 3, *size), images=table, text_ids=asked)

    def _in_step(self, embeds: Tensor, seen: Seen) -> Tensor:
        """(B, S, D) as they are, by the way of ranks whose images take part.

        What was seen of a blank image counts nothing; and where images teach anything, the backward pass goes through
        all of the LM.
        """
        if seen.tokens is not None:
            embeds = embeds + 0.0 * seen.tokens.sum()
        taught = any(p.requires_grad for m in (self.encoder, self.connector, self.fusion) for p in _parameters(m))
        return embeds.requires_grad_() if taught and not embeds.requires_grad else embeds


def _parameters(module: nn.Module | None) -> Iterable[nn.Parameter]:
    return () if module is None else module.parameters()


def _with_image(batch: Batch) -> Tensor:
    """(B, S) bool: positions whose packed sample has an image."""
    images, layout = batch.images, batch.layout
    own = images.row[:, None] == torch.arange(len(layout.kind), device=layout.kind.device)  # (I, B)
    same = layout.segment[None] == images.segment[:, None, None]  # (I, B, S)
    return (own[..., None] & same).any(0) & layout.valid
