"""A tree of questions is, in loss, gradients and answers, what a row for each question is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny
from tests.fusion.test_fusions import SEEING, stirred
from tests.tiny import ONE_TURN, QUESTIONS, SECOND_TURN, TAGGED, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator, vlm
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from vlmlab.adapter.mma import MmaAdapter
from vlmlab.adapter.soft_prompt import SoftPromptAdapter
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch, Kind
from vlmlab.data.collate import Collator
from vlmlab.data.questions import split_questions
from vlmlab.fusion.lavi import LaViFusion
from vlmlab.fusion.several import SeveralFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal
from vlmlab.mask.prefix_lm import PrefixLM
from vlmlab.mask.trees import equal_in_trees
from vlmlab.model.branches import unfold
from vlmlab.model.build import build_collator
from vlmlab.model.questions import questions_line, read_questions, unequal_in_trees
from vlmlab.model.vlm import VLM

SAMPLES = [QUESTIONS, ONE_TURN, TAGGED, TEXT_ONLY, SECOND_TURN]
WAYS = ("plain", "packed", "left")
FUSIONS = [name for name in SEEING if unequal_in_trees(stirred(name)) is None]
EQUAL = [path for path in tiny.choices("mask") if equal_in_trees(instantiate(OmegaConf.load(path)))]
Result = tuple[float, dict[str, Tensor]]


def test_what_is_compared() -> None:
    assert {path.stem for path in EQUAL} >= {
        "causal", "bidir", "bidir_all_images", "visual_keys_open", "visual_isolated", "visual_self_only"
    }  # fmt: skip
    assert {*FUSIONS} >= {"concat", "lavi", "gated_xattn"} and "emma" not in FUSIONS


def make(model: VLM, questions: Any, **changes: Any) -> Collator:
    return replace(collator(model), questions=questions, **changes)


def batch_of(model: VLM, questions: Any, way: str, samples: list[Sample] = SAMPLES) -> Batch:
    if way != "left":
        return make(model, questions, pack_length=200 if way == "packed" else None)(samples)
    collate = make(model, questions)
    read = [(sample, part) for sample in samples for part in collate.encode(sample)]
    alone = [[i] for i in range(len(read))]
    return collate._batch([s for s, _ in read], [e for _, e in read], alone, left=True)


def learnt(model: VLM, batch: Batch) -> Result:
    """Sum of the loss over all answers, and the gradients."""
    model.zero_grad()
    outputs = model(batch)
    loss = F.cross_entropy(outputs.logits, outputs.targets, reduction="sum")
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def off(found: Result, want: Result) -> tuple[float, float]:
    """Relative differences of the loss, and of the gradients: of each tensor's largest entry, as far as it has one."""
    (loss, grads), (other, others) = found, want
    assert grads.keys() == others.keys() and len(grads) > 50
    least = 1e-3 * max(float(g.abs().max()) for g in others.values())
    worst = max(float((grads[n] - g).abs().max()) / max(float(g.abs().max()), least) for n, g in others.items())
    return abs(loss - other) / other, worst


def plain_norm(self: Any, x: Tensor) -> Tensor:
    """transformers' own, without its detour through float32."""
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Callable[[VLM], VLM]:
    """Brings models to float64 throughout."""
    monkeypatch.setattr(Qwen2RMSNorm, "forward", plain_norm)
    return lambda model: model.double().eval()


@cache
def fused(name: str) -> VLM:
    return stirred(name)


SINGLE = [name for name in FUSIONS if not isinstance(fused(name).fusion, SeveralFusion)]


@pytest.mark.parametrize("path", EQUAL, ids=lambda p: p.stem)
@pytest.mark.parametrize("name", SINGLE)
def test_a_tree_equals_its_rows(name: str, path: Path, in_float64: Callable[[VLM], VLM]) -> None:
    model = in_float64(copy.deepcopy(fused(name)))
    model.set_mask(instantiate(OmegaConf.load(path)))
    want = learnt(model, batch_of(model, "rows", "plain"))
    limit = 1e-6 if isinstance(model.fusion, LaViFusion) else 1e-12  # LaVi's norms are in float32 in any case
    for way in WAYS:
        batch = batch_of(model, "tree", way)
        assert batch.layout.branch.max() == 2 and len(batch.pixels) == 1 + 1 + 2 + 1
        assert max(off(learnt(model, batch), want)) < limit, way


@pytest.mark.parametrize("name", FUSIONS)
def test_as_it_is_trained_it_differs_by_rounding(name: str) -> None:
    model = fused(name)
    model.set_mask(Bidirectional())
    want = learnt(model, batch_of(model, "rows", "plain"))
    for way in WAYS:
        loss, worst = off(learnt(model, batch_of(model, "tree", way)), want)
        assert loss < 1e-6 and worst < 5e-4, way


