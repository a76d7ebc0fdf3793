"""``PairModule``: images and texts meet in one space by two towers (``PairedTowers``), or by one and a frozen one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Geometry
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch, Images, Layout
from vlmlab.engine.stage import StageModule
from vlmlab.model.build import build_pair
from vlmlab.model.pair import PairedTowers


class PairModule(StageModule):
    """Image-text pairs; one micro-batch per step and rank, since every sample is compared with all others."""

    prompt = "plain"

    @staticmethod
    def build(cfg: DictConfig) -> nn.Module:
        """``PairedTowers`` of ``encoder`` and ``text_tower``."""
        return build_pair(cfg)

    @staticmethod
    def collator(cfg: DictConfig, model: nn.Module, prompt: str) -> Callable[[list[Sample]], Batch]:
        """Samples of as many images as turns to a micro-batch."""
        assert isinstance(model, PairedTowers) and model.encoder is not None
        return PairCollator(model.encoder.preprocess, model.lm.tokenise, model.lm.pad)


class PairCollator:
    """Samples whose turns each tell one of their images -> a batch with a row a pair.

    A row's text is the turn's answer in the text tower's tokens.

    Args:
        resize: the vision tower's geometry.
        tokenise: the text tower's.
        pad: what stands in ``input_ids`` behind a text.
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
        asked = self.tokenise([turn.answer for sample in samples for turn in sample.turns])
        ids = torch.where(asked < 0, self.pad, asked)
        return Batch(
            pixels=torch.stack([torch.from_numpy(self.resize(image)) for image in images]),
            input_ids=ids,
            labels=torch.full_like(ids, -100),
            layout=Layout.of_text(asked >= 0),
            images=_one_a_row([image.shape[:2] for image in images], names),
            sample_ids=[[sample.id] for sample in samples for _ in sample.images],
            asked=asked,
        )


def _names(sample: Sample) -> Sequence[str]:
    """Of its images; where they have none, the sample's own."""
    return sample.image_ids or [sample.id] * len(sample.images)


def _one_a_row(sides: Sequence[tuple[int, ...]], names: list[str]) -> Images:
    """The images, each before the first token of its own row, where none takes a position."""
    rows, none = torch.arange(len(sides)), torch.zeros(len(sides), dtype=torch.long)
    return Images(rows, none, none, none, none, none, torch.tensor(sides), none, names)
