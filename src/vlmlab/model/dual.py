"""``DualEncoder``: an image encoder and a text encoder for contrastive training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector, Encoder, Fusion, Mask, NamedParameters, TextTower
from vlmlab.contracts.tensors import Batch, Layout, Outputs
from vlmlab.contracts.watch import Watch
from vlmlab.lm.causal import CausalLanguageModel
from vlmlab.mask.causal import Causal
from vlmlab.model.pair import PooledHead
from vlmlab.model.parts import named
from vlmlab.model.vlm import VLM


class DualEncoder(VLM):
    """An image encoder and a text encoder for contrastive training, with a captioning term on the patch features.

    The text model reads a caption alone for the contrastive pair (its state at the end token). The caption is also
    predicted from the visual tokens: either word by word after them, as in CoCa (arXiv 2205.01917, section 3.2), or
    all words at once, without seeing any other word (parallel prediction, as in CapPa, arXiv 2306.07915, section 3.2,
    here without a decoder: visual token k predicts the k-th equal share of the caption's words, in no order). Parallel
    prediction cannot lean on the words before, so the patch features themselves must name what they show.

    Args:
        encoder, connector, fusion, lm, mask: as in ``VLM``; the encoder must return a pooled feature.
        width: of the shared embedding space.
        parallel: predict all words at once; captions then have a multiple of M words, in the order of the tokens.
        scale, bias: initial temperature and bias (10 and -10 in SigLIP, arXiv 2303.15343 section 3.2).
    """

    def __init__(
        self,
        encoder: Encoder,
        connector: Connector,
        fusion: Fusion,
        lm: CausalLanguageModel,
        mask: Mask,
        width: int = 128,
        parallel: bool = False,
        scale: float = 10.0,
        bias: float = -10.0,
        text: TextTower | None = None,
    ) -> None:
        super().__init__(encoder, connector, fusion, lm, mask, text)
        self.parallel = parallel
        self.pair = PooledHead(encoder.pooled_width, lm.width, width, scale, bias)

    def forward(
        self, batch: Batch, mask: Mask | None = None, in_step: bool = False, watch: Watch | None = None
    ) -> Outputs:
        """The captioning outputs with the pair of embeddings."""
        outputs = self._parallel(batch) if self.parallel else super().forward(batch, mask, in_step, watch)
        visual = outputs.seen.visual
        if visual is None or visual.pooled is None or batch.pixels.shape[0] != len(batch.input_ids):
            raise UserError("ContrastiveModule needs one image a row and a tower with a pooled output.")
        pairing = self.pair(visual.pooled, self.text_state(batch))
        return replace(outputs, pairing=pairing)

    def _parallel(self, batch: Batch) -> Outputs:
        """The words of every caption, each from the visual token whose share it is in, and from that alone."""
        seen = self.see(batch)
        tokens = seen.tokens
        if tokens is None:
            raise UserError("ContrastiveModule needs images; give recipe.stages.<name>.data captioned images.")
        answer = batch.labels != -100
        length = answer.sum(1, keepdim=True) - 1  # (B, 1) without the end token
        share = int(length[0]) // tokens.shape[1]
        if share == 0 or bool((length != share * tokens.shape[1]).any()):
            raise UserError(
                f"dual_encoder.parallel needs captions of one length that {tokens.shape[1]} visual tokens divide "
                f"(sample {batch.sample_ids[0][0]} has {int(length[0])} tokens); use other captions or parallel=false."
            )
        words = batch.labels[answer & (answer.cumsum(1) <= length)]  # (I * M * share,)
        logits = self.lm.logits(tokens).flatten(0, 1).repeat_interleave(share, 0)  # (I * M * share, V)
        return Outputs(logits, words, seen)

    def text_state(self, batch: Batch) -> Tensor:
        """(B, D): the state at the end of each row's caption, read without any image."""
        answer = batch.labels != -100
        length = answer.sum(1)  # (B,)
        longest = int(length.max())
        steps = torch.arange(longest, device=length.device)
        index = (answer.long().argmax(1, keepdim=True) + steps).clamp(max=answer.shape[1] - 1)  # (B, L)
        valid = steps < length[:, None]
        layout = Layout.of_text(valid)
        states = self.lm.states(self.lm.embed(batch.input_ids.gather(1, index)), layout, Causal())  # (B, L, D)
        return states[torch.arange(len(length), device=length.device), length - 1]

    def parts(self) -> dict[str, NamedParameters]:
        """The parts of a VLM and the pair head."""
        return {**super().parts(), "pair": [(f"pair.{n}", p) for n, p in named(self.pair)]}