def test_the_comparison_sees_a_difference(in_float64: Callable[[VLM], VLM]) -> None:
    """Under prefix_lm the images of a row see its question, and those of a tree see none."""
    model = in_float64(vlm(mask=PrefixLM()))
    want = learnt(model, batch_of(model, "rows", "plain"))
    loss, worst = off(learnt(model, batch_of(model, "tree", "plain")), want)
    assert loss > 1e-4 and worst > 1e-2
    conversation = learnt(model, batch_of(model, "conversation", "plain"))
    assert abs(conversation[0] - want[0]) > 1


@pytest.mark.parametrize("family", [tiny.sliding_qwen2, tiny.gemma3], ids=lambda f: f.__name__)
def test_a_window_counts_positions(family: Callable[[], Path]) -> None:
    """After two other questions the images are as near as after none."""
    model = vlm(lm=HfLanguageModel(str(family())))
    want = learnt(model, batch_of(model, "rows", "plain"))
    for way in WAYS:
        assert max(off(learnt(model, batch_of(model, "tree", way)), want)) < 1e-5


def test_soft_prompts_and_modalities_are_shared(in_float64: Callable[[VLM], VLM]) -> None:
    for adapter in (SoftPromptAdapter(length=3), MmaAdapter()):
        model = vlm()
        model.set_adapter(adapter)
        model = in_float64(model)
        want = learnt(model, batch_of(model, "rows", "plain"))
        assert max(off(learnt(model, batch_of(model, "tree", "packed")), want)) < 1e-11


# -- nothing reaches another question ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSIONS)
def test_no_question_reaches_another(name: str) -> None:
    """Gradients of each answer's logits at the embeddings of another question, and of its own later answers, are 0."""
    model = fused(name)
    batch = batch_of(model, "tree", "packed", [QUESTIONS, TAGGED])
    seen = model.see(batch)
    embeds = model.embed(batch, seen).detach().requires_grad_()
    states = model.lm.states(embeds, batch.layout, model.mask, model.inside(batch, seen))
    layout, told = batch.layout, batch.labels[0] != -100
    for at in told.nonzero()[:, 0].tolist():
        logit = model.lm.logits(states[0, at - 1 : at])[0, batch.labels[0, at]]
        (gradient,) = torch.autograd.grad(logit, embeds, retain_graph=True)
        reached = gradient[0].abs().amax(-1) > 0
        same = (layout.segment[0] == layout.segment[0, at]) & (
            (layout.branch[0] == -1) | (layout.branch[0] == layout.branch[0, at])
        )
        assert torch.equal(reached, same & (torch.arange(len(same)) < at)), at


# -- answers -----------------------------------------------------------------------------------------------------------


def prompts() -> list[Sample]:
    """Questions about the same images one after the other, and others between them."""
    same = [replace(one, image_ids=("a",)) for one in split_questions(QUESTIONS)]
    later = [replace(one, id=f"again{k}") for k, one in enumerate(same[:2])]
    tagged = [replace(one, image_ids=("b", "c")) for one in split_questions(TAGGED)]
    return [*same, TWO_IMAGES, *later, *tagged, TEXT_ONLY, TWO_TURNS]


BIDIR = next(path for path in EQUAL if path.stem == "bidir")


@pytest.mark.parametrize(("name", "path"), [*((n, BIDIR) for n in FUSIONS), *(("concat", p) for p in EQUAL)])
def test_a_branch_is_answered_as_its_own_row(name: str, path: Path) -> None:
    model = fused(name)
    model.set_mask(instantiate(OmegaConf.load(path)))
    rows, tree = (make(model, questions).ask(prompts()) for questions in ("rows", "tree"))
    assert len(tree.input_ids) == 6 < len(rows.input_ids) == 10 and len(tree.pixels) < len(rows.pixels)
    texts = model.generate(rows, 5, eos_token_id=-1)
    assert model.generate(tree, 5, eos_token_id=-1) == texts and len({*texts}) > 2


@pytest.mark.parametrize("family", [tiny.sliding_qwen2, tiny.gemma3, tiny.llama], ids=lambda f: f.__name__)
def test_families_are_answered_alike(family: Callable[[], Path]) -> None:
    model = vlm(lm=HfLanguageModel(str(family())))
    rows, tree = (model.generate(make(model, q).ask(prompts()), 8, eos_token_id=-1) for q in ("rows", "tree"))
    assert rows == tree


def test_what_is_shared_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlm()
    seen: list[tuple[int, ...]] = []
    hook = lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))  # noqa: E731
    handle = model.lm.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    same = [replace(one, image_ids=("a",)) for one in split_questions(QUESTIONS)]
    batch = make(model, "tree").ask(same)
    model.generate(batch, 1)
    handle.remove()
    shared = int((batch.layout.branch == -1).sum() - (~batch.layout.valid).sum())
    longest = max(int((batch.layout.branch == k).sum()) for k in range(3))
    assert seen == [(1, shared), (3, longest)]


