"""What fusions share: which layers they act on, the visual tokens that they read, their places in the sequence, and
refusals that name the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts import errors
from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.parts import Fusion, MemoryMask, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen, Split, Visual
from vlmlab.lm.inside import LayerPorts, copied

Positions = Literal["auto"] | bool
"""Whether the 2-D place of a visual token is added to it."""


def check_counts(**counts: int | None) -> None:
    """Keys that must be whole numbers of at least 1, or null, which has a meaning of its own.

    Raises:
        UserError: one of them is neither.
    """
    errors.check_counts("fusion", **{key: value for key, value in counts.items() if value is not None})


def places_2d(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): sine and cosine of the row in one half, of the column in the other, row by row.

    Frequencies as in "Attention Is All You Need" (arXiv 1706.03762, section 3.5); what does not divide by 4 is zero.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter) / max(quarter, 1))  # (W / 4,)
    row, column = torch.arange(rows)[:, None] * frequency, torch.arange(columns)[:, None] * frequency
    r = torch.cat([row.sin(), row.cos()], -1)[:, None].expand(-1, columns, -1)  # (R, C, W / 2)
    c = torch.cat([column.sin(), column.cos()], -1)[None].expand(rows, -1, -1)
    return F.pad(torch.cat([r, c], -1).flatten(0, 1), (0, width - 4 * quarter))


def token_places(model: VisionLanguageModel, wanted: bool | str, width: int) -> Tensor | None:
    """(M, width) 2-D places of the connector's tokens, or None.

    Args:
        model: the model.
        wanted: true, false, or "auto": where the tokens form a grid.
        width: of the vectors that they are added to.

    Raises:
        UserError: `wanted` is true and the tokens form no grid, or it is something else.
    """
    if wanted not in (True, False, "auto"):
        raise UserError(f"fusion.positions={wanted} is unknown; choose auto, true or false.")
    grid = None if wanted is False else model.connector.grid(model.encoder.hw)
    if wanted is True and grid is None:
        raise UserError(
            "fusion.positions=true needs visual tokens that form a grid and this connector's do not; set "
            "fusion.positions=auto, or use connector=mlp, linear, pool or none."
        )
    return None if grid is None else places_2d(grid[0], grid[1], width)


def check_words(**given: tuple[str, Any]) -> None:
    """Refuse what is none of a fusion's words; each is given with its ``Literal``.

    Raises:
        UserError: names the key and its words.
    """
    for key, (value, kind) in given.items():
        if value not in get_args(kind):
            raise UserError(f"fusion.{key}={value} is unknown; choose {' or '.join(get_args(kind))}.")


def chosen_layers(depth: int, every: int, layers: Sequence[int] | None, at: str = "last") -> list[int]:
    """Which of `depth` layers get a block: the "last" or the "first" of every whole group of `every`, or those listed.

    Raises:
        UserError: a layer that does not exist, or no layer at all.
    """
    if layers is None:
        found = [k - (every - 1) * (at == "first") for k in range(every - 1, depth, every)] if every > 0 else []
        if not found:
            raise UserError(f"fusion.every={every} leaves no layer of {depth}; give a number from 1 to {depth}.")
        return found
    if not layers or any(not -depth <= layer < depth for layer in layers):
        raise UserError(f"fusion.layers={list(layers)} names a layer that is not there; give some of 0 to {depth - 1}.")
    return sorted({layer % depth for layer in layers})


def memory_tokens(seen: Seen, count: int, width: int, like: Tensor) -> Tensor:
    """(I, M, D) the connector's tokens; (0, M, D) of `like`'s kind where the batch has no image."""
    if seen.tokens is None:  # not new_zeros, which would make a shard of a shard
        return torch.zeros(0, count, width, dtype=like.dtype, device=like.device)
    return seen.tokens


def sight(sees: MemoryMask, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which images the positions of a batch see, (B, S, I), and the images of every row, (B, J)."""
    q = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return sees(batch.layout, batch.images, q), batch.images.slots(len(batch.input_ids))


def side_by_side(visual: Visual, tokens: int, width: int) -> tuple[Tensor, list[int]]:
    """The features of all layers or towers beside each other, (I, N, Dv), and the width of each.

    Raises:
        UserError: other than `tokens` features of `width` channels in all.
    """
    widths = [grid.shape[-1] for grid in visual.grids]
    if any(grid.shape[1] != tokens for grid in visual.grids) or sum(widths) != width:
        shapes = ", ".join(str(tuple(grid.shape[1:])) for grid in visual.grids)
        raise UserError(f"fusion=emma mixes a grid of {tokens} features and this encoder gives {shapes}.")
    return torch.cat(visual.grids, -1), widths


