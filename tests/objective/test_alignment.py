"""The alignment objectives by double loops, on one rank and on two."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import ONE_TURN, SECOND_TURN, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator, vlm, worst
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Seen
from vlmlab.objective.base import gathered, symmetric
from vlmlab.objective.patch_text_contrast import PatchTextContrast
from vlmlab.objective.z_loss import ZLoss

NONE: Batch = None  # type: ignore[assignment]
TAU = 0.07


def test_z_loss_and_its_gradient() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    total, count = ZLoss(coefficient=1e-3)(Outputs(logits, torch.arange(5)), NONE)["z_loss"]
    norms = [math.log(sum(math.exp(v) for v in row)) for row in logits.tolist()]
    assert abs(float(total.detach()) - 1e-3 * sum(n * n for n in norms)) < 1e-6 and int(count) == 5
    (gradient,) = torch.autograd.grad(total, logits)
    want = torch.stack([2e-3 * n * row.softmax(-1) for n, row in zip(norms, logits.detach(), strict=True)])
    assert worst(gradient, want) < 1e-7
    half = ZLoss()(Outputs(logits.detach().bfloat16(), torch.arange(5)), NONE)["z_loss"][0]
    assert half.dtype == torch.float32


def similarities(batch: Batch, embeds: Tensor) -> Tensor:
    """(P, P): the mean of all cosines of one sample's visual tokens and another's words, by loops."""
    images, texts = [], []
    for b in range(len(batch.input_ids)):
        for segment in range(int(batch.layout.segment[b].max()) + 1):
            own = [k for k in range(embeds.shape[1]) if batch.layout.segment[b, k] == segment]
            told = [k for k in own if batch.labels[b, k] != -100]
            words = [k for k in told if k + 1 in told]
            visual = [k for k in own if batch.layout.visual[b, k]]
            if visual and words:
                images.append([embeds[b, k] for k in visual])
                texts.append([embeds[b, k] for k in words])
    cosine = F.cosine_similarity
    rows = [[torch.stack([cosine(v, t, dim=0) for v in a for t in b]).mean() for b in texts] for a in images]
    return torch.stack([torch.stack(row) for row in rows])


def cross_entropies(scores: Tensor) -> float:
    """The sum over pairs of both directions' halves."""
    total = 0.0
    for table in (scores / TAU, scores.T / TAU):
        for i, row in enumerate(table.tolist()):
            total += (math.log(sum(math.exp(v) for v in row)) - row[i]) / 2
    return total


@pytest.mark.parametrize("pack", [None, 1000])
def test_patch_text_contrast_is_the_double_loop(pack: int | None) -> None:
    model = vlm()
    batch = collator(model, pack_length=pack)([ONE_TURN, TWO_TURNS, TEXT_ONLY, TWO_IMAGES])
    outputs = model(batch)
    total, count = PatchTextContrast()(outputs, batch)["patch_text_contrast"]
    assert outputs.embeds is not None and int(count) == 3, "the sample without an image is not a pair"
    want = cross_entropies(similarities(batch, outputs.embeds.detach()))
    assert abs(float(total.detach()) - want) < 1e-4 * want
    total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.connector.parameters())


def test_the_end_token_is_no_word() -> None:
    model = vlm()
    batch = collator(model, "plain")([ONE_TURN, TWO_TURNS])
    outputs = model(batch)
    ends = batch.labels == model.lm.tokenizer.eos_token_id
    assert ends.sum() == 2 and outputs.embeds is not None
    other = outputs.embeds.masked_scatter(ends[..., None], torch.randn(2, outputs.embeds.shape[-1]))
    losses = [PatchTextContrast()(replace(outputs, embeds=e), batch) for e in (outputs.embeds, other)]
    assert losses[0]["patch_text_contrast"][0] == losses[1]["patch_text_contrast"][0]


def test_alike_pairs_cost_less() -> None:
    """Descending the loss alone brings every image nearest to its own words."""
    model = vlm()
    batch = collator(model, "plain")([ONE_TURN, TWO_TURNS, SECOND_TURN])
    embeds = model(batch).embeds.detach()
    free = torch.nn.Parameter(embeds[batch.layout.visual].clone())
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(60):
        now = embeds.masked_scatter(batch.layout.visual[..., None], free)
        loss = PatchTextContrast()(Outputs(now, now, seen=Seen(tokens=free), embeds=now), batch)["patch_text_contrast"][
            0
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = similarities(batch, embeds.masked_scatter(batch.layout.visual[..., None], free.detach()))
    assert final.argmax(1).tolist() == final.argmax(0).tolist() == [0, 1, 2]


def test_without_an_image_there_is_no_pair() -> None:
    model = vlm()
    batch = collator(model)([TEXT_ONLY])
    total, count = PatchTextContrast()(model(batch), batch)["patch_text_contrast"]
    assert float(total.detach()) == 0.0 and int(count) == 0


def test_images_beside_the_sequence_are_refused() -> None:
    model = vlm()
    batch = collator(model)([ONE_TURN])
    beside = replace(batch, layout=replace(batch.layout, kind=batch.layout.kind.clamp(max=1)))
    with pytest.raises(UserError, match="fusion=concat"):
        PatchTextContrast()(model(batch), beside)


# -- two ranks ---------------------------------------------------------------------------------------------------------


def rows(rank: int, sizes: tuple[int, int]) -> Tensor:
    """This rank's images and texts side by side."""
    return torch.randn(sizes[rank], 2, 4, generator=torch.Generator().manual_seed(rank))


def loss(mine: Tensor, tau: Tensor) -> Tensor:
    everything, own = gathered(mine)
    scores = everything[:, 0] @ everything[:, 1].T
    return symmetric(scores, scores.T, tau, own, 0.1)


def one_rank(rank: int, sizes: tuple[int, int], file: str, results: multiprocessing.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mine, tau = rows(rank, sizes).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    value = loss(mine, tau)
    if len(mine):  # a rank without an image has no backward pass
        value.backward()
    results.put((rank, float(value), mine.grad.tolist() if len(mine) else [], float(tau.grad or 0.0)))
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(3, 2), (3, 0)])
def test_two_ranks_are_one(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Values, gradients of rows and of the temperature, summed over ranks; no rank waits in the backward pass."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    file = str(tmp_path / "store")
    ranks = [context.Process(target=one_rank, args=(r, sizes, file, results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=100) for _ in ranks)
    for process in ranks:
        process.join()
    whole = torch.cat([rows(0, sizes), rows(1, sizes)]).requires_grad_()
    tau = torch.tensor(0.5, requires_grad=True)
    scores = whole[:, 0] @ whole[:, 1].T / tau
    own = torch.arange(len(whole))
    want = sum(F.cross_entropy(s, own, reduction="sum", label_smoothing=0.1) for s in (scores, scores.T)) / 2
    want.backward()
    assert abs(sum(value for _, value, _, _ in found) - float(want.detach())) < 1e-4
    assert worst(torch.cat([torch.tensor(g).reshape(-1, 2, 4) for _, _, g, _ in found]), whole.grad) < 1e-5
    assert abs(sum(g for _, _, _, g in found) - float(tau.grad)) < 1e-4
