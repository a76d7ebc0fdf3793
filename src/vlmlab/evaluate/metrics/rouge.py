"""ROUGE-L (Lin 2004) as coco-caption computes it: beta 1.2, best precision and best recall over the references."""

from __future__ import annotations

from collections.abc import Sequence

Tokens = Sequence[str]


def longest_common_subsequence(first: Tokens, second: Tokens) -> int:
    """Length of the longest sequence of words that both contain in this order."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidate: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """ROUGE-L of one caption, 0..1. Precision and recall may come from different references, as in coco-caption."""
    if not candidate:
        return 0.0
    common = [(longest_common_subsequence(reference, candidate), len(reference)) for reference in references]
    precision = max((lcs / len(candidate) for lcs, _ in common), default=0.0)
    recall = max((lcs / length for lcs, length in common if length), default=0.0)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