# -- visual tokens in the sequence -------------------------------------------------------------------------------------


class InSequence(Fusion):
    """A fusion whose visual tokens are in the LM's sequence where the image placeholders are."""

    reads = "tokens"
    in_sequence = True

    def tokens_per_image(self, tokens: int) -> int:
        """All of the connector's tokens enter the sequence."""
        return tokens

    def attach(self, model: VisionLanguageModel) -> None:
        """Nothing is added.

        Raises:
            UserError: the connector's tokens are not as wide as the LM.
        """
        if model.token_width != model.lm.width:
            raise UserError(
                f"connector: its tokens are {model.token_width} wide and the LM is {model.lm.width} wide, so that they "
                "cannot be put into its sequence; use connector=linear or mlp, or a fusion that reads them elsewhere."
            )

    def embed(self, seen: Seen, embeds: Tensor, batch: Batch) -> Tensor:
        """(I, M, D) visual tokens into (B, S, D) embeddings -> (B, S, D)."""
        return scattered(seen.tokens, embeds, batch)


def scattered(tokens: Tensor | None, embeds: Tensor, batch: Batch) -> Tensor:
    """(I, M, D) visual tokens into (B, S, D) embeddings, at the positions that the collator has set aside for them.

    Raises:
        DataError: the batch has more or fewer visual positions than visual tokens.
    """
    visual = batch.layout.visual
    count = 0 if tokens is None else int((batch.images.row >= 0).sum()) * tokens.shape[1]
    if int(visual.sum()) != count:
        raise DataError(
            f"Samples {batch.sample_ids} have {int(visual.sum())} image positions for "
            f"{count} visual tokens; check their image tags."
        )
    if tokens is None or not count:
        return embeds
    return embeds.masked_scatter(visual[..., None], tokens.to(embeds.dtype))  # row-major, as images are listed


def beside(batch: Batch, own: Tensor | None = None, tensors: dict[str, Tensor] | None = None) -> Memory:
    """What blocks read that look at no image: they act on all positions, or on some by themselves.

    Args:
        batch: the batch.
        own: (B, S) bool: those positions.
        tensors: by name, each (I, ...).
    """
    nobody = torch.zeros(*batch.input_ids.shape, 0, dtype=torch.bool, device=batch.input_ids.device)
    slots = batch.images.slots(len(nobody))
    return Memory(tensors or {}, nobody, slots, None if own is None else Split.of(own))


BEFORE_THE_END = ("norm.attention", "linear.k", "linear.v", "linear.qkv")
"""Ports of the LM's last layer through which a visual position reaches a word."""


def copies_beside(ports: Sequence[LayerPorts], layers: Sequence[int], wanted: Sequence[str], key: str) -> nn.ModuleList:
    """Copies of what is at some ports of some layers, which compute the positions of a memory's split in its place.

    The last layer has copies of keys and values alone: what else it computes at a visual position reaches no word, and
    such copies would never have a gradient.

    Args:
        ports: of all layers.
        layers: indices of those that have copies.
        wanted: names of ports; those that the family lacks are left out.
        key: of the memory whose `split` says which positions.

    Returns:
        For every layer with any its copies by port, as "q" or "norm_attention".
    """
    made = nn.ModuleList()
    for layer in layers:
        here = [port for port in wanted if port in ports[layer].paths]
        if layer == len(ports) - 1:
            here = [port for port in here if port in BEFORE_THE_END]
        if here:
            copies = {port: copied(ports[layer].module(port)) for port in here}
            for port, copy in copies.items():
                ports[layer].take_over(port, copy, key)
            made.append(nn.ModuleDict({p.removeprefix("linear.").replace(".", "_"): c for p, c in copies.items()}))
    return made


def at_their_places(tokens: Tensor, layout: Layout, memory: Memory) -> Tensor:
    """(I, M, D) tokens of all images -> (V, D) in the order of ``memory.split.here``, which are visual positions.

    An image's positions are computed all in one call, so that they can be counted from any of its beginnings.
    """
    assert memory.split is not None
    here, count = memory.split.here, tokens.shape[1]
    row, image = here // layout.image.shape[1], layout.image.flatten().index_select(0, here)
    nth = (layout.visual.long().cumsum(1) - 1).flatten().index_select(0, here) % count
    index = memory.slots[row, image] * count + nth if memory.slots.shape[1] else here
    return tokens.flatten(0, 1).index_select(0, index)
