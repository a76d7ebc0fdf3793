"""``itc``, ``itm``, ``itg``, ``blip2``: images and texts meet in the Q-Former (arXiv 2301.12597 section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import QueryText
from vlmlab.contracts.tensors import Batch, Outputs, Visual
from vlmlab.contracts.values import Drop, NotNegative, Positive, Width
from vlmlab.objective.base import gathered, symmetric

Terms = dict[str, tuple[Tensor, Tensor]]


class QueryTextAlignment(nn.Module):
    """Contrast (itc), matching (itm) and generation (itg) of an image's queries and its caption, each with its mask.

    itc: s(I, T) = max over queries k of cos(Wv z_k, Wt t) / temperature, both sides apart, cross-entropy both ways.
    itm: is this the image's caption? Mean over queries of a linear layer, all see all; negatives of the same
        micro-batch are drawn by softmax(s) where itc is on, evenly otherwise, never with the same image.
    itg: the caption's next word from all queries and the words before.

    The text begins with a learned token of its own: one for itc and itm, one for itg. Its weights are the part
    ``objective`` of a stage; the connector's last layer is not in these losses and gets a zero gradient.

    Args:
        weight: factor of this objective in the total loss.
        itc, itm, itg: factor of each term; 0 leaves it out, with its weights.
        width: of the space of itc (256 in the paper).
        temperature: of itc at first; it is learned (0.07 in the released code).
        smoothing: label smoothing of itc (0.1 in the released code).
    """

    per_micro_batch = True
    reads_images = True
    reads_text_side = True
    reaches_lm = False

    def __init__(
        self,
        weight: NotNegative = 1.0,
        itc: NotNegative = 1.0,
        itm: NotNegative = 1.0,
        itg: NotNegative = 1.0,
        width: Width = 256,
        temperature: Positive = 0.07,
        smoothing: Drop = 0.1,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.factors = {name: factor for name, factor in (("itc", itc), ("itm", itm), ("itg", itg)) if factor}
        if not self.factors:
            raise UserError("objective.itc, itm and itg are all 0; give at least one a factor.")
        self.width = width
        self.initial = temperature
        self.smoothing = smoothing

    def attach(self, model: Any) -> None:
        """Make the weights that fit this model's connector.

        Raises:
            UserError: the connector has no queries with a text side.
        """
        connector = model.connector
        if not isinstance(connector, QueryText) or not connector.reads_text:
            raise UserError(
                "objective=itc, itm, itg and blip2 compare queries with texts; use connector=qformer with "
                "connector.text=true, or connector=instruct_qformer."
            )
        self.joint, self.word_logits = connector.joint, connector.word_logits  # methods: the connector stays a part
        self.queries, width, words = connector.text_shape
        if "itc" in self.factors:
            self.image = nn.Linear(width, self.width)
            self.text = nn.Linear(width, self.width)
            self.temperature = nn.Parameter(torch.tensor(self.initial))
        if "itm" in self.factors:
            self.match = nn.Linear(width, 2)
        if "itc" in self.factors or "itm" in self.factors:
            self.begin = nn.Parameter(torch.randn(width) * 0.02)
        if "itg" in self.factors:
            self.decode = nn.Parameter(torch.randn(width) * 0.02)
            self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
            self.word_bias = nn.Parameter(torch.zeros(words))

    def forward(self, outputs: Outputs, batch: Batch) -> Terms:
        """{"itc": (sum in nats, images), "itm": (sum, pairs), "itg": (sum, words)}.

        Raises:
            UserError: the batch has other than one image and caption a sample.
        """
        ids = batch.captions()  # (I, T)
        repeated = len(batch.image_samples().unique()) < len(ids)
        if len(ids) != len(batch.pixels) or repeated or bool((ids[:, 0] < 0).any()):
            raise UserError(
                f"objective=itc, itm and itg need one image with its caption in a sample "
                f"(samples {batch.sample_ids[0][:3]} ...); choose other data in recipe.stages.<name>.data."
            )
        found: Terms = {}
        scores = None
        if "itc" in self.factors:
            found["itc"], scores = self._contrast(outputs, ids)
        if outputs.seen.visual is None:
            zero = outputs.logits.sum() * 0.0
            return {name: found.get(name, (zero, zero.detach())) for name in self.factors}
        if "itm" in self.factors:
            found["itm"] = self._matching(outputs.seen.visual, ids, self._likeness(scores, batch, len(ids)))
        if "itg" in self.factors:
            found["itg"] = self._generation(outputs.seen.visual, ids)
        assert outputs.seen.tokens is not None
        none = 0.0 * outputs.seen.tokens.sum()  # the connector's last layer trains with its part, and has no say here
        return {name: (self.factors[name] * total + none, count) for name, (total, count) in found.items()}

    def _contrast(self, outputs: Outputs, ids: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(sum, images) of itc, and the scores (I, I) of this rank's images and texts."""
        if outputs.seen.visual is None:
            image = outputs.logits.new_zeros(0, self.queries, self.width)
            text = outputs.logits.new_zeros(0, self.width)
        else:
            queries, words = self.joint(outputs.seen.visual, ids, self.begin, "apart")
            image = F.normalize(self.image(queries).float(), dim=-1)  # (I, M, E)
            text = F.normalize(self.text(words[:, 0]).float(), dim=-1)  # (I, E)
        images, own = gathered(image)
        texts, _ = gathered(text)
        scores = torch.einsum("ime,je->ijm", images, texts).amax(-1)  # (P, P) over all ranks
        total = symmetric(scores, scores.T, self.temperature, own, self.smoothing)
        return (total, total.new_tensor(len(image))), (scores[own, own] / self.temperature).detach()

    def _likeness(self, scores: Tensor | None, batch: Batch, count: int) -> Tensor:
        """(I, I) how likely a text is drawn as an image's negative; 0 where both show the same image."""
        names = [batch.images.ids[i] for i in range(count)]
        other = torch.tensor([[a != b for b in names] for a in names], device=batch.input_ids.device)
        even = torch.zeros(count, count, device=other.device) if scores is None else scores
        return even.softmax(-1) * other

    def _matching(self, visual: Visual, ids: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, pairs): every true pair, each image with a wrong text, each text with a wrong image."""
        count = len(ids)
        everyone = torch.arange(count, device=ids.device)
        images, texts = [everyone], [everyone]
        for table, mine, wrong in ((likeness, images, texts), (likeness.T, texts, images)):
            has = table.sum(1) > 0  # a micro-batch may show one image only
            if bool(has.any()):
                mine.append(everyone[has])
                wrong.append(torch.multinomial(table[has], 1)[:, 0])
        image, text = torch.cat(images), torch.cat(texts)
        chosen = Visual([grid[image] for grid in visual.grids], None, visual.hw[image])
        queries, _ = self.joint(chosen, ids[text], self.begin, "together")
        logits = self.match(queries).float().mean(1)  # (pairs, 2)
        total = F.cross_entropy(logits, (torch.arange(len(image), device=ids.device) < count).long(), reduction="sum")
        return total, total.new_tensor(len(image))

    def _generation(self, visual: Visual, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, words): every word from those before it; the first from the decode token."""
        _, states = self.joint(visual, ids, self.decode, "causal")  # (I, 1 + T, W)
        ids = ids[:, : states.shape[1] - 1]
        chosen = self.transform(states[:, :-1][ids >= 0])  # (words, W)
        logits = self.word_logits(chosen) + self.word_bias
        total = F.cross_entropy(logits.float(), ids[ids >= 0], reduction="sum")
        return total, total.new_tensor(int((ids >= 0).sum()))
