"""What every memory mask is built from: whose images they are, which are before, and the leak rule for the others.

An image's place may be the length of the row, where it ends its sample, and the start of the next packed sample: it is
compared with positions, and never used as an index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmlab.contracts.tensors import Images, Layout, Role


def of_sample(layout: Layout, images: Images, q: Tensor) -> Tensor:
    """(B, Q, I): position and image belong to the same packed sample of the same row; padding belongs to none."""
    rows = torch.arange(len(layout.kind), device=q.device)
    one_row = rows[:, None, None] == images.row  # (B, 1, I)
    one_segment = layout.segment[:, q, None] == images.segment  # (B, Q, I)
    return one_row & one_segment & layout.valid[:, q, None]


def begun(layout: Layout, images: Images, q: Tensor) -> Tensor:
    """(1, Q, I): the image's place is not after the position."""
    return (images.place <= q[:, None])[None]


def image_era(layout: Layout, images: Images) -> Tensor:
    """(I,) number of answer tokens before an image within its sample, as ``layout.era`` counts them for positions."""
    answer = ((layout.role == Role.ANSWER) & layout.valid)[images.row]  # (I, S)
    own = layout.segment[images.row] == images.segment[:, None]
    before = torch.arange(layout.kind.shape[1], device=images.place.device) < images.place[:, None]
    return (answer & own & before).sum(1)


def not_of_later_turn(layout: Layout, images: Images, q: Tensor) -> Tensor:
    """(B, Q, I): no answer token is between a position and an image after it (the leak rule)."""
    return image_era(layout, images) <= layout.era[:, q, None]