def test_unfolding() -> None:
    batch = make(vlm(), "tree").ask([*prompts()[:3], TEXT_ONLY])
    rows = unfold(batch.layout)
    layout = rows.layout(batch.layout)
    assert rows.tree.tolist() == [0, 0, 0, 1] and rows.first.tolist() == [0, 3]
    want = make(vlm(), "rows").ask([*prompts()[:3], TEXT_ONLY])
    for k in range(4):
        real, other = layout.valid[k], want.layout.valid[k]
        assert torch.equal(rows.of(batch.input_ids)[k, real], want.input_ids[k, other])
        for name in ("kind", "image", "position", "role"):
            assert torch.equal(getattr(layout, name)[k, real], getattr(want.layout, name)[k, other])
        assert layout.valid[k, -1] and layout.kind[k, ~real].eq(Kind.PAD).all()
    assert rows.trunk == int(layout.valid[3].sum()) - 1 or rows.trunk == int((layout.branch[0] == -1).sum())


# -- what cannot be a tree is said -------------------------------------------------------------------------------------


def settings(questions: str | None) -> Any:
    collate = {"max_length": 512, "pack_length": None} | ({} if questions is None else {"questions": questions})
    return OmegaConf.create({"collate": collate})


def reading() -> Iterator[tuple[VLM, str]]:
    yield vlm(mask=PrefixLM()), "PrefixLM lets what comes before the question see some of it"
    yield stirred("emma"), "the fusion reads the question"
    model = vlm()
    words = model.lm.model.get_input_embeddings().num_embeddings
    widths = model.encoder.width, model.lm.width
    connector = QFormerConnector(*widths, queries=3, heads=4, instruction=True, vocab_size=words)
    yield vlm(connector=connector), "the connector reads the question"


def test_what_reads_the_question_asks_one_a_row() -> None:
    for model, why in reading():
        assert unequal_in_trees(model) == why
        assert read_questions(settings("tree"), model, "chat") == ("rows", why)
        line = questions_line(settings("tree"), model, "chat", SAMPLES)
        assert line == f"note: collate.questions=tree: one question a row here, since {why}"
        assert read_questions(settings("rows"), model, "chat") == ("rows", "")
        split = isinstance(model.mask, Bidirectional)
        for unsaid in (None, "conversation"):
            assert read_questions(settings(unsaid), model, "chat") == (("rows", why) if split else ("conversation", ""))
            line = questions_line(settings(unsaid), model, "chat", SAMPLES)
            said = f"note: collate.questions=conversation: one question a row here, since {why}"
            assert line == (f"{said}; collate.questions=whole keeps conversations" if split else None)
            assert read_questions(settings(unsaid), model, "plain") == ("conversation", "")
        assert read_questions(settings("whole"), model, "chat") == ("conversation", "")
        assert questions_line(settings("whole"), model, "chat", SAMPLES) is None


@torch.no_grad()
def test_a_connector_that_reads_the_question_reads_the_one_that_it_answers() -> None:
    """Of a conversation it reads the first question; split, each row is what a benchmark asks."""
    *_, (model, _) = reading()
    tiny.spread(model.connector, seed=2)
    whole, split = (build_collator(settings(kind), model, "chat")([QUESTIONS]) for kind in ("whole", None))
    assert whole.instructions().shape[0] == 1 and len(split.images) == len(QUESTIONS.turns)
    alone = [build_collator(settings(None), model, "chat").ask([one]) for one in split_questions(QUESTIONS)]
    tokens = model.see(split).tokens
    assert tokens is not None
    for k, asked in enumerate(alone):
        own = model.see(asked).tokens
        assert own is not None and tiny.worst(tokens[k], own[0]) < 1e-5
    first = model.see(whole).tokens
    assert first is not None and tiny.worst(first[0], tokens[0]) < 1e-5
    assert tiny.worst(first[0], tokens[1]) > 1e-4


def test_what_is_said_of_the_data() -> None:
    model = vlm(mask=Causal())
    assert questions_line(settings(None), model, "chat", SAMPLES) is None
    assert questions_line(settings("conversation"), model, "chat", SAMPLES) is None
    assert questions_line(settings("tree"), model, "plain", SAMPLES) == (
        "note: collate.questions=tree: conversations here, since prompt=plain asks no questions"
    )
    assert questions_line(settings("rows"), model, "chat", SAMPLES) == (
        "collate.questions=rows: one question a row, as 2 of the first 5 samples; "
        "1 stay conversations (no image, or one elsewhere than at the beginning)"
    )
    assert questions_line(settings("tree"), model, "chat", [QUESTIONS]) == (
        "collate.questions=tree: trees, as 1 of the first 1 samples"
    )
    assert build_collator(settings("tree"), model, "chat").questions == "tree"
    assert build_collator(settings("tree"), model, "text").questions == "conversation"
    assert build_collator(settings(None), model, "chat").questions == "conversation"
