"""Every policy of conf/mask: its matrix by a double loop, the leak rule by gradients, the LM under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.lm.test_hf import asked, cache_free, dense_qwen2
from tests.tiny import (
    batches,
    chat,
    choices,
    gemma3,
    layouts,
    picture,
    qwen2,
    sliding_qwen2,
    tokenizer,
    trees,
    vlm,
)
from torch import Tensor

from vlmlab.contracts.parts import Mask
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Batch, Kind, Layout, Role
from vlmlab.data.collate import Collator
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.base import causal_on_text, ground, not_later, pair, same_era
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal

POLICIES = choices("mask")
LAYOUTS = [*layouts(), "trees"]
CONTROL = "visual_rows_open"
SOUND = [path for path in POLICIES if path.stem != CONTROL]


def given(where: str) -> Batch:
    return trees() if where == "trees" else batches()[where]


def policy(path: Path) -> Mask:
    return instantiate(OmegaConf.load(path))


def test_all_eight_policies_are_there() -> None:
    assert {*OPENS} <= {path.stem for path in POLICIES}
    assert [path.stem for path in POLICIES if getattr(policy(path), "leaks", False)] == [CONTROL]


# -- the rules, written out once more for one pair (i, j) of one row; "opens" is what needs the leak rule --------------


class Row:
    """One row of a layout as plain lists."""

    def __init__(self, layout: Layout, row: int) -> None:
        self.kind, self.image, self.segment, self.role, self.branch = (
            getattr(layout, name)[row].tolist() for name in ("kind", "image", "segment", "role", "branch")
        )

    def visual(self, i: int) -> bool:
        return self.kind[i] == Kind.VISUAL

    def answer(self, i: int) -> bool:
        return self.role[i] == Role.ANSWER

    def own(self, i: int, j: int) -> bool:
        return self.segment[i] == self.segment[j] and self.branch[j] in (-1, self.branch[i])

    def era(self, k: int) -> int:
        return sum(self.answer(m) and self.own(k, m) for m in range(k))


Rule = Callable[[Row, int, int], bool]
NO: Rule = lambda r, i, j: False  # noqa: E731
OPENS: dict[str, Rule] = {
    "causal": NO,
    "bidir": lambda r, i, j: r.visual(i) and r.visual(j) and r.image[i] == r.image[j],
    "bidir_all_images": lambda r, i, j: r.visual(i) and r.visual(j),
    "visual_keys_open": lambda r, i, j: r.visual(j),
    "prefix_lm": lambda r, i, j: not r.answer(i) and not r.answer(j),
    "visual_rows_open": lambda r, i, j: r.visual(i),
    "visual_isolated": NO,
    "visual_self_only": NO,
}
CLOSES: dict[str, Rule] = {
    "visual_isolated": lambda r, i, j: r.visual(i) and not r.visual(j),
    "visual_self_only": lambda r, i, j: r.visual(i) and i != j,
}


def dense(name: str, layout: Layout) -> Tensor:
    """(B, S, S) by a double loop."""
    assert name in OPENS, f"{name} has no rule here; add it to OPENS (and CLOSES)"
    rows, length = layout.kind.shape
    out = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        row = Row(layout, b)
        eras = [row.era(k) for k in range(length)]
        for i in range(length):
            for j in range(length):
                if row.kind[i] == Kind.PAD or row.kind[j] == Kind.PAD:
                    out[b, i, j] = i == j and row.kind[i] == Kind.PAD  # a padded query sees itself, or softmax is empty
                elif row.own(i, j) and not CLOSES.get(name, NO)(row, i, j):
                    out[b, i, j] = j <= i or (OPENS[name](row, i, j) and eras[i] == eras[j])
    return out


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
def test_matrix_equals_the_double_loop(path: Path, where: str) -> None:
    layout = given(where).layout
    got = policy(path)(layout, torch.arange(layout.kind.shape[1]))
    assert got.dtype == torch.bool
    assert torch.equal(got, dense(path.stem, layout))


def test_layouts_are_what_they_are_called() -> None:
    found = layouts()
    assert found["packed"].segment.unique().tolist() == [0, 1, 2]
    assert found["left padding"].kind[:, 0].eq(Kind.PAD).any() and found["left padding"].kind[:, -1].ne(Kind.PAD).all()
    assert found["right padding"].kind[:, -1].eq(Kind.PAD).any()
    tail = found["one turn"].role[0, -1]
    assert tail != Role.ANSWER, "the template's tail comes after the answer"
    first_answer = int(found["image in turn two"].role[0].eq(Role.ANSWER).int().argmax())
    assert int(found["image in turn two"].visual[0].int().argmax()) > first_answer


def text(matrix: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in matrix]


def six() -> Layout:
    """User, two tokens of image 0, one of image 1, two answer tokens."""
    return Layout(
        kind=torch.tensor([[1, 2, 2, 2, 1, 1]]),
        image=torch.tensor([[-1, 0, 0, 1, -1, -1]]),
        tile=torch.tensor([[-1, 0, 0, 0, -1, -1]]),
        segment=torch.zeros(1, 6, dtype=torch.long),
        role=torch.tensor([[1, 1, 1, 1, 2, 2]]),
        position=torch.arange(6)[None],
    )


GOLDEN = {
    "causal": ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"],
    "bidir": ["x.....", "xxx...", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"],
    "bidir_all_images": ["x.....", "xxxx..", "xxxx..", "xxxx..", "xxxxx.", "xxxxxx"],
    "visual_keys_open": ["xxxx..", "xxxx..", "xxxx..", "xxxx..", "xxxxx.", "xxxxxx"],
    "prefix_lm": ["xxxx..", "xxxx..", "xxxx..", "xxxx..", "xxxxx.", "xxxxxx"],
    "visual_isolated": ["x.....", ".x....", ".xx...", ".xxx..", "xxxxx.", "xxxxxx"],
    "visual_self_only": ["x.....", ".x....", "..x...", "...x..", "xxxxx.", "xxxxxx"],
    # the first answer token is of the era before it, so that the images see it: the leak
    "visual_rows_open": ["x.....", "xxxxx.", "xxxxx.", "xxxxx.", "xxxxx.", "xxxxxx"],
}


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
def test_golden_tables(path: Path) -> None:
    assert text(policy(path)(six(), torch.arange(6))[0]) == GOLDEN[path.stem]


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
def test_which_policies_are_causal_where_no_image_stands_in_the_sequence(path: Path) -> None:
    """A composition whose vision takes no positions can say so; the prefix is open with or without images."""
    assert causal_on_text(policy(path)) == (path.stem != "prefix_lm")
    layout = six()
    only_text = Layout(**{**layout.__dict__, "kind": torch.ones_like(layout.kind), "image": layout.image * 0 - 1})
    same = torch.equal(policy(path)(only_text, torch.arange(6)), Causal()(only_text, torch.arange(6)))
    assert same == causal_on_text(policy(path))


def test_era_counts_answers_before_within_the_segment() -> None:
    role = torch.tensor([[1, 2, 2, 1, 2, 1, 1, 2, 0, 0]])
    segment = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1, -1]])
    one = torch.ones_like(role)
    kind = torch.where(segment < 0, 0, 1)
    era = Layout(kind, -one, -one, segment, role, one).era
    assert era[0, :8].tolist() == [0, 0, 1, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
def test_rows_of_any_queries_equal_those_of_the_whole(path: Path) -> None:
    layout = layouts()["packed"]
    whole = policy(path)(layout, torch.arange(layout.kind.shape[1]))
    q = torch.tensor([7, 3, 20])
    assert torch.equal(policy(path)(layout, q), whole[:, q])


def test_labels_never_reach_the_mask(lm: HfLanguageModel) -> None:
    batch = batches()["right padding"]
    seen = []
    for labels in (batch.labels, torch.full_like(batch.labels, 5)):
        changed = Batch(**{**batch.__dict__, "labels": labels})
        seen.append(lm.states(lm.embed(changed.input_ids), changed.layout, Bidirectional()))
    assert torch.equal(*seen)


# -- the leak rule -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm() -> HfLanguageModel:
    """Four layers: a leak that needs several hops shows."""
    return HfLanguageModel(str(qwen2())).eval().requires_grad_(False)


def leak(lm: HfLanguageModel, mask: object, batch: Batch, learnt: Tensor | None = None) -> float:
    """Largest gradient of any answer's logit with respect to itself, a later answer token, another sample or branch."""
    embeds = lm.embed(batch.input_ids).requires_grad_()
    logits = lm.logits(lm.states(embeds, batch.layout, mask))  # (B, S, V)
    answer = batch.layout.role.eq(Role.ANSWER) & batch.layout.valid if learnt is None else learnt
    worst = 0.0
    for t in range(1, embeds.shape[1]):
        rows = batch.labels[:, t].ne(-100)
        if not rows.any():
            continue
        chosen = logits[rows, t - 1].gather(1, batch.input_ids[rows, t, None]).sum()  # rows do not see each other
        (gradient,) = torch.autograd.grad(chosen, embeds, retain_graph=True)
        later = answer & (torch.arange(embeds.shape[1]) >= t)
        foreign = batch.layout.segment != batch.layout.segment[:, t, None]
        foreign |= (batch.layout.branch != -1) & (batch.layout.branch != batch.layout.branch[:, t, None])
        worst = max(worst, float((gradient.abs().amax(-1) * (rows[:, None] & (later | foreign))).max()))
    return worst


