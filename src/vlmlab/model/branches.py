"""The rows that trees stand for, one a question, for generation: what all questions share is computed once.

A tree's row is never decoded as it is. What its questions share goes through the LM once and leaves a cache, from which
every question goes on by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vlmlab.contracts.tensors import Kind, Layout
from vlmlab.lm.inside import Inside

PADDING = {"kind": int(Kind.PAD), "segment": 0, "role": 0, "position": 0}
"""What padding inside a row is; it belongs to the row's only sample, which goes on after it. All other fields: -1."""


@dataclass(frozen=True)
class Unfolded:
    """One row a question: what it shares, padded on the left, and then its own, padded on the left.

    Attributes:
        tree: (K,) the row of the tree.
        index: (K, L) which position of that row is here, -1 for padding.
        trunk: so many of the L positions are shared with the other questions of the tree.
        first: (B,) the first question of every tree.
    """

    tree: Tensor
    index: Tensor
    trunk: int
    first: Tensor

    def of(self, field: Tensor, padding: int = 0) -> Tensor:
        """(B, S, ...) of the trees -> (K, L, ...) of the rows."""
        found = field[self.tree[:, None], self.index.clamp(min=0)]
        return found.masked_fill((self.index < 0).reshape(*self.index.shape, *[1] * (found.ndim - 2)), padding)

    def layout(self, layout: Layout) -> Layout:
        """What the positions of the rows are."""
        return Layout(**{f.name: self.of(getattr(layout, f.name), PADDING.get(f.name, -1)) for f in fields(layout)})

    def inside(self, inside: Inside) -> Inside:
        """What the layers are given for the rows; images are still those of the trees."""
        memories = inside.changed(self.of, lambda slots: slots[self.tree], self.of)
        return Inside(self.layout(inside.layout), memories, self.of(inside.with_image))


def unfold(layout: Layout) -> Unfolded:
    """The rows of one tree each; of a row that is not a tree the last position is the question.

    Args:
        layout: of trees (B, S), padded on either side and not packed.
    """
    trunks: list[Tensor] = []
    owns: list[Tensor] = []
    tree: list[int] = []
    first: list[int] = []
    for r, (valid, branch) in enumerate(zip(layout.valid, layout.branch, strict=True)):
        first.append(len(tree))
        places, number = valid.nonzero()[:, 0], int(branch.max()) + 1
        shared = places[branch[places] < 0] if number else places[:-1]
        for k in range(max(number, 1)):
            tree.append(r)
            trunks.append(shared)
            owns.append(places[branch[places] == k] if number else places[-1:])
    trunk, own = _left_padded(trunks), _left_padded(owns)
    device = layout.kind.device
    return Unfolded(
        tree=torch.tensor(tree, device=device),
        index=torch.cat([trunk, own], 1),
        trunk=trunk.shape[1],
        first=torch.tensor(first, device=device),
    )


def _left_padded(rows: list[Tensor]) -> Tensor:
    """(K, L), -1 where a row is shorter."""
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_full((width - len(row),), -1), row]) for row in rows])
