"""``medslip``: an image's findings and their places are read by two streams of queries, and meet (MeDSLIP)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.contracts.values import Names, NotNegative, Positive, Width


class DualStreams(nn.Module):
    """Presence, prototypes and pairs of findings (P) and places (A).

    Each concept has a learned query that reads the image's patches by cross-attention; findings and places have their
    own. presence: is the concept there, cross-entropy over yes and no, mean over both streams' concepts. prototypes:
    the state of a concept that is there is likest to its own name among those of its stream, as the text tower reads
    them, cross-entropy of cosines / temperature. pairs: binary cross-entropy of the products of findings' and places'
    states against which finding is at which place.

    What is there comes from the row's text: a finding and a place in one phrase (between commas, colons and stops) are
    at one another. Its weights are the part ``objective`` of a stage. The paper's reports are medical and its text
    tower ClinicalBERT; factors are keys.

    Args:
        findings, places: words or phrases.
        width, heads: of the queries' attention.
        presence, prototypes, pairs_factor: factors of the terms.
        temperature: of the prototypes.
        weight: factor of this objective in the total loss.
    """

    per_micro_batch = True
    pairs = True

    def __init__(
        self,
        findings: Names,
        places: Names,
        width: Width = 64,
        heads: Width = 4,
        presence: NotNegative = 1.0,
        prototypes: NotNegative = 1.0,
        pairs_factor: NotNegative = 1.0,
        temperature: Positive = 0.07,
        weight: NotNegative = 1.0,
    ) -> None:
        super().__init__()
        self.names = {"findings": list(findings), "places": list(places)}
        self.width, self.heads, self.temperature, self.weight = width, heads, temperature, weight
        self.factors = {"presence": presence, "prototypes": prototypes, "pairs": pairs_factor}

    def attach(self, model: Any) -> None:
        """Make the queries and maps that fit the two towers.

        Raises:
            UserError: the model has no text tower of a pair.
        """
        if not hasattr(model.lm, "tokenise"):
            raise UserError(
                "objective=medslip reads names by the text tower of a pair; use it in a stage of PairModule."
            )
        self.read, self.tokenise = model.lm.forward, model.lm.tokenise  # methods: the tower stays a part of the model
        self.features = nn.Linear(model.encoder.width, self.width)
        self.streams = nn.ModuleDict({kind: Stream(len(n), self.width, self.heads) for kind, n in self.names.items()})
        self.present = nn.Linear(self.width, 2)
        self.prototype = nn.Linear(model.lm.width, self.width)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{"presence": (sum in nats, concepts), "prototypes": (sum, concepts that are there), "pairs": (sum, P x A)}.

        Raises:
            UserError: the stage makes no pairs from words.
        """
        if outputs.pairing is None or outputs.seen.visual is None or len(batch.texts) != len(outputs.pairing.image):
            raise UserError("objective=medslip needs a stage of PairModule, with a text beside every image.")
        patches = self.features(torch.cat(outputs.seen.visual.grids, -1))  # (B, N, W)
        states = {kind: stream(patches) for kind, stream in self.streams.items()}  # (B, P, W) and (B, A, W)
        told = self.mentioned(batch.texts).to(patches.device)  # (B, P, A) bool
        there = {"findings": self.named(batch.texts, "findings"), "places": self.named(batch.texts, "places")}
        none = 0.0 * (outputs.pairing.bias + outputs.pairing.log_scale)
        terms: dict[str, list[tuple[Tensor, int]]] = {"presence": [], "prototypes": []}
        for kind, state in states.items():
            own = there[kind].to(patches.device)
            terms["presence"].append((self._presence(state, own), own.numel()))
            terms["prototypes"].append((self._prototypes(state, own, kind), int(own.sum())))
        scores = self.log_scale.exp() * states["findings"] @ states["places"].transpose(1, 2)  # (B, P, A)
        pairs = F.binary_cross_entropy_with_logits(scores.float(), told.float(), reduction="sum")
        found = {name: (sum(t for t, _ in parts) + none, sum(n for _, n in parts)) for name, parts in terms.items()}
        found["pairs"] = (pairs + none, told.numel())
        return {name: (self.factors[name] * t, t.new_tensor(float(n))) for name, (t, n) in found.items()}

    def mentioned(self, texts: tuple[str, ...]) -> Tensor:
        """(B, P, A) bool: a phrase of the text names both."""
        phrases = [re.split(r"[,.:;]", text.lower()) for text in texts]
        rows = [
            [[any(_in(f, p) and _in(a, p) for p in own) for a in self.names["places"]] for f in self.names["findings"]]
            for own in phrases
        ]
        return torch.tensor(rows)

    def named(self, texts: tuple[str, ...], kind: str) -> Tensor:
        """(B, P) or (B, A) bool: the text names the concept."""
        return torch.tensor([[_in(name, text.lower()) for name in self.names[kind]] for text in texts])

    def _presence(self, states: Tensor, there: Tensor) -> Tensor:
        return F.cross_entropy(self.present(states).flatten(0, 1).float(), there.flatten().long(), reduction="sum")

    def _prototypes(self, states: Tensor, there: Tensor, kind: str) -> Tensor:
        """Of the concepts that are there, over the names of their stream."""
        with torch.no_grad():
            names = self.read(self.tokenise(self.names[kind]).to(states.device)).pooled  # (P, Wt)
        likeness = F.normalize(states[there], dim=-1) @ F.normalize(self.prototype(names), dim=-1).T  # (R, P)
        return F.cross_entropy(likeness.float() / self.temperature, there.nonzero()[:, 1], reduction="sum")


class Stream(nn.Module):
    """Learned queries (Q, W) that read patches by one layer of cross-attention."""

    def __init__(self, queries: int, width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, W) -> (B, Q, W)."""
        queries = self.queries.expand(len(patches), -1, -1)
        keys = self.norm(patches)
        read: Tensor = self.attention(queries, keys, keys, need_weights=False)[0]
        return queries + read


def _in(name: str, text: str) -> bool:
    """Whether the words are in the text as whole words."""
    return re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", text) is not None
