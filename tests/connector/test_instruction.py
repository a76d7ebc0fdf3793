"""How the user's words reach a connector: what they are, what depends on them, and that nothing leaks through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.connector.features import visual
from tests.tiny import (
    ADJACENT,
    CONF,
    ONE_TURN,
    SAMPLES,
    SECOND_TURN,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    batches,
    collator,
    loaded,
    qwen2,
    siglip,
    spread,
    tokenizer,
    vlm,
    worst,
)
from torch import Tensor, nn

from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.tensors import Batch, Kind, Role, Seen
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.model.build import build_model
from vlmlab.model.vlm import VLM

READERS = ("instruct_qformer", "bliva", "two_token")
WHERE = list(batches())


def reader(name: str, **changes: Any) -> QFormerConnector:
    """A connector of conf/connector for the tiny towers, with large random weights."""
    cfg = OmegaConf.load(CONF / "connector" / f"{name}.yaml")
    cfg.update({"vocab_size": len(tokenizer()), "queries": 4, **changes})
    return spread(instantiate(cfg, in_width=32, out_width=32), seed=2, scale=0.4)


def listed(instructions: Tensor) -> list[list[int]]:
    """The words of every image, without the filling."""
    return [[i for i in row if i >= 0] for row in instructions.tolist()]


# -- what an image's instruction is ------------------------------------------------------------------------------------


def written_out(batch: Batch) -> list[list[int]]:
    """The definition as plain loops: same sample, same number of answer tokens before, text, the user's."""
    found = []
    for b in range(len(batch.input_ids)):
        kind, image, segment, role = (
            getattr(batch.layout, name)[b].tolist() for name in ("kind", "image", "segment", "role")
        )
        length = len(kind)
        answer = [role[k] == Role.ANSWER and kind[k] != Kind.PAD for k in range(length)]
        era = [sum(answer[m] and segment[m] == segment[k] for m in range(k)) for k in range(length)]
        for number in range(max(image) + 1):
            at = image.index(number)
            own = (k for k in range(length) if kind[k] == Kind.TEXT and role[k] == Role.USER)
            chosen = [k for k in own if segment[k] == segment[at] and era[k] == era[at]]
            found.append(batch.input_ids[b, chosen].tolist())
    return found


@pytest.mark.parametrize("where", WHERE)
def test_instructions_are_the_plain_loops(where: str) -> None:
    batch = batches()[where]
    got = batch.instructions()
    assert listed(got) == written_out(batch)
    assert len(got) == len(batch.pixels) and got.shape[1] == max(len(row) for row in listed(got))
    assert not (got[:, :-1].lt(0) & got[:, 1:].ge(0)).any(), "the padding comes after the words"


def test_they_are_the_words_of_the_image_s_own_turn() -> None:
    first, second = (tokenizer().decode(row) for row in listed(batches()["image in each turn"].instructions()))
    assert "see" in first and "what" in first and "how" not in first and "no red" not in first
    assert "how" in second and "see" not in second and "round" not in second
    (late,) = (tokenizer().decode(row) for row in listed(batches()["image in turn two"].instructions()))
    assert "what" in late and "is there" not in late and "yes" not in late and "big" not in late


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.images], ids=lambda s: s.id)
def test_training_and_generation_read_the_same(sample: Any) -> None:
    model = vlm()
    batch, asked = collator(model)([sample]), collator(model).ask([sample])
    assert listed(batch.instructions()) == listed(asked.instructions())


def test_packing_and_padding_change_nothing() -> None:
    model = vlm()
    samples = [TWO_IMAGES, TEXT_ONLY, ONE_TURN, SECOND_TURN, TWO_TURNS, ADJACENT]
    alone = [row for s in samples if s.images for row in listed(collator(model)([s]).instructions())]
    together = collator(model)(samples)
    packed = collator(model, pack_length=1000)(samples)
    assert len(packed.input_ids) == 1 and len(together.input_ids) == len(samples)
    assert listed(together.instructions()) == listed(packed.instructions()) == alone
    assert listed(collator(model).ask(samples).instructions()) == alone


