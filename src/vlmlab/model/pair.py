"""``PairedTowers``: an image tower and a text tower whose pooled outputs meet in one space, as in CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.cache.none import NoCache
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder, FeatureCache, NamedParameters, PairHead, PairText, PairWeights
from vlmlab.contracts.sample import Image
from vlmlab.contracts.tensors import Batch, Outputs, Pairing, Seen, Textual, Visual
from vlmlab.fusion.none import NoFusion
from vlmlab.mask.causal import Causal
from vlmlab.model.parts import Parts, named


class PooledHead(PairHead):
    """Projects both sides into one space of unit vectors, with a learned temperature and bias.

    Args:
        image_width, text_width: of the pooled outputs.
        width: of the common space; None: no projection, the pooled outputs are compared themselves, as in SigLIP.
        scale: initial temperature: 10 in SigLIP (arXiv 2303.15343, section 3.2), 1 / 0.07 in CLIP.
        bias: initial bias: -10 in SigLIP; None: none, as in CLIP.

    Raises:
        UserError: widths that differ without a projection.
    """

    def __init__(
        self, image_width: int, text_width: int, width: int | None, scale: float, bias: float | None = None
    ) -> None:
        super().__init__()
        if width is None and image_width != text_width:
            raise UserError(
                f"dual_encoder.width=null compares an image of width {image_width} with a text of width {text_width}; "
                "give dual_encoder.width a number, or a text tower of that width."
            )
        self.image: nn.Module = nn.Identity() if width is None else nn.Linear(image_width, width, bias=False)
        self.text: nn.Module = nn.Identity() if width is None else nn.Linear(text_width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    @classmethod
    def loaded(cls, weights: PairWeights, image_width: int, text_width: int) -> PooledHead:
        """The head of a checkpoint.

        Raises:
            UserError: it belongs to an image tower of another width.
        """
        found = image_width if weights.image is None else weights.image.shape[1]
        if found != image_width or (weights.image is None and image_width != text_width):
            here = text_width if weights.image is None else found
            raise UserError(
                f"text_tower.head=true: its checkpoint compares texts with images of width {here} and this encoder "
                f"gives {image_width}; give the encoder the same path, or set text_tower.head=false."
            )
        width = None if weights.image is None else len(weights.image)
        bias = None if weights.bias is None else 0.0
        head = cls(image_width, text_width, width, 1.0, bias)
        kept = {"image.weight": weights.image, "text.weight": weights.text, "log_scale": weights.log_scale}
        head.load_state_dict({n: t for n, t in {**kept, "bias": weights.bias}.items() if t is not None})
        return head

    def forward(self, image: Tensor, text: Tensor) -> Pairing:
        """Pooled outputs (B, Wi) and (B, Wt) -> unit vectors (B, E)."""
        return self.compared(F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1))

    def of_image(self, visual: Visual) -> Tensor:
        """(B, E) of the pooled image.

        Raises:
            UserError: the vision tower has none.
        """
        if visual.pooled is None:
            raise UserError(
                "PairModule needs a vision tower with a pooled output; use encoder=scratch, embedded or hf."
            )
        return F.normalize(self.image(visual.pooled), dim=-1)

    def of_text(self, textual: Textual) -> Tensor:
        """(B, E) of the pooled text."""
        return F.normalize(self.text(textual.pooled), dim=-1)


class PairedTowers(Parts):
    """An image tower and a text tower for contrastive training, and for retrieval and zero-shot labels afterwards.

    CLIP's classes in transformers (``CLIPModel``) and SigLIP's (``SiglipModel``) are this with their own towers and
    head; either tower may also be another one, new or frozen.

    Args:
        encoder: with a pooled output; the part "encoder" of a stage.
        lm: the text tower; the part "lm".
        width, scale, bias: of the head, the part "pair", where the text tower brings none; see ``PooledHead``.
        head: another head, which does not compare pooled outputs; the text tower's own is then left out.

    Attributes:
        cache: what is before the encoder; nothing but while a ``FeatureCache`` is serving.
    """

    lm: PairText  # type: ignore[assignment]

    def __init__(
        self,
        encoder: Encoder,
        lm: PairText,
        width: int | None = None,
        scale: float = 10.0,
        bias: float | None = -10.0,
        head: PairHead | None = None,
    ) -> None:
        super().__init__(encoder, None, NoFusion(), lm, Causal())  # type: ignore[arg-type]
        self.pair: PairHead = _pooled(encoder, lm, width, scale, bias) if head is None else head
        if head is not None:
            head.attach(encoder.width, lm.state_width)
            if not head.pooled:
                lm.cut_pooling()
        self.cache: FeatureCache = NoCache()

    def forward(self, batch: Batch, in_step: bool = False) -> Outputs:
        """The pair of embeddings, and what both towers saw; no logits. Every batch has images, on all ranks.

        Raises:
            UserError: the vision tower has no pooled output, or the batch no texts.
        """
        assert self.encoder is not None
        visual = self.cache(self.encoder, batch.pixels)
        if batch.text_ids is None:
            raise UserError("PairModule needs a text beside every image; give recipe.stages.<name>.data captions.")
        textual = self.lm(batch.text_ids)
        pairing = self.pair.compared(self.pair.of_image(visual), self.pair.of_text(textual))
        none = batch.input_ids.new_zeros(0)
        logits = textual.pooled.new_zeros(0, 1)
        return Outputs(logits, targets=none, seen=Seen(visual), pairing=pairing, textual=textual)

    # -- what a trained pair is asked ----------------------------------------------------------------------------

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """(I, E) unit vectors of pictures of any size."""
        assert self.encoder is not None
        device = self.pair.log_scale.device
        pixels = torch.stack([torch.from_numpy(self.encoder.preprocess(image)) for image in images])
        return self.pair.of_image(self.cache(self.encoder, pixels.to(device)))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(T, E) unit vectors of texts, cut off at the tower's context."""
        return self.pair.of_text(self.lm(self.lm.tokenise(texts).to(self.pair.log_scale.device)))

    @torch.no_grad()
    def judge(self, pixels: Tensor, texts: Sequence[str]) -> Pairing:
        """What it makes of the pixels (I, 3, H, W) uint8 that another model is shown, and of texts, as a teacher.

        Pixels of another size than its own are resized, smoothly and without cropping.
        """
        assert self.encoder is not None
        size = self.encoder.preprocess.height, self.encoder.preprocess.width
        if pixels.shape[-2:] != size:
            resized = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
            pixels = resized.round().clamp(0, 255).to(torch.uint8)
        return self.pair.compared(self.pair.of_image(self.encoder(pixels)), self.embed_texts(texts))

    # -- parts ---------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, NamedParameters]:
        """The towers, what objectives and adapters brought, and the head."""
        return {**super().parts(), "pair": [(f"pair.{n}", p) for n, p in named(self.pair)]}

    def sourced(self) -> dict[str, str]:
        """Part -> sha256 of the checkpoint it was loaded from."""
        own = isinstance(self.pair, PooledHead) and self.lm.head is not None
        head = {"pair": self.lm.source} if own and self.lm.source is not None else {}
        return {**super().sourced(), **head}


def _pooled(encoder: Encoder, lm: PairText, width: int | None, scale: float, bias: float | None) -> PooledHead:
    """The head of the text tower's checkpoint, or a new one."""
    widths = encoder.pooled_width, lm.width
    return PooledHead(*widths, width, scale, bias) if lm.head is None else PooledHead.loaded(lm.head, *widths)