@pytest.mark.parametrize("where", ["packed", "right padding", "left padding", "trees"])  # all, alone and together
@pytest.mark.parametrize("path", SOUND, ids=lambda p: p.stem)
def test_no_answer_logit_depends_on_later_answers(path: Path, where: str, lm: HfLanguageModel) -> None:
    assert leak(lm, policy(path), given(where)) == 0.0


@pytest.mark.parametrize("where", layouts())
def test_the_negative_control_leaks(where: str, lm: HfLanguageModel) -> None:
    """Refused for training by ``vlmlab.cli.rules``; here it shows that the test above sees a leak in every layout.

    In a tree it has none: its visual rows are shared, and what is shared sees no branch.
    """
    (path,) = (path for path in POLICIES if path.stem == CONTROL)
    assert leak(lm, policy(path), given(where)) > 1e-6


class AllImagesWithoutEra:
    """Planted: images of different turns see each other, whatever was answered between them."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_visual, k_visual = pair(layout.visual, q)
        return ground(not_later(layout, q) | (q_visual & k_visual), layout, q)


class PrefixWithoutEra:
    """Planted: every token that is not an answer sees every other, the template's tail included."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_answer, k_answer = pair(layout.role == Role.ANSWER, q)
        return ground(not_later(layout, q) | (~q_answer & ~k_answer), layout, q)