def test_a_plain_prompt_has_no_instruction() -> None:
    batch = collator(vlm(), "plain")([ONE_TURN, TWO_TURNS])
    assert batch.instructions().tolist() == [[-1], [-1]]
    assert collator(vlm())([TEXT_ONLY]).instructions().shape[0] == 0


# -- what depends on it ------------------------------------------------------------------------------------------------

IDS = torch.tensor([[7, 8, 9, -1, -1], [9, 8, 7, 6, 5], [-1, -1, -1, -1, -1]])


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_the_words_change_the_tokens_and_the_filling_does_not(name: str) -> None:
    connector = reader(name)
    tokens = connector(visual(), IDS)
    changed = connector(visual(), torch.where(IDS == 8, 11, IDS))
    assert worst(tokens[:2], changed[:2]) > 1e-3 and worst(tokens[2], changed[2]) == 0
    order = connector(visual(), IDS[:, [1, 0, 2, 3, 4]])
    assert worst(tokens[0], order[0]) > 1e-3, "places matter"
    wide = torch.cat([IDS, torch.full((3, 6), -1)], 1)
    assert worst(connector(visual(), wide), tokens) < 1e-5
    seen = visual()
    alone = [connector(replace(seen, grids=[seen.grids[0][i : i + 1]], hw=seen.hw[:1]), IDS[i, None]) for i in range(3)]
    assert worst(torch.cat(alone), tokens) < 1e-5
    assert worst(connector(visual(), None)[2], tokens[2]) < 1e-5, "no instruction is an empty one"


@torch.no_grad()
def test_words_behind_the_last_place_are_not_read() -> None:
    connector = reader("instruct_qformer", max_words=3)
    long = IDS.clone()
    long[1, 3:] = -1
    assert worst(connector(visual(), IDS), connector(visual(), long)) == 0


@torch.no_grad()
def test_without_the_key_nothing_is_read() -> None:
    connector = reader("qformer")
    assert not connector.reads_instruction and not hasattr(connector, "words")
    assert torch.equal(connector(visual(), IDS), connector(visual()))
    off = reader("two_token", instruction=False)
    assert not off.reads_instruction and torch.equal(off(visual(), IDS), off(visual()))


def test_every_weight_has_a_gradient_even_without_words() -> None:
    """A stage of plain prompts must not fail as one that trains nothing."""
    for name in READERS:
        connector = reader(name)
        connector(visual(), torch.full((3, 1), -1)).square().sum().backward()
        assert [n for n, p in connector.named_parameters() if p.grad is None] == []


def test_the_whole_q_former_has_the_papers_size() -> None:
    """About 188M parameters with its text side (arXiv 2301.12597 section 3.1)."""
    with torch.device("meta"):
        size = QFormerConnector(1408, 768, instruction=True, max_words=512)
    words, places, width, seen = 30522, 512, 768, 1408
    attention, ffn, norm = 4 * width * (width + 1), 2 * 4 * width * width + 5 * width, 2 * width
    cross = 2 * width * (width + 1) + 2 * width * (seen + 1)
    want = 12 * (attention + norm + 2 * (ffn + norm)) + 6 * (cross + norm) + (words + places) * width + norm
    own = 32 * width + 2 * seen + width * (width + 1)  # queries, norm of the features, last layer
    assert sum(p.numel() for p in size.parameters()) == want + own
    assert abs(want - 188e6) < 3e6


# -- through the whole model -------------------------------------------------------------------------------------------


def model_with(name: str) -> VLM:
    return vlm(connector=reader(name))


