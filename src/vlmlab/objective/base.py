"""What contrastive objectives share: rows of all ranks, and the symmetric cross-entropy over them.

Backward needs no communication, so a rank whose micro-batch shows no image, and which therefore has no backward pass,
keeps no rank waiting: every rank takes the whole loss for the gradient of its own rows, the others' being constants.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


def gathered(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows (n, ...) of all ranks, without gradient but for this rank's own, and the place of those.

    The number of rows may differ from rank to rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, slice(0, len(rows))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    kept = [part[:count] for part, count in zip(parts, counts, strict=True)]
    kept[rank] = rows
    first = sum(counts[:rank])
    return torch.cat(kept), slice(first, first + len(rows))


def symmetric(
    by_image: Tensor, by_text: Tensor, temperature: Tensor | float, own: slice, smoothing: float = 0.0
) -> Tensor:
    """One rank's part of the cross-entropy of images over texts and of texts over images, halved.

    The value is the sum over this rank's own pairs. The gradient of a similarity is the whole loss's, that of the
    temperature, which all ranks share, is its own pairs'; so gradients summed over ranks are those of one rank with
    all rows.

    Args:
        by_image: (P, P) similarity of image i and text j, over all ranks.
        by_text: (P, P) similarity of text i and image j.
        temperature: what similarities are divided by.
        own: this rank's pairs.
        smoothing: label smoothing.
    """
    if not len(by_image):
        return by_image.sum()
    target = torch.arange(len(by_image), device=by_image.device)

    def losses(images: Tensor, texts: Tensor, divisor: Tensor | float) -> Tensor:
        rows = F.cross_entropy(images / divisor, target, reduction="none", label_smoothing=smoothing)  # (P,)
        columns = F.cross_entropy(texts / divisor, target, reduction="none", label_smoothing=smoothing)
        return (rows + columns) / 2

    constant = temperature.detach() if isinstance(temperature, Tensor) else temperature
    whole = losses(by_image, by_text, constant).sum()
    share = losses(by_image.detach(), by_text.detach(), temperature)[own].sum()
    return share + whole - whole.detach()
