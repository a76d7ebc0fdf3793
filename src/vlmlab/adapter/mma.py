"""``mma``: LaVIN's mixture-of-modality adapter (arXiv 2305.15023): two branches, mixed by whether there is an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmlab.adapter.base import Layer, check_name, insert
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Adapter
from vlmlab.contracts.values import Drop, Names, NotNegative, Positive, Text, Width, Wrapped
from vlmlab.lm.inside import LayerPorts, open_ports

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
        dropout: after A.
        targets: ends of the names of the attention modules; names that a tower lacks are passed over.
        lr: learning rate of the adapter wherever a stage trains the wrapped part; null takes the stage's.
        name: of the adapter, where several share one tower.
    """

    one_tower = True
    towers_only = True

    def __init__(
        self,
        parts: Wrapped = ("lm",),
        width: Width = 8,
        temperature: Positive = 10.0,
        scale: NotNegative = 1.0,
        dropout: Drop = 0.1,
        targets: Names = ("self_attn", "attention"),
        lr: NotNegative | None = None,
        name: Text = "default",
    ) -> None:
        if width < GROUPS or width % GROUPS:
            raise UserError(f"adapter.width={width} does not split into {GROUPS} groups; give a multiple of {GROUPS}.")
        self.parts = tuple(parts)
        self.name = check_name(name)
        self.lr = lr
        self.width, self.temperature, self.scale, self.dropout = width, temperature, scale, dropout
        self.targets = targets

    def wrap(self, part: Any) -> nn.Module:
        """The tower with its attention modules wrapped in place; equal to it before the first update (B = D = 0).

        Raises:
            UserError: its width is odd, it has no such module, or it is an LM of a family without ports.
        """
        features = int(part.config.hidden_size)
        if features % GROUPS:
            raise UserError(f"mma needs a tower of even width and this one has {features}; use another adapter.")
        reads = part.main_input_name == "input_ids"  # an LM: its samples have images or not
        opened = open_ports(part) if reads else []
        modality = nn.Embedding(2, features)

        def new(base: nn.Module) -> nn.Module:
            return Mixture(modality, self.width, self.temperature, self.scale, self.dropout)

        insert(part, self.targets, self.name, MmaLayer, new)
        for ports in opened:
            for module in ports.layer.modules():
                if isinstance(module, MmaLayer):
                    module.ports = ports
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
    """An attention module whose input is adapted.

    Attributes:
        ports: of the LM's layer that it is in, where it reads which samples have an image; None in an encoder.
    """

    ports: LayerPorts | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The attention's outputs."""
        if self.acting is not None:
            hidden_states = hidden_states + self.acting(hidden_states, self.modality(hidden_states))
        return self.base_layer(hidden_states, *args, **kwargs)

    def modality(self, states: Tensor) -> Tensor:
        """(B, S) of 0 and 1: whether there is an image; in an LM that is used by itself there is none."""
        if self.ports is None:
            return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        if self.ports.now is None:
            return torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        return self.ports.now.with_image.long()
