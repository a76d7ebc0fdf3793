"""The parts of a model as their users see them: what an encoder, a connector and a fusion must offer.

Shapes: I images, N features of an image, M visual tokens of an image, D the LM's width, B rows, S positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from vlmlab.contracts.sample import Image
from vlmlab.contracts.tensors import Batch, Visual


class Geometry(Protocol):
    """How a tower wants its pixels: ``(H, W, 3)`` of any size -> ``(3, height, width)``, uint8."""

    @property
    def height(self) -> int:
        """Rows of pixels."""
        ...

    @property
    def width(self) -> int:
        """Columns of pixels."""
        ...

    def __call__(self, image: Image) -> Image:
        """Resize and crop."""
        ...


class Encoder(nn.Module, ABC):
    """Pixels ``(I, 3, H, W)`` uint8 -> ``Visual``.

    Attributes:
        tower: the pretrained model inside.
        width: of a feature, all tapped layers side by side.
        pooled_width: of the pooled feature, where there is one.
        preprocess: the geometry that the collator brings images into.
        source: sha256 of the weights it was loaded from; None if they are new.
    """

    tower: nn.Module
    width: int
    pooled_width: int
    preprocess: Geometry
    source: str | None

    @property
    @abstractmethod
    def hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid of one image."""

    @abstractmethod
    def forward(self, pixels: Tensor) -> Visual:
        """What the tower sees."""

    @abstractmethod
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters that the features depend on."""


class Connector(nn.Module, ABC):
    """``(Visual, instruction or None) -> (I, M, D)``; its keywords `in_width` and `out_width` come from the towers."""

    @abstractmethod
    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """M for a feature grid of `hw` rows and columns."""

    @abstractmethod
    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """The visual tokens."""


class Fusion(nn.Module, ABC):
    """How vision acts on the LM.

    Attributes:
        reads: what it is given: the connector's tokens, the encoder's features, or nothing at all.
        in_sequence: whether visual tokens take positions in the LM's sequence.
        starts_as: what the composition equals before its first update.
    """

    reads: ClassVar[Literal["tokens", "features", "nothing"]]
    in_sequence: ClassVar[bool]
    starts_as: ClassVar[Literal["text_only", "concat", "nothing"]]

    @abstractmethod
    def tokens_per_image(self, tokens: int) -> int:
        """Positions in the sequence for an image of `tokens` visual tokens."""

    @abstractmethod
    def attach(self, lm: nn.Module) -> None:
        """Add to the LM what this fusion needs inside it."""

    @abstractmethod
    def forward(self, tokens: Tensor, embeds: Tensor, batch: Batch) -> Tensor:
        """(I, M, D) visual tokens and (B, S, D) embeddings -> (B, S, D)."""


class Adapter(Protocol):
    """Wraps towers in small trainable parts.

    Attributes:
        parts: names of the towers it wraps.
        lr: learning rate wherever a stage trains such a part; None takes the stage's.
    """

    parts: tuple[str, ...]
    lr: float | None

    def wrap(self, part: Any) -> Any:
        """The tower with its adapter; equal to the tower before the first update."""