@contextmanager
def leaves(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """What these modules return while this is open, cut off and with a gradient."""
    found: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handles = [module.register_forward_hook(cut) for module in modules]
    yield found
    for handle in handles:
        handle.remove()


def leak(model: VLM, batch: Batch) -> tuple[float, float]:
    """Largest gradient of an answer's logit to what it must not know, and to a word that a connector has read.

    It must know no answer token from its own on, no later turn and no other packed sample.
    """
    places = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    read = replace(batch, input_ids=places).instructions()  # (I, T) where each word is
    rows, era, segment = batch.images.row, batch.layout.era, batch.layout.segment
    answer = batch.layout.role.eq(Role.ANSWER) & batch.layout.valid
    with leaves(model.connector.words, model.lm.model.get_input_embeddings()) as found:
        embeds = model.embed(batch)
        words, text = found  # (I, T, W), (B, S, D): looked up in this order
    read = read[:, : words.shape[1]]  # the connector has a last place
    logits = model.lm.logits(model.lm.states(embeds, batch.layout, model.mask))
    bad = good = 0.0
    for t in range(1, places.shape[1]):
        told = batch.labels[:, t].ne(-100)
        if not told.any():
            continue
        chosen = logits[told, t - 1].gather(1, batch.input_ids[told, t, None]).sum()
        of_words, of_text = (g.abs().amax(-1) for g in torch.autograd.grad(chosen, [words, text], retain_graph=True))
        hidden = (answer & (places >= t)) | (era > era[:, t, None]) | (segment != segment[:, t, None])
        hidden &= told[:, None]
        hidden_words = hidden[rows[:, None], read.clamp(min=0)]
        bad = max(bad, float((of_text * hidden).max()), float((of_words * (hidden_words & read.ge(0))).max()))
        bad = max(bad, float((of_words * read.lt(0)).max()))
        good = max(good, float(of_words.max()))
    return bad, good


CASES = {
    "one turn": [ONE_TURN],
    "two turns": [TWO_TURNS],
    "image in turn two": [SECOND_TURN],
    "image in each turn": [TWO_IMAGES],
    "packed": [TWO_IMAGES, ONE_TURN, SECOND_TURN],
    "right padding": [*SAMPLES],
}


@pytest.mark.parametrize("where", CASES)
@pytest.mark.parametrize("name", READERS)
def test_no_answer_logit_depends_on_later_answers_or_turns(name: str, where: str) -> None:
    model = model_with(name).requires_grad_(False)
    batch = collator(model, pack_length=1000 if where == "packed" else None)(CASES[where])
    bad, good = leak(model, batch)
    assert bad == 0.0 and good > 1e-4


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_other_later_answers_leave_every_earlier_logit_as_it_is(name: str) -> None:
    """The same without gradients: ids are what the connector looks up."""
    model = model_with(name)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, TWO_TURNS])
    answer = batch.layout.role.eq(Role.ANSWER)
    want = all_logits(model, batch)
    for t in answer[0].nonzero()[::3, 0].tolist():
        later = answer & (torch.arange(answer.shape[1]) >= t)
        other = replace(batch, input_ids=torch.where(later, 5 + (batch.input_ids + 1) % 200, batch.input_ids))
        got = all_logits(model, other)
        assert worst(got[:, :t], want[:, :t]) == 0 and worst(got, want) > 1e-3


def all_logits(model: VLM, batch: Batch) -> Tensor:
    embeds = model.embed(batch)
    return model.lm.logits(model.lm.states(embeds, batch.layout, model.mask))


def without(rule: str) -> Callable[[Batch], Tensor]:
    """``Batch.instructions`` without one of its rules."""
    honest = Batch.instructions

    def planted(batch: Batch) -> Tensor:
        layout = batch.layout
        role = torch.where(layout.role == Role.ANSWER, int(Role.USER), layout.role)
        if rule == "role":  # no answers: no eras either
            return honest(replace(batch, layout=replace(layout, role=role)))
        if rule == "segment":
            return honest(replace(batch, layout=replace(layout, segment=torch.zeros_like(layout.segment), role=role)))
        return honest(batch)

    return planted


