"""``PairModule``: images and texts meet in one space by two towers (``PairedTowers``), or by one and a frozen one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Geometry, PairHead
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch, Images, Layout, Outputs, Pairing
from vlmlab.data.module import Window
from vlmlab.engine import rng
from vlmlab.engine.stage import StageModule
from vlmlab.model.build import build_pair
from vlmlab.model.pair import PairedTowers


class PairModule(StageModule):
    """Image-text pairs, each compared with all others of the step.

    With several micro-batches (`accumulate`) the loss is still over all of them together, by a gradient cache
    (GradCache, arXiv 2101.06983, section 3): embeddings without a graph, the loss and its gradient in them, then each
    micro-batch again with its share of that gradient, under the same random numbers. The gradients are those of one
    batch; it costs a second forward pass and the memory of a single micro-batch.
    """

    prompt = "plain"
    caches = True

    @staticmethod
    def build(cfg: DictConfig) -> nn.Module:
        """``PairedTowers`` of ``encoder`` and ``text_tower``."""
        return build_pair(cfg)

    @staticmethod
    def collator(cfg: DictConfig, model: nn.Module, prompt: str) -> Callable[[list[Sample]], Batch]:
        """Samples of as many images as turns to a micro-batch."""
        assert isinstance(model, PairedTowers) and model.encoder is not None
        return PairCollator(model.encoder.preprocess, model.lm.tokenise, model.lm.pad)

    def _backward(self, window: Window) -> Tensor:
        """As for every stage; several micro-batches through the cache."""
        if len(window.batches) == 1:
            return super()._backward(window)
        self._samples = [sample for batch in window.batches for row in batch.sample_ids for sample in row]
        states: list[dict[str, Any]] = []
        found: list[Pairing] = []
        for batch in window.batches:
            states.append(rng.state())
            with torch.no_grad():
                found.append(self._paired(batch))
        after = rng.state()
        image, text = torch.cat([p.image for p in found]), torch.cat([p.text for p in found])
        head: PairHead = self.model.pair  # type: ignore[assignment]
        total, terms = self._weighed(
            _alone(head.compared(image.requires_grad_(), text.requires_grad_())), window.batches[0]
        )
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(total)
        self._spread(window, states, image, text)
        rng.restore(after)
        sums = torch.stack([total.detach().double(), *(value.double() for value in terms.values())])
        self._finish_report(["loss", *terms], sums[None], window)
        self._sum_gradients()
        self._moving = True
        return torch.tensor(self.report.loss)

    def _paired(self, batch: Batch) -> Pairing:
        pairing: Pairing = self.model(batch, in_step=True).pairing
        return pairing

    def _spread(self, window: Window, states: Sequence[dict[str, Any]], image: Tensor, text: Tensor) -> None:
        """Every micro-batch again, with its rows of the gradient in the embeddings (B, E) of all."""
        start = 0
        for batch, state in zip(window.batches, states, strict=True):
            self._batch = batch
            rng.restore(state)
            again = self._paired(batch)
            rows = slice(start, start + len(again.image))
            start = rows.stop
            share = [(again.image, image), (again.text, text)]
            kept = [(out * of.grad[rows]).sum() for out, of in share if out.requires_grad and of.grad is not None]
            if kept:
                with torch.autocast(self.device.type, enabled=False):
                    torch.stack(kept).sum().backward()  # fp16's scale is in the gradient already


def _alone(pairing: Pairing) -> Outputs:
    """Outputs of nothing but embeddings."""
    none = pairing.image.new_zeros(0)
    return Outputs(none[:, None], none.long(), pairing=pairing)


class PairCollator:
    """Samples whose turns each tell one of their images -> a batch with a row a pair.

    A row's text is the turn's answer in the text tower's tokens.

    Args:
        resize: the vision tower's geometry.
        tokenise: the text tower's.
        pad: what is in ``input_ids`` after a text.
    """

    def __init__(self, resize: Geometry, tokenise: Callable[[Sequence[str]], Tensor], pad: int) -> None:
        self.resize, self.tokenise, self.pad = resize, tokenise, pad

    def __call__(self, samples: list[Sample]) -> Batch:
        """One row a pair: the first image of a sample with its first turn, the second with the second.

        Raises:
            UserError: a sample has no images, or not as many as turns.
        """
        if bad := next((s for s in samples if not s.images or len(s.images) != len(s.turns)), None):
            raise UserError(f"PairModule wants one text for each image, unlike {bad.id}; use other data.")
        images = [image for sample in samples for image in sample.images]
        names = [name for sample in samples for name in _names(sample)]
        texts = tuple(turn.answer for sample in samples for turn in sample.turns)
        asked = self.tokenise(texts)
        ids = torch.where(asked < 0, self.pad, asked)
        return Batch(
            pixels=torch.stack([torch.from_numpy(self.resize(image)) for image in images]),
            input_ids=ids,
            labels=torch.full_like(ids, -100),
            layout=Layout.of_text(asked >= 0),
            images=_one_a_row([image.shape[:2] for image in images], names),
            sample_ids=[[sample.id] for sample in samples for _ in sample.images],
            text_ids=asked,
            texts=texts,
        )


def _names(sample: Sample) -> Sequence[str]:
    """Of its images; where they have none, the sample's own."""
    return sample.image_ids or [sample.id] * len(sample.images)


def _one_a_row(sides: Sequence[tuple[int, ...]], names: list[str]) -> Images:
    """The images, each before the first token of its own row, where none takes a position."""
    rows, none = torch.arange(len(sides)), torch.zeros(len(sides), dtype=torch.long)
    return Images(rows, none, none, none, none, none, torch.tensor(sides), none, names)