class PrefixWithEra:
    """The same with the leak rule."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_answer, k_answer = pair(layout.role == Role.ANSWER, q)
        return ground(not_later(layout, q) | (~q_answer & ~k_answer & same_era(layout, q)), layout, q)


class AcrossSegments:
    """Planted: packed samples see each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        return not_later(layout, q).expand(layout.kind.shape[0], -1, -1)


class AcrossBranches:
    """Planted: the questions of a tree see each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_segment, k_segment = pair(layout.segment, q)
        return not_later(layout, q) & (q_segment == k_segment)


@pytest.mark.parametrize(
    ("mask", "where"),
    [
        (AllImagesWithoutEra(), "image in each turn"),
        (PrefixWithoutEra(), "one turn"),
        (PrefixWithoutEra(), "left padding"),
        (AcrossSegments(), "packed"),
        (AcrossBranches(), "trees"),
    ],
)
def test_the_leak_test_can_fail(mask: object, where: str, lm: HfLanguageModel) -> None:
    assert leak(lm, mask, given(where)) > 1e-6


@pytest.mark.parametrize("where", LAYOUTS)
def test_the_leak_rule_closes_the_planted_leak(where: str, lm: HfLanguageModel) -> None:
    assert leak(lm, PrefixWithEra(), given(where)) == 0.0


# -- a prompt that is learnt itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
def test_what_leaks_where_the_prompt_is_learnt(path: Path, lm: HfLanguageModel) -> None:
    """``prompt: text`` supervises every word: what the rules refuse leaks, and what they let pass does not."""
    turn = Turn("see <image> what <image> how", "no red")
    sample = Sample("between", (picture(8), picture(9)), (turn,))
    encoder = chat(prompt="text")
    collate = Collator(encoder=encoder, resize=lambda x: x.transpose(2, 0, 1), pad_id=tokenizer().pad_token_id)
    batch = collate([sample])
    found = leak(lm, policy(path), batch, learnt=batch.labels.ne(-100))
    assert found > 1e-6 if getattr(policy(path), "shows_prompt", False) else found == 0.0


# -- the LM under each policy ------------------------------------------------------------------------------------------


def embedded(lm: HfLanguageModel, batch: Batch) -> Tensor:
    """(B, S, D); no two visual tokens alike, or averaging over them would look like seeing one."""
    embeds = lm.embed(batch.input_ids)
    noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(3)) * embeds.std()
    return torch.where(batch.layout.visual[..., None], noise, embeds)


def off(lm: HfLanguageModel, batch: Batch, mask: Mask, window: int | None = None) -> float:
    """Largest difference of the states from an own forward in fp64, whose upper two layers may have a window."""
    layout, embeds = batch.layout, embedded(lm, batch)
    q = torch.arange(embeds.shape[1])
    allowed = mask(layout, q)
    near = allowed if window is None else allowed & (q[:, None] - q[None, :] < window)
    want = dense_qwen2(lm.model, embeds, [allowed] * 2 + [near] * 2, layout.position)
    return float((lm.states(embeds, layout, mask) - want)[layout.valid].abs().max())


@pytest.mark.parametrize("where", ["image in each turn", "packed", "left padding", "trees"])
@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
@torch.no_grad()
def test_states_equal_the_dense_reference(path: Path, where: str, lm: HfLanguageModel) -> None:
    assert off(lm, given(where), policy(path)) <= 1e-5


@pytest.fixture(scope="module")
def sliding() -> HfLanguageModel:
    """Two of its four layers see a window of five tokens."""
    return HfLanguageModel(str(sliding_qwen2())).eval()


@pytest.mark.parametrize("where", ["image in each turn", "packed"])
@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
@torch.no_grad()
def test_a_sliding_family_sees_policy_and_window(path: Path, where: str, sliding: HfLanguageModel) -> None:
    assert off(sliding, batches()[where], policy(path), window=5) <= 1e-5
    assert off(sliding, batches()[where], policy(path)) > 1e-3, "the window must matter here"


@pytest.mark.parametrize("tower", [sliding_qwen2, gemma3], ids=lambda t: t.__name__)
@pytest.mark.parametrize("path", SOUND, ids=lambda p: p.stem)  # images of the control change with what is answered
def test_cached_decoding_equals_full_forwards(path: Path, tower: Callable[[], Path]) -> None:
    model = vlm(mask=policy(path), lm=HfLanguageModel(str(tower())))
    batch = asked(model)
    embeds = model.embed(batch)
    want, lead = cache_free(model, batch, 6)
    assert lead > 1e-5, "a tie would make the comparison empty"
    got = model.lm.generate(embeds, batch.layout, model.mask, 6, eos_token_id=-1)
    assert got.tolist() == want.tolist()


@torch.no_grad()
def test_every_policy_makes_another_model(lm: HfLanguageModel) -> None:
    """No two of the eight give the same answers' states: the comparisons above see which mask they hold."""
    batch = batches()["right padding"]
    embeds, answer = embedded(lm, batch), batch.labels.ne(-100)
    states = [lm.states(embeds, batch.layout, policy(path))[answer] for path in POLICIES]
    for i, a in enumerate(states):
        assert all(float((a - b).abs().max()) > 1e-3 for b in states[:i])
