"""``lavi``: vision shifts and scales what leaves the LM's norms (LaVi, arXiv 2506.16691); no visual token anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, MemoryMask, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Layers, Width
from vlmlab.fusion.base import Positions, check_counts, check_words, chosen_layers, memory_tokens, sight, token_places
from vlmlab.lm.inside import look, open_ports, seen_in_row

Sublayers = Literal["both", "attention", "mlp"]
Conditioning = Literal["attention", "mlp", "conv"]
SUBLAYERS = {"both": ("norm.attention", "norm.mlp"), "attention": ("norm.attention",), "mlp": ("norm.mlp",)}


class LaViFusion(Fusion):
    """(gamma + dgamma_t) * normed_t + (beta + dbeta_t) at the norms of some layers, for every position t by itself.

    The paper's equation; public are its abstract and its reviews. What the deltas are computed by is our reading:
    x = W_in normed (B, Q, c) and V' = W_v LN(V) (I, M, c), V being the connector's tokens, one W_v for all norms; then

        attention   u = x + MHA(x, V', V')
        mlp         u = W_x x * W_m v, v the mean over tokens of one Mixer block on V'
        conv        the same with two ConvMixer blocks on the grid of V'

    and [dgamma; dbeta] = W_out silu(u). LN and the norm of x have no weights, MHA's maps no bias. W_out starts at zero,
    so that the LM is at first what it was, bit for bit; then W_out alone has a gradient, from step 1 all weights have.
    The deltas are 0 where a position sees no image; under mlp and conv v is the mean over the images it sees. RMS norms
    get their shift from here, where they have none of their own.

    Parameters with attention, per norm, of d channels: (d c + c) + 4 c^2 + (2 d c + 2 d), and once Dt c + c.

    Args:
        sees: which images a position sees.
        every: the norms of the last layer of every group of so many; 1: of each.
        layers: indices of the layers instead; null takes `every`.
        sublayers: the norm before "attention", before the "mlp", or "both".
        scale, shift: which of the two deltas there are.
        conditioner: "attention", "mlp" or "conv".
        width: c; null is 512 for an LM of 2,048 or more channels, half its width below.
        heads: of the attention; null is c // 64, at least one.
        hidden: of the Mixer's layer along the tokens; null is their number.
        kernel: side of ConvMixer's window.
        positions: add the 2-D place of a visual token to V': "auto" where they form a grid, true, or false. This is
            ours: nothing else tells places apart that the encoder's features do not.

    Raises:
        UserError: an unknown choice, or a count below 1; from ``attach``: a layer that does not exist, heads that do
            not divide the width, or a grid that conv lacks.
    """

    reads = "tokens"
    in_sequence = False
    starts_as = "text_only"

    def __init__(
        self,
        sees: MemoryMask,
        every: Width = 4,
        layers: Layers | None = None,
        sublayers: Sublayers = "both",
        scale: bool = True,
        shift: bool = True,
        conditioner: Conditioning = "attention",
        width: Width | None = None,
        heads: Width | None = None,
        hidden: Width | None = None,
        kernel: Width = 5,
        positions: Positions = "auto",
    ) -> None:
        super().__init__()
        check_words(sublayers=(sublayers, Sublayers), conditioner=(conditioner, Conditioning))
        if not scale and not shift:
            raise UserError(
                "fusion.scale=false and fusion.shift=false leave vision no way in; set one of them to true."
            )
        check_counts(width=width, heads=heads, hidden=hidden, kernel=kernel)
        self.sees = sees
        self.every, self.layers, self.sublayers = every, layers, sublayers
        self.scale, self.shift = scale, shift
        self.conditioner, self.width, self.heads = conditioner, width, heads
        self.hidden, self.kernel, self.positions = hidden, kernel, positions
        self.places: Tensor | None

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the conditioners and put each at its norm."""
        ports = open_ports(model.lm.model)
        d = model.lm.width
        c = self.width or (512 if d >= 2048 else d // 2)
        count, grid = model.connector.tokens_per_image(model.encoder.hw), model.connector.grid(model.encoder.hw)
        self.model_tokens = count, model.token_width
        self.project = nn.Linear(model.token_width, c)
        self.register_buffer("places", token_places(model, self.positions, c), persistent=False)
        heads = self.heads or max(1, c // 64)
        self.norms = nn.ModuleList()
        for layer in chosen_layers(len(ports), self.every, self.layers):
            for where in SUBLAYERS[self.sublayers]:
                inner = CONDITIONERS[self.conditioner](c, heads, count, grid, self.hidden, self.kernel)
                block = InfusedNorm(d, c, inner, self.scale, self.shift)
                ports[layer].put(where, block, f"{self.key}.{len(self.norms)}")
                self.norms.append(block)

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """What every conditioner makes of V', once per image, for its own norm."""
        tokens = memory_tokens(seen, *self.model_tokens, self.project.weight)  # (I, M, Dt)
        visual = self.project(F.layer_norm(tokens, tokens.shape[-1:]))  # (I, M, c)
        if self.places is not None:
            visual = visual + self.places.to(visual.dtype)
        sees, slots = sight(self.sees, batch)
        made = ((k, block.memory(visual)) for k, block in enumerate(self.norms) if isinstance(block, InfusedNorm))
        return {f"{self.key}.{k}": Memory(tensors, sees, slots) for k, tensors in made}

    def waits(self, name: str) -> bool:
        """All but W_out."""
        return ".head." not in name


class InfusedNorm(nn.Module):
    """A block at a norm: the deltas of its scale and shift for every position."""

    def __init__(self, d: int, c: int, inner: Conditioner, scale: bool, shift: bool) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.enter = nn.Linear(d, c)
        self.inner = inner
        self.head = nn.Linear(c, d * (scale + shift))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def memory(self, visual: Tensor) -> dict[str, Tensor]:
        """V' (I, M, c) -> what positions read of it, by name, each (I, ...)."""
        return self.inner.memory(visual)

    def forward(self, states: Tensor, normed: Tensor, out: Tensor, *, layout: Layout, memory: Memory) -> Tensor:
        """The norm's output (B, Q, D) with the deltas of those positions that see an image."""
        u = self.inner(self.enter(normed), memory)  # (B, Q, c)
        delta = self.head(F.silu(u)).masked_fill(~memory.sees.any(-1, keepdim=True), 0.0)  # (B, Q, D or 2 D)
        if self.scale:
            out = out + delta[..., : out.shape[-1]] * normed
        return out + delta[..., -out.shape[-1] :] if self.shift else out


class Conditioner(nn.Module, ABC):
    """What makes u (B, Q, c) of x (B, Q, c) and of the images."""

    @abstractmethod
    def memory(self, visual: Tensor) -> dict[str, Tensor]:
        """V' (I, M, c) -> what positions read of it, by name, each (I, ...)."""

    @abstractmethod
    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, Q, c) -> (B, Q, c)."""


class AttentionConditioner(Conditioner):
    """u = x + MHA(x, V', V'), without biases."""

    def __init__(self, c: int, heads: int, *_: object) -> None:
        super().__init__()
        if c % heads:
            raise UserError(f"fusion.heads={heads} does not divide fusion.width={c}; choose a divisor.")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(c, c, bias=False) for _ in range(4))

    def memory(self, visual: Tensor) -> dict[str, Tensor]:
        """Keys and values (I, M, H, dh)."""
        parts = {"keys": self.k, "values": self.v}
        return {name: part(visual).unflatten(-1, (self.heads, -1)) for name, part in parts.items()}

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, Q, c) -> (B, Q, c)."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        return x + self.out(look(q, memory.tensors["keys"], memory.tensors["values"], memory))


class SummaryConditioner(Conditioner):
    """u = W_x x * W_m v, v (I, c) what a subclass makes of V'; W_m v once per image, before the mean over images."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.by_text = nn.Linear(c, c)
        self.by_image = nn.Linear(c, c)

    @abstractmethod
    def summary(self, visual: Tensor) -> Tensor:
        """(I, M, c) -> (I, c)."""

    def memory(self, visual: Tensor) -> dict[str, Tensor]:
        """W_m v (I, c)."""
        return {"summary": self.by_image(self.summary(visual))}

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, Q, c) -> (B, Q, c); the mean over the images that a position sees, nothing where it sees none."""
        sees, images = seen_in_row(memory)  # (B, Q, J), (B, J)
        share = sees.to(x.dtype) / sees.sum(-1, keepdim=True).clamp(min=1)  # (B, Q, J)
        summary = memory.tensors["summary"]  # (I, c)
        told = share @ summary[images] + 0.0 * summary.sum()  # (B, Q, c)
        return self.by_text(x) * told


class MixerConditioner(SummaryConditioner):
    """One Mixer block (arXiv 2105.01601, section 2): a layer along tokens, one along channels; the mean."""

    def __init__(self, c: int, heads: int, tokens: int, grid: object, hidden: int | None, *_: object) -> None:
        super().__init__(c)
        self.along_tokens = nn.Sequential(
            nn.Linear(tokens, hidden or tokens), nn.GELU(), nn.Linear(hidden or tokens, tokens)
        )
        self.along_channels = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def summary(self, visual: Tensor) -> Tensor:
        """(I, M, c) -> (I, c)."""
        width = visual.shape[-1:]
        visual = visual + self.along_tokens(F.layer_norm(visual, width).mT).mT
        return (visual + self.along_channels(F.layer_norm(visual, width))).mean(1)


class ConvConditioner(SummaryConditioner):
    """Two ConvMixer blocks (arXiv 2201.09792, section 2) on the grid; then the mean.

    A norm over channels replaces ConvMixer's batch norm, whose statistics would depend on other samples.
    """

    def __init__(
        self, c: int, heads: int, tokens: int, grid: tuple[int, int] | None, hidden: object, kernel: int
    ) -> None:
        super().__init__(c)
        if grid is None:
            raise UserError(
                "fusion.conditioner=conv needs visual tokens that form a grid and this connector's do not; use "
                "fusion.conditioner=attention, or connector=mlp, linear, pool or none."
            )
        self.grid = grid
        self.depthwise = nn.ModuleList(nn.Conv2d(c, c, kernel, groups=c, padding="same") for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(2))

    def summary(self, visual: Tensor) -> Tensor:
        """(I, M, c) -> (I, c)."""
        x = visual.mT.unflatten(-1, self.grid)  # (I, c, R, C)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = _channel_norm(F.gelu(depthwise(x)) + x)
            x = _channel_norm(F.gelu(pointwise(x)))
        return x.mean((2, 3))


def _channel_norm(x: Tensor) -> Tensor:
    """(I, c, R, C), every place normalised over its channels."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


CONDITIONERS = {"attention": AttentionConditioner, "mlp": MixerConditioner, "conv": ConvConditioner}
