"""``several``: fusions one after the other, each at its own moments; ``emma`` changes features, then is ``concat``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Memory, Seen, Visual


class SeveralFusion(Fusion):
    """Fusions in order: features pass through each, then embeddings; every memory reaches its own blocks.

    It starts as the part that puts tokens into the sequence does, since the others change nothing at first; as
    "text_only" where there is none, and as "nothing" as soon as a part does.

    Args:
        parts: name -> fusion, in their order; null leaves one out.

    Raises:
        UserError: no part, two that put tokens into the sequence, or a name that cannot be one of a module.
    """

    reads = "tokens"

    def __init__(self, parts: Mapping[str, Fusion | None]) -> None:
        super().__init__()
        chosen = {name: part for name, part in parts.items() if part is not None}
        within = [name for name, part in chosen.items() if part.in_sequence]
        if not chosen or len(within) > 1:
            found = (
                f"has {' and '.join(within)}, which both put tokens into the sequence" if within else "lists no fusion"
            )
            raise UserError(f"fusion.parts {found}; give one or more, of which at most one does that.")
        self.parts = nn.ModuleDict()
        for name, part in chosen.items():
            try:
                self.parts[name] = part
            except (KeyError, TypeError) as error:  # a dot, a number, or a name that a ModuleDict has itself
                raise UserError(f"fusion.parts cannot have a part named {name!r}; give it another name.") from error
        starts = {part.starts_as for part in chosen.values()}
        self.in_sequence = bool(within)
        self.starts_as = "nothing" if "nothing" in starts else chosen[within[0]].starts_as if within else "text_only"
        self.reads_text = any(part.reads_text for part in chosen.values())
        self.regroups = any(part.regroups for part in chosen.values())

    def _each(self) -> list[Fusion]:
        return [part for part in self.parts.values() if isinstance(part, Fusion)]

    def tokens_per_image(self, tokens: int) -> int:
        """Those of the part that puts them into the sequence."""
        return sum(part.tokens_per_image(tokens) for part in self._each())

    def attach(self, model: VisionLanguageModel) -> None:
        """Each part, under a key of its own."""
        for name, part in self.parts.items():
            assert isinstance(part, Fusion)
            part.key = f"{self.key}.{name}"
            part.attach(model)

    def features(self, visual: Visual, batch: Batch, text: Tensor | None) -> Visual:
        """Through each part."""
        for part in self._each():
            visual = part.features(visual, batch, text)
        return visual

    def read_by_connector(self, grids: int) -> int:
        """The fewest that a part leaves to it."""
        return min(part.read_by_connector(grids) for part in self._each())

    def embed(self, seen: Seen, embeds: Tensor, batch: Batch) -> Tensor:
        """Through each part, (B, S, D)."""
        for part in self._each():
            embeds = part.embed(seen, embeds, batch)
        return embeds

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """Those of all parts."""
        return {key: memory for part in self._each() for key, memory in part.memories(seen, batch).items()}

    def waits(self, name: str) -> bool:
        """Whether the part that has this weight says so."""
        _, part, own = name.split(".", 2)
        found = self.parts[part]
        return isinstance(found, Fusion) and found.waits(own)

    def replaced(self) -> Sequence[nn.Module]:
        """Those of all parts."""
        return [module for part in self._each() for module in part.replaced()]

    def undecayed(self) -> Sequence[Tensor]:
        """Those of all parts."""
        return [parameter for part in self._each() for parameter in part.undecayed()]
