"""``mma``: LaVIN's mixture-of-modality adapter (arXiv 2305.15023): two branches, mixed by whether there is an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.adapter.base import Layer, check_name, insert
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Adapter, LayoutReader
from vlmlab.contracts.tensors import Layout

GROUPS = 2
"""Of the up-projections."""


class MmaAdapter(Adapter):
    """x <- x + s (w_0 B A x + w_1 D A x) on the normalised input of every attention, w = softmax(W_r e / tau).

    e is a learnt vector for each of the two modalities, text alone and with an image; a sample's is the same in all
    its positions. In LaVIN e is a token in front of the sequence that no other may look at, and the router reads its
    state in each layer; here the router reads e itself, so that nothing enters the sequence and packed samples each
    have their own. In the encoder every input is an image.

    Args:
        parts: towers to wrap, of ``lm`` and ``encoder``.
        width: of the branches, a multiple of 2.
        temperature: tau.
        scale: s.
        dropout: behind A.
        targets: ends of the names of the attention modules; names that a tower lacks are passed over.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        name: of the adapter, where several share one tower.
    """

    one_tower = True

    def __init__(
        self,
        parts: Sequence[str] = ("lm",),
        width: int = 8,
        temperature: float = 10.0,
        scale: float = 1.0,
        dropout: float = 0.1,
        targets: Sequence[str] = ("self_attn", "attention"),
        lr: float | None = None,
        name: str = "default",
    ) -> None:
        if width < GROUPS or width % GROUPS:
            raise UserError(f"adapter.width={width} does not split into {GROUPS} groups; give a multiple of {GROUPS}.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.width, self.temperature, self.scale, self.dropout = width, temperature, scale, dropout
        self.targets = targets

    def wrap(self, part: Any) -> nn.Module:
        """The tower with its attention modules wrapped in place; equal to it before the first update (B = D = 0)."""
        features = int(part.config.hidden_size)
        if features % GROUPS:
            raise UserError(f"mma needs a tower of even width and this one has {features}; use another adapter.")
        modality = nn.Embedding(2, features)

        def new(base: nn.Module) -> nn.Module:
            return Mixture(modality, self.width, self.temperature, self.scale, self.dropout)

        insert(part, self.targets, self.name, MmaLayer, new)
        if part.main_input_name == "input_ids" and not any(isinstance(m, Modality) for m in part.children()):
            part.modality = Modality()
            part.base_model.register_forward_pre_hook(part.modality.announce, with_kwargs=True)
        return part


class Mixture(nn.Module):
    """Both branches and the router of one attention module; the modality vectors are shared by all of a tower.

    Parameters: A D W + W, B and D together D W + 2 D, router 2 D + 2, modality vectors 2 D in all.
    """

    def __init__(self, modality: nn.Embedding, width: int, temperature: float, scale: float, dropout: float) -> None:
        super().__init__()
        features = modality.embedding_dim
        self.modality = modality
        self.router = nn.Linear(features, 2)
        self.down = nn.Linear(features, width)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.ModuleList(nn.Conv1d(width, features, 1, groups=GROUPS) for _ in range(2))
        self.temperature, self.scale = temperature, scale
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for branch in self.up:
            for parameter in branch.parameters():
                nn.init.zeros_(parameter)

    def weights(self) -> Tensor:
        """(2, 2): for text and for image, the shares of the two branches."""
        return (self.router(self.modality.weight) / self.temperature).float().softmax(-1)

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        """(B, S, D) and the modality of each position, (B, S) of 0 and 1 -> what is added to x, (B, S, D)."""
        shares = self.weights()[modality].to(x.dtype)  # (B, S, 2)
        inner = self.dropout(self.down(x.to(self.down.weight.dtype))).transpose(1, 2)  # (B, W, S)
        branches = [up(inner).transpose(1, 2).to(x.dtype) for up in self.up]  # each (B, S, D)
        mixed = shares[..., :1] * branches[0] + shares[..., 1:] * branches[1]
        return self.scale * mixed


class MmaLayer(Layer):
    """An attention module whose input is adapted."""

    def forward(self, hidden_states: Tensor, *args: Any, modality: Tensor | None = None, **kwargs: Any) -> Any:
        """The attention's outputs; without `modality` (an encoder) every position is an image's."""
        if self.acting is not None:
            if modality is None:
                modality = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
            hidden_states = hidden_states + self.acting(hidden_states, modality)
        return self.base_layer(hidden_states, *args, **kwargs)


class Modality(nn.Module, LayoutReader):
    """Tells the attention modules of an LM, by a keyword argument, which samples have an image.

    As an argument and not a state, so that a layer computed again in the backward pass reads the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def read(self, layout: Layout) -> None:
        """What comes next: a forward pass over this layout, or a generation from it."""
        together = layout.segment[:, :, None] == layout.segment[:, None, :]  # (B, S, S)
        self.seen = (together & layout.visual[:, None, :]).any(-1).long()  # (B, S)

    def announce(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A forward pre-hook: adds ``modality``. Generated tokens belong to their row's last sample."""
        given = next(v for v in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if v is not None)
        rows, length = given.shape[:2]
        if self.seen is None:  # the LM is used without a layout: text
            seen = torch.zeros(1, 1, dtype=torch.long, device=given.device)
        else:
            seen = self.seen if length == self.seen.shape[1] else self.seen[:, -1:]
        seen = seen.repeat_interleave(rows // len(seen), 0).expand(rows, length)  # beams repeat their row
        return args, kwargs | {"modality": seen}