@pytest.mark.parametrize(("rule", "where"), [("role", "one"), ("role", "two"), ("segment", "packed")])
def test_the_leak_test_can_fail(rule: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("instruct_qformer").requires_grad_(False)
    samples = {"one": [ONE_TURN], "two": [TWO_TURNS], "packed": [TWO_IMAGES, ONE_TURN]}[where]
    batch = collator(model, pack_length=1000)(samples)
    monkeypatch.setattr(Batch, "instructions", without(rule))
    assert leak(model, batch)[0] > 1e-6


@pytest.mark.parametrize("name", [*READERS, "ovis"])
@torch.no_grad()
def test_cached_decoding_equals_full_forwards(name: str) -> None:
    """Also of the instruction: the words generated so far are answers, and are not read."""
    model = vlm(connector=spread(_ovis(), seed=2)) if name == "ovis" else model_with(name)
    batch = collator(model).ask([TWO_IMAGES, ONE_TURN, TWO_TURNS])
    embeds = model.embed(batch)
    steps = {"eos_token_id": -1, "output_logits": True, "return_dict_in_generate": True}
    out = model.lm.generate(embeds, batch.layout, model.mask, 6, **steps)
    ids = torch.cat([batch.input_ids, out.sequences], 1)
    grown = replace(batch, input_ids=ids, layout=batch.layout.extended(ids.shape[1]))
    want = all_logits(model, grown)
    first = batch.input_ids.shape[1] - 1
    for step, got in enumerate(out.logits):
        assert worst(got, want[:, first + step]) < 1e-5
    assert listed(grown.instructions()) == listed(batch.instructions())


def _ovis() -> nn.Module:
    return instantiate(OmegaConf.load(CONF / "connector" / "ovis.yaml"), in_width=32, out_width=32, words=40)


# -- composition -------------------------------------------------------------------------------------------------------


def config(**connector: Any) -> Any:
    groups = {"encoder": "hf", "lm": "hf", "mask": "bidir", "fusion": "concat", "connector": "instruct_qformer"}
    cfg = OmegaConf.create({group: loaded(CONF / group / f"{name}.yaml") for group, name in groups.items()})
    cfg.encoder.path, cfg.lm.path = str(siglip()), str(qwen2())
    cfg.connector.update(connector)
    OmegaConf.set_struct(cfg, True)
    return cfg


def test_the_lms_vocabulary_reaches_the_connector() -> None:
    cfg = config()
    model = build_model(cfg)
    assert model.connector.words.num_embeddings == model.lm.model.get_input_embeddings().num_embeddings
    assert cfg.connector.vocab_size is None, "the configuration stays as it was written"
    assert build_model(config(vocab_size=900)).connector.words.num_embeddings == 900
    several = OmegaConf.create({"parts": {"a": dict(cfg.connector), "b": {"side": 2}}, "vocab_size": 3})
    from vlmlab.model.build import _with_vocabulary

    filled = _with_vocabulary(several, 77)
    assert filled.parts.a.vocab_size == 77 and filled.vocab_size == 3 and several.parts.a.vocab_size is None


def test_an_image_without_a_position_has_its_instruction() -> None:
    """Under a fusion that puts nothing into the sequence a reader reads what it reads under concat."""

    class Beside(ConcatFusion):
        in_sequence = False

        def tokens_per_image(self, tokens: int) -> int:
            return 0

        def embed(self, seen: Seen, embeds: Tensor, batch: Batch) -> Tensor:
            return embeds

    beside, within = (vlm(connector=reader("instruct_qformer"), fusion=f) for f in (Beside(), ConcatFusion()))
    for pack in (None, 1000):
        ours, theirs = (collator(model, pack_length=pack)(SAMPLES) for model in (beside, within))
        assert not ours.layout.visual.any() and len(ours.images) == len(theirs.images)
        assert torch.equal(ours.instructions(), theirs.instructions())
        assert worst(beside.see(ours).tokens, within.see(theirs).tokens) < 1e-6
