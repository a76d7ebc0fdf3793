"""``asvr``: the LM's states at visual positions name a code of the feature there (ASVR, arXiv 2506.09040)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Kind, Layout, Outputs, Role, Seen
from vlmlab.contracts.values import Natural, NotNegative, Width
from vlmlab.objective.base import gathered


class SemanticReconstruction(nn.Module):
    """Cross-entropy of the code of every visual token, read from the LM's state at its position; an extra term.

    The paper's codes are eight residual levels of a frozen semantic tokenizer. Here they are the nearest centres of a
    k-means over the encoder's features, one level: fitted on the first micro-batch with images, of all ranks, and
    frozen then. The encoder should be frozen; the features are targets without gradient. Where the connector gives
    fewer tokens than features, a token answers for the mean of its share of them. The head is dropped after the stage.

    Args:
        weight: factor of this objective in the total loss.
        codes: size of the codebook; with fewer features in the first micro-batch the rest stays unused.
        hidden: width of the head; null is the LM's.
        shift: 0 reads the state at the position of a visual token, 1 the state before it, which predicts the next.
        iterations: of k-means.
    """

    per_micro_batch = False
    reads_images = True
    reads_sequence = True

    def __init__(
        self,
        weight: NotNegative = 1.0,
        codes: Width = 64,
        hidden: Width | None = None,
        shift: Literal[0, 1] = 0,
        iterations: Natural = 20,
    ) -> None:
        super().__init__()
        if shift not in (0, 1):
            raise UserError(f"objective.shift={shift} is unknown; choose 0 or 1.")
        self.weight = weight
        self.codes = codes
        self.hidden = hidden
        self.shift = shift
        self.iterations = iterations
        self.codebook: Tensor
        self.fitted: Tensor

    def attach(self, model: Any) -> None:
        """Make the head and the empty codebook for this model.

        Raises:
            UserError: vision has no place in the LM's sequence, or `shift` is 1 and visual tokens see later ones.
        """
        if not model.tokens_per_image:
            raise UserError("objective=asvr reads visual positions and this composition has none; use fusion=concat.")
        if self.shift and _looks_ahead(model.mask):
            raise UserError("objective.shift=1 leaks where visual tokens see later ones; use mask=causal or shift=0.")
        width = model.lm.width
        self.head = nn.Sequential(
            nn.Linear(width, self.hidden or width), nn.GELU(), nn.Linear(self.hidden or width, self.codes)
        )
        self.register_buffer("codebook", torch.zeros(self.codes, model.encoder.width))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def counts(self, batch: Batch) -> dict[str, int]:
        """{"asvr": visual tokens with a state}."""
        return {"asvr": int(self._asked(batch.layout).sum())}

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"asvr": (sum in nats, visual tokens)}."""
        states = outputs.states  # (B, S, D)
        assert states is not None
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            features = self._features(outputs.seen)  # (P, Dv), in the order of the visual positions
            if not self.fitted:
                everything, _ = gathered(features)
                if len(everything):
                    self.codebook.copy_(k_means(everything, self.codes, self.iterations))
                    self.fitted.fill_(True)
            codes = torch.cdist(features, self.codebook).argmin(-1)  # (P,)
        asked = self._asked(batch.layout)  # (B, S)
        if self.shift:
            states = F.pad(states, (0, 0, 1, 0))[:, :-1]
        logits = self.head(states[asked])  # (P', K)
        total = F.cross_entropy(logits.float(), codes[asked[batch.layout.visual]], reduction="sum")
        return {"asvr": (total, total.new_tensor(len(logits)))}

    def _asked(self, layout: Layout) -> Tensor:
        """(B, S) bool: visual positions with a state to read; with a shift the first of a sample has none."""
        return layout.visual & (layout.position >= self.shift)

    def _features(self, seen: Seen) -> Tensor:
        """(I * M, Dv): the features that each visual token answers for."""
        if seen.visual is None or seen.tokens is None:
            return self.codebook.new_zeros(0, self.codebook.shape[1])
        grid = torch.cat(seen.visual.grids, -1).float()  # (I, N, Dv)
        rows, columns = (int(n) for n in seen.visual.hw[0])
        return shares(grid, (rows, columns), seen.tokens.shape[1]).flatten(0, 1)


def shares(grid: Tensor, hw: tuple[int, int], tokens: int) -> Tensor:
    """(I, N, Dv) -> (I, M, Dv): means over squares of the grid where M is a coarser grid, over runs of it otherwise."""
    if grid.shape[1] == tokens:
        return grid
    side = math.isqrt(max(hw[0] * hw[1] // tokens, 1))
    if hw[0] * hw[1] == side * side * tokens == grid.shape[1] and hw[0] % side == 0 == hw[1] % side:
        square = grid.unflatten(1, hw).movedim(-1, 1)  # (I, Dv, rows, columns)
        return F.avg_pool2d(square, side).flatten(2).mT
    return F.adaptive_avg_pool1d(grid.mT, tokens).mT


def k_means(points: Tensor, codes: int, iterations: int) -> Tensor:
    """(P, Dv) -> (K, Dv) centres by Lloyd's algorithm from k-means++ draws, the same for the same points.

    With fewer points than codes some centres are equal, of which the first takes the points.
    """
    generator = torch.Generator(points.device).manual_seed(0)
    centres = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]  # (1, Dv)
    distance = (points - centres).square().sum(-1)  # (P,) squared, to the nearest centre
    while len(centres) < codes:
        even = torch.ones_like(distance)
        drawn = torch.multinomial(distance if bool((distance > 0).any()) else even, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
        distance = torch.minimum(distance, (points - points[drawn]).square().sum(-1))
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(-1)  # (P,)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        number = nearest.bincount(minlength=codes)[:, None]  # (K, 1)
        centres = torch.where(number > 0, sums / number.clamp(min=1), centres)  # an unused one stays
    return centres


def _looks_ahead(mask: Any) -> bool:
    """Whether a visual token sees a later one of its image."""
    row = torch.zeros(1, 3, dtype=torch.long)
    layout = Layout(
        kind=row + int(Kind.VISUAL), image=row, tile=row, segment=row, role=row + int(Role.USER),
        position=torch.arange(3)[None],
    )  # fmt: skip
    allowed = mask(layout, torch.arange(3))  # (1, 3, 3)
    return bool(allowed.triu(1).any())
