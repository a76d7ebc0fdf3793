"""The parts of a model and of a run as their users see them: what every plug-in must offer.

Shapes: I images, N features of an image, M visual tokens of an image, D the LM's width, B rows, S positions, Q queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image
from vlmlab.contracts.tensors import Batch, Images, Layout, Memory, Outputs, Pairing, Seen, Textual, Visual

NamedParameters = list[tuple[str, nn.Parameter]]


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
        has_tower: whether layers compute its features, which are worth keeping on disk and can hold an adapter.
        one_tower: whether it is a single transformers tower.
        has_text: whether it can have a text tower; not every family of towers does.
    """

    tower: nn.Module
    width: int
    pooled_width: int
    preprocess: Geometry
    source: str | None
    has_tower: ClassVar[bool] = True
    one_tower: ClassVar[bool] = True
    has_text: ClassVar[bool] = False

    @property
    @abstractmethod
    def hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid of one image."""

    @property
    def widths(self) -> list[int]:
        """Widths of the grids that it returns, in their order; `width` is their sum."""
        return [self.width]

    @abstractmethod
    def forward(self, pixels: Tensor) -> Visual:
        """What the tower sees."""

    @abstractmethod
    def trainable(self) -> NamedParameters:
        """The named parameters that the features depend on."""

    def text_tower(self) -> TextTower:
        """The text tower that this encoder's vision tower was trained with, with its weights, frozen.

        Raises:
            UserError: there is none.
        """
        raise UserError(f"{type(self).__name__} has no text tower; use a CLIP or SigLIP checkpoint of both towers.")


class TextTower(nn.Module, ABC):
    """A frozen text encoder: token ids ``(I, T)``, -1 after the last -> states ``(I, T, width)``.

    Attributes:
        width: of a state.
        context: T, the same for every text: longer texts are cut off, shorter ones padded.
        tokenise: texts -> (I, T) ids, -1 after the last token. A function by itself and no method, since processes
            that read data take it along, and should not take the weights.
        source: sha256 of the weights it was loaded from; None if they are new.
    """

    width: int
    context: int
    tokenise: Callable[[Sequence[str]], Tensor]
    source: str | None

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """(I, T, width); padding has states as well, as the tower computes them."""


@dataclass(frozen=True)
class PairWeights:
    """What a checkpoint of two towers has after them.

    Attributes:
        image: (E, Wi) map of the pooled image, None where that is compared as it is.
        text: (E, Wt) map of the pooled text, likewise.
        log_scale: scalar; similarities are multiplied by its exponential.
        bias: scalar that is added to them, None where there is none.
    """

    image: Tensor | None
    text: Tensor | None
    log_scale: Tensor
    bias: Tensor | None


class PairText(nn.Module, ABC):
    """The text tower of a pair, which may train: token ids ``(B, T)``, -1 after the last -> ``Textual``.

    Attributes:
        model: the transformers tower inside.
        width: of the pooled text.
        state_width: of a state.
        context: T, the same for every text: longer texts are cut off, shorter ones padded.
        pad: the id that takes the place of -1.
        tokenise: texts -> (B, T) ids, -1 after the last token; a function by itself, see ``TextTower``.
        source: sha256 of the weights it was loaded from; None if they are new.
        head: what its checkpoint has after both towers; None: the pair's head is new.
    """

    model: nn.Module
    width: int
    state_width: int
    context: int
    pad: int
    tokenise: Callable[[Sequence[str]], Tensor]
    source: str | None
    head: PairWeights | None

    @abstractmethod
    def forward(self, ids: Tensor) -> Textual:
        """What the tower reads."""

    def cut_pooling(self) -> None:
        """Remove the map after the pooled state, where a family has one: the head reads states alone."""
        if hasattr(self.model, "head"):
            self.model.head = nn.Identity()


class PairHead(nn.Module, ABC):
    """What compares the two towers of a pair: ``Visual`` and ``Textual`` -> unit vectors (B, E) of one space.

    Attributes:
        log_scale: scalar; similarities are multiplied by its exponential.
        bias: scalar that is added to them, None where there is none.
        pooled: whether it reads the towers' pooled outputs; otherwise their pooling is cut off, which nothing trains.
    """

    pooled: ClassVar[bool] = True
    log_scale: nn.Parameter
    bias: nn.Parameter | None

    def attach(self, image_width: int, text_width: int) -> None:
        """Make the weights that depend on the widths of an image feature and of a text state; called once."""

    @abstractmethod
    def of_image(self, visual: Visual) -> Tensor:
        """(B, E), of unit length."""

    @abstractmethod
    def of_text(self, textual: Textual) -> Tensor:
        """(B, E), of unit length."""

    def compared(self, image: Tensor, text: Tensor) -> Pairing:
        """Unit vectors (B, E) with the temperature and bias that compare them."""
        bias = torch.zeros_like(self.log_scale) if self.bias is None else self.bias
        return Pairing(image, text, self.log_scale, bias)


class FeatureCache(ABC):
    """Sits between pixels and an encoder and may know an image already: ``(encoder, (I, 3, H, W)) -> Visual``.

    Attributes:
        keeps: whether it keeps features at all.
    """

    keeps: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, encoder: Encoder, pixels: Tensor) -> Visual:
        """What the encoder sees, from the cache or from the encoder; without gradient where it was kept."""

    @abstractmethod
    def serving(self, model: nn.Module, say: Callable[[str], None]) -> AbstractContextManager[dict[str, Any]]:
        """Serves ``model.encoder`` while this is open, unless that trains.

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

    def grid(self, hw: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns in which its M tokens are in the picture, row by row; None where they have no place."""
        return None

    @property
    def width(self) -> int | None:
        """Width of its tokens where that is not the LM's; None: the LM's."""
        return None

    @abstractmethod
    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """The visual tokens; the instruction is (I, T) token ids, -1 after the last."""


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
        """Features, words (I, T) and the embedding (W,) of what is before them -> (I, M, W) and (I, 1 + T, W)."""
        ...

    def word_logits(self, states: Tensor) -> Tensor:
        """(..., W) -> (..., number of words)."""
        ...


class Mask(Protocol):
    """Who may look at whom: ``(layout, q) -> (B, Q, S)`` bool for the query positions ``q (Q,)``; never of labels.

    A class may declare, as constants of its body: `shows_prompt`, under it a word of the prompt depends on later ones,
    so that no stage can learn the prompt; `leaks`, it breaks the leak rule on purpose and nothing can be trained;
    `visual_alone`, a visual position sees itself alone, so that no weight of its query can learn; `rule`, what it
    allows within one sample as an expression of plain torch (``vlmlab.published.mask_code``), by which it is exported
    with a model.
    """

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """Who may look at whom."""
        ...


class MemoryMask(Protocol):
    """Which images a position sees in the memory of a fusion: ``(layout, images, q) -> (B, Q, I)`` bool.

    Never one of another packed sample, nor of a later turn.
    """

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        """Which images the positions ``q (Q,)`` see."""
        ...


class Fusion(nn.Module, ABC):
    """How vision acts on the LM, at one or more of three moments, each of which does nothing unless overridden.

    ``features`` changes what the encoder saw before the connector reads it, ``embed`` puts tokens into the sequence,
    ``memory`` hands something to the blocks that ``attach`` has put at the ports of the LM's layers. They are called in
    this order for every batch, also for one without an image, and keep nothing from one batch to the next.

    A class may declare, as a constant of its body, `visual_queries`: weights of its own make the queries of visual
    positions, unless its key `sublayers` is "mlp" or its key `untied` lacks "attention".

    Attributes:
        reads: what it is given: the connector's tokens, or nothing at all.
        in_sequence: whether visual tokens take positions in the LM's sequence.
        starts_as: what the composition equals before its first update.
        reads_text: whether it reads what the user says through the encoder's paired text tower.
        has_weights: whether it has any of its own.
        waiting: ends of the names of its weights that have no gradient before the first update, since what they are
            multiplied by is zero; all others have one, and from the second step on all have.
        key: names its memory, and its blocks, among those of several fusions.
        has_experts: whether its blocks note how they route tokens (`router`), which an objective may balance.
        regroups: whether it sorts positions by what computes them, which depends on their values: equal numbers are
            then equal up to rounding, and its compiled layers have breaks.
    """

    reads: ClassVar[Literal["tokens", "nothing"]]
    in_sequence: bool
    starts_as: str
    reads_text: bool = False
    has_weights: ClassVar[bool] = True
    waiting: tuple[str, ...] = ()
    key: str = "fusion"
    has_experts: ClassVar[bool] = False
    regroups: bool = False

    def tokens_per_image(self, tokens: int) -> int:
        """Positions in the sequence for an image of `tokens` visual tokens."""
        return 0

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the weights that depend on the model and put blocks at the ports of its LM; called once.

        Raises:
            UserError: this composition has not what it needs.
        """

    def features(self, visual: Visual, batch: Batch, text: Tensor | None) -> Visual:
        """The features (I, N, Dv) that the connector is to read.

        Args:
            visual: what the encoder saw.
            batch: the batch.
            text: (I, T, Dt) states of the text tower for ``batch.text_ids``; None unless `reads_text`.
        """
        return visual

    def read_by_connector(self, grids: int) -> int:
        """How many of the encoder's `grids` the connector reads: so many of the last ones."""
        return grids

    def embed(self, seen: Seen, embeds: Tensor, batch: Batch) -> Tensor:
        """(B, S, D) embeddings of the text -> (B, S, D)."""
        return embeds

    def memory(self, seen: Seen, batch: Batch) -> Memory | None:
        """What all blocks at the ports read, put there with this fusion's key; None where there are none."""
        return None

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """By key what blocks read: ``memory`` under this fusion's key, or each block's own under that and a number."""
        memory = self.memory(seen, batch)
        return {} if memory is None else {self.key: memory}

    def waits(self, name: str) -> bool:
        """Whether its weight of this name has no gradient before the first update."""
        return name.endswith(self.waiting)

    def replaced(self) -> Sequence[nn.Module]:
        """Modules of the LM that are computed no more, so that nothing of them can train."""
        return ()

    def undecayed(self) -> Sequence[Tensor]:
        """Matrices that weight decay would pull away from where they start, and which therefore have none."""
        return ()


class VisionLanguageModel(Protocol):
    """What fusions, objectives and stages ask of a model (``VLM``, ``DualEncoder``).

    Attributes:
        encoder: None where the fusion reads no vision.
        connector: likewise.
        fusion: how vision acts on the LM.
        lm: the language model.
        text: the encoder's paired text tower, where the fusion reads it.
        mask: who may look at whom.
        tokens_per_image: positions that an image takes in the sequence.
        token_width: width of the connector's tokens.
    """

    encoder: Any
    connector: Any
    fusion: Any
    lm: Any
    text: Any
    mask: Any

    @property
    def tokens_per_image(self) -> int:
        """Positions in the sequence for an image."""
        ...

    @property
    def token_width(self) -> int:
        """Width of the connector's tokens."""
        ...

    def parts(self) -> dict[str, NamedParameters]:
        """Part -> its parameters under their state-dict names; "<part>.base" is what an adapter wraps."""
        ...

    def sourced(self) -> dict[str, str]:
        """Part -> sha256 of the tower it was loaded from; a new part is absent."""
        ...

    def set_mask(self, mask: Mask) -> None:
        """The mask of the stage that begins."""
        ...

    def set_adapter(self, adapter: Any) -> None:
        """Wrap the parts it names, once."""
        ...


class Objective(Protocol):
    """A loss: ``(outputs, batch) -> {name: (sum, count)}``.

    Attributes:
        weight: factor in the total loss.
        per_micro_batch: the count is only known after the forward pass, since samples are compared with each other;
            such an objective gathers over ranks itself, with gradient, and refuses accumulation.

    An objective that counts anything else than supervised tokens, and is not `per_micro_batch`, also has
    ``counts(batch) -> {name: count}``, the same names for every batch, known before the forward pass.

    An objective with weights of its own is an ``nn.Module`` and has ``attach(model)``, which makes them. They are the
    model's part "objective" during the stage, trained at ``train.objective``, and dropped when the next stage begins.

    A class may declare what it needs, as constants of its body: `pairs`, the pairs of embeddings that ``PairModule``
    and ``ContrastiveModule`` make; `of_embeddings`, these and nothing else, so that their gradients can be cached
    (``PairModule`` with `accumulate`); `reads_images`, images; `reads_sequence`, visual tokens in the LM's sequence;
    `reads_text_side`, a connector's text side (``QueryText``); `reads_experts`, a fusion's experts;
    and `reaches_lm`, False where its gradient does not reach the LM's layers.
    """

    weight: float
    per_micro_batch: bool

    def __call__(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Any]]:
        """(sum, count) of every term."""
        ...


