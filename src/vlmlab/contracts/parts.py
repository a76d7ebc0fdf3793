"""The parts of a model as their users see them: what an encoder, a connector and a fusion must offer.

Shapes: I images, N features of an image, M visual tokens of an image, D the LM's width, B rows, S positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from vlmlab.contracts.sample import Image
from vlmlab.contracts.tensors import Batch, Layout, Visual


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


class FeatureCache(ABC):
    """Stands between pixels and an encoder and may know an image already: ``(encoder, (I, 3, H, W)) -> Visual``."""

    @abstractmethod
    def __call__(self, encoder: Encoder, pixels: Tensor) -> Visual:
        """What the encoder sees, from the cache or from the encoder; without gradient where it was kept."""

    @abstractmethod
    def serving(self, model: nn.Module, say: Callable[[str], None]) -> AbstractContextManager[dict[str, Any]]:
        """Stands before ``model.encoder`` while this is open, unless that trains.

        Args:
            model: one with an `encoder` that it looks through its attribute `cache`.
            say: takes a line of what the cache does and did.

        Returns:
            A context; on leaving it its value has been filled with {"cache": counts} where the cache was used.
        """


class Connector(nn.Module, ABC):
    """``(Visual, instruction or None) -> (I, M, D)``; its keywords `in_width` and `out_width` come from the towers.

    Attributes:
        reads_instruction: whether it wants what the user says to each image, ``Batch.instructions()``. Such a class has
            a keyword `vocab_size`, a null key of its YAML that the composition fills with the size of the LM's
            embedding table.
    """

    reads_instruction: bool = False

    @abstractmethod
    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """M for a feature grid of `hw` rows and columns."""

    @abstractmethod
    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """The visual tokens; the instruction is (I, T) token ids, -1 behind the last."""


Sight = Literal["apart", "together", "causal"]
"""Who sees whom among queries and words: each their own kind; all; words also queries, and no later word."""


@runtime_checkable
class QueryText(Protocol):
    """A connector whose queries can be read together with a text, for objectives that compare the two.

    Attributes:
        reads_text: whether it has its text side.
        text_shape: number of queries M, width W of a state, number of words.
    """

    reads_text: bool

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """M, W and the number of words."""
        ...

    def joint(self, visual: Visual, ids: Tensor, first: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """Features, words (I, T) and the embedding (W,) of what stands before them -> (I, M, W) and (I, 1 + T, W)."""
        ...

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., W) -> (..., number of words)."""
        ...


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


class Adapter(ABC):
    """Wraps towers in small trainable parts.

    Attributes:
        parts: names of the towers it wraps.
        name: of the adapter; several share one tower under names of their own.
        lr: learning rate wherever a stage trains such a part; None takes the stage's.
        prompt_tokens: positions it wants before every sample; the collator writes the ids -1, -2, ... there.
        alone: whether it changes the tower's own weights, so that no second adapter can share them.
    """

    parts: tuple[str, ...]
    name: str = "default"
    lr: float | None = None
    prompt_tokens: int = 0
    alone: bool = False

    @abstractmethod
    def wrap(self, part: Any) -> Any:
        """The tower with its adapter; equal to the tower before the first update."""

    def ratios(self, part: nn.Module) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of `lr`, with that multiple."""
        return {}


class LayoutReader(ABC):
    """A direct child of the LM's model that wants to know what the model is about to read."""

    @abstractmethod
    def read(self, layout: Layout) -> None:
        """The layout of the forward pass or of the prompts of the generation that follows."""
