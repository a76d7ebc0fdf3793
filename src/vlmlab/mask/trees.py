"""Whether a tree of questions is equal to a row for each of them under a mask; found by asking the mask, not its name.

It is where what all questions share looks at nothing of any of them: under ``prefix_lm`` the images see the question.
The mask is asked on small trees and on the rows that they stand for, and has to give the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlmlab.contracts.parts import Mask, MemoryMask
from vlmlab.mask.leak import TREES, Scene, written

OPTIONS = (
    "su00'0''11u[aa][aaa][a]",  # answers to choose from, behind one question
    "^su^u[aa][a]",  # images without positions
    "u01uaau1uu[a][aaa]",  # after an earlier turn
)
"""Trees whose branches are answers, written as in ``vlmlab.mask.leak``."""


def equal_in_trees(mask: Mask, trees: Sequence[str] = TREES) -> bool:
    """Whether every branch of some trees sees what it sees in a row of its own, and so does what is before it."""
    with torch.device("cpu"):  # a model may be built on another one
        return all(_same(mask, *pair) for pair in _pairs(trees))


def images_equal_in_trees(mask: MemoryMask, trees: Sequence[str] = TREES) -> bool:
    """The same of the images that a memory mask shows."""
    with torch.device("cpu"):
        return all(
            torch.equal(mask(tree.layout, tree.images, tree.q)[0][own], mask(row.layout, row.images, row.q)[0])
            for tree, own, row in _pairs(trees)
        )


def _same(mask: Mask, tree: Scene, own: Tensor, row: Scene) -> bool:
    seen = mask(tree.layout, tree.q)[0][own]  # (S of the row, S of the tree)
    return torch.equal(seen[:, own], mask(row.layout, row.q)[0]) and not bool(seen[:, ~own].any())


def _pairs(trees: Sequence[str]) -> Iterator[tuple[Scene, Tensor, Scene]]:
    """Each branch of each small tree: the tree, which of its positions are the branch's (S,), and its own row."""
    for text in trees:
        trunk, *branches = re.findall(r"[^\[\]]+", text)
        tree = written((text,), left=False)
        for k, branch in enumerate(branches):
            own = (tree.layout.branch[0] == -1) | (tree.layout.branch[0] == k)
            yield tree, own, written((trunk + branch,), left=False)
