"""``stack`` and ``sum``: several connectors on the same features, their tokens one after the other or added up.

SPHINX (arXiv 2311.07575 section 3) and BLIVA (arXiv 2308.09936 section 3) stack tokens of two kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual


class StackConnector(Connector):
    """The tokens of every part, one part after the other.

    Args:
        in_width: width of a feature, for every part.
        out_width: width of the LM, for every part.
        parts: name -> a connector's configuration (its ``_target_`` and keys), in the order of the tokens; null
            leaves a part out. They are instantiated here, because every part needs the two widths; hence
            ``_recursive_: false`` in the YAML.

    Raises:
        UserError: `parts` is empty, a part is not a connector, or their tokens are of several widths.
    """

    def __init__(self, in_width: int, out_width: int, parts: Mapping[str, Any]) -> None:
        super().__init__()
        chosen = {name: part for name, part in parts.items() if part is not None}
        if not chosen:
            raise UserError("connector.parts lists no connector; add at least one with its _target_.")
        built = {name: built_part(name, part, in_width, out_width) for name, part in chosen.items()}
        self.parts = nn.ModuleDict(built)
        self.reads_instruction = any(part.reads_instruction for part in built.values())
        widths = {name: out_width if part.width is None else part.width for name, part in built.items()}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"connector.parts give tokens of different widths ({found}); leave out or change a part.")
        self._width = None if out_width in widths.values() else next(iter(widths.values()))

    @property
    def width(self) -> int | None:
        """That of the parts' tokens, where it is not the LM's."""
        return self._width

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """The sum of the parts' tokens."""
        return sum(self._tokens(hw).values())

    def grid(self, hw: tuple[int, int]) -> tuple[int, int] | None:
        """That of a single part; the tokens of several are in no one grid."""
        return self._grids(hw)[0] if len(self.parts) == 1 else None

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; every part gets the instruction."""
        return torch.cat(self._each(visual, instruction), 1)  # (I, M1 + M2 + ..., D)

    def _each(self, visual: Visual, instruction: Tensor | None) -> list[Tensor]:
        return [part(visual, instruction) for part in self.parts.values()]

    def _grids(self, hw: tuple[int, int]) -> list[tuple[int, int] | None]:
        return [part.grid(hw) for part in self.parts.values() if isinstance(part, Connector)]

    def _tokens(self, hw: tuple[int, int]) -> dict[str, int]:
        counts = {}
        for name, part in self.parts.items():
            assert isinstance(part, Connector)
            try:
                counts[name] = part.tokens_per_image(hw)
            except UserError as error:  # the part does not know its own key
                raise UserError(f"connector.parts.{name}: {error}") from error
        return counts


def built_part(name: str, part: Any, in_width: int, out_width: int) -> Connector:
    """One part from its configuration.

    Raises:
        UserError: it is not a connector, or its own refusal, with the part's name.
    """
    try:
        made = instantiate(part, in_width=in_width, out_width=out_width)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise UserError(f"connector.parts.{name}: {error.__cause__}") from error
        raise
    if not isinstance(made, Connector):
        raise UserError(f"connector.parts.{name} is not a connector; give it the _target_ of one.")
    return made


class SumConnector(StackConnector):
    """The tokens of every part added up; all parts must give as many.

    Args:
        in_width, out_width, parts: as in ``StackConnector``.

    Raises:
        UserError: from ``tokens_per_image``, where the parts give different numbers of tokens.
    """

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """The number that all parts give."""
        counts = self._tokens(hw)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(
                f"connector=sum adds tokens one by one and connector.parts give different numbers ({found}); "
                "change a part or use connector=stack."
            )
        return next(iter(counts.values()))

    def grid(self, hw: tuple[int, int]) -> tuple[int, int] | None:
        """That of all parts, where they agree."""
        first, *others = self._grids(hw)
        return first if all(other == first for other in others) else None

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; every part gets the instruction."""
        return torch.stack(self._each(visual, instruction)).sum(0)  # (I, M, D)