class Adapter(ABC):
    """Wraps parts of a model, towers or what aligns them, in small trainable ones.

    Attributes:
        parts: names of the parts it wraps.
        name: of the adapter; several share one tower under names of their own.
        lr: learning rate wherever a stage trains such a part; None takes the stage's.
        prompt_tokens: positions it wants before every sample; the collator writes the ids -1, -2, ... there.
        alone: whether it changes the tower's own weights, so that no second adapter can share them.
        lm_only: whether the LM alone can have it.
        towers_only: whether it wraps transformers towers alone, the LM or the encoder.
        one_tower: whether it wraps an encoder only where that is a single transformers tower.
        in_layers: whether its weights lie in the tower's layers.
        starts_equal: whether a part with it equals the part without it before the first update.
    """

    parts: tuple[str, ...]
    name: str = "default"
    lr: float | None = None
    prompt_tokens: int = 0
    alone: bool = False
    starts_equal: bool = True
    lm_only: ClassVar[bool] = False
    towers_only: ClassVar[bool] = False
    one_tower: ClassVar[bool] = False
    in_layers: ClassVar[bool] = True

    @abstractmethod
    def wrap(self, part: Any) -> Any:
        """The part with its adapter; equal to the part before the first update, if it says so (`starts_equal`)."""

    def ratios(self, part: nn.Module) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of `lr`, with that multiple."""
        return {}
