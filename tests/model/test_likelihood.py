"""Answers to choose from, as the branches of one prompt, are as likely as each is alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny
from tests.fusion.test_fusions import SEEING, stirred

from vlmlab.adapter.soft_prompt import SoftPromptAdapter
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.few_shot import FewShot
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.prefix_lm import PrefixLM
from vlmlab.mask.visual_rows_open import VisualRowsOpen
from vlmlab.model.likelihood import Likelihood, likelihoods, option_likelihoods
from vlmlab.model.questions import unequal_in_options, unequal_in_trees
from vlmlab.model.vlm import VLM

OPTIONS = ("yes", "two green squares", "no", "red blue")
MASKS = tiny.choices("mask")


def choosing(sample: Sample, options: tuple[str, ...] = OPTIONS) -> Sample:
    return replace(sample, turns=(*sample.turns[:-1], replace(sample.turns[-1], options=options)))


SAMPLES = [choosing(tiny.SECOND_TURN, OPTIONS[:2]), choosing(tiny.TWO_IMAGES), choosing(tiny.TEXT_ONLY, OPTIONS[2:])]


@torch.no_grad()
def by_loop(model: VLM, sample: Sample) -> Iterator[tuple[float, bool]]:
    """Each option's answer read by itself, token by token."""
    collate = tiny.collator(model)
    for option in sample.turns[-1].options:
        before = collate.encoder.ask(sample)
        said = replace(sample, turns=(*sample.turns[:-1], replace(sample.turns[-1], answer=option)))
        batch = collate([said])
        seen = model.see(batch)
        states = model.lm.states(model.embed(batch, seen), batch.layout, model.mask, model.inside(batch, seen))
        logits = model.lm.logits(states[0])  # (S, V)
        ids = batch.input_ids[0].tolist()
        total, greedy = 0.0, True
        for place in range(len(before.ids), len(ids)):
            if batch.labels[0, place] == -100:
                break
            total += float(logits[place - 1].double().log_softmax(-1)[ids[place]])
            greedy &= int(logits[place - 1].argmax()) == ids[place]
        yield total, greedy


def near(found: list[list[Likelihood]], want: list[list[Likelihood]], limit: float = 2e-5) -> bool:
    return all(
        abs(a.log - b.log) < limit and a.greedy == b.greedy
        for some, others in zip(found, want, strict=True)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("path", MASKS, ids=lambda path: path.stem)
def test_branches_equal_single_answers_under_every_mask(path: Path) -> None:
    model = tiny.vlm(mask=instantiate(OmegaConf.load(path)))
    shared = unequal_in_options(model) is None
    assert shared is (path.stem != "visual_rows_open")
    want = [[Likelihood(*pair) for pair in by_loop(model, sample)] for sample in SAMPLES]
    for size in (1, 2, 8):
        assert near(option_likelihoods(model, tiny.collator(model), SAMPLES, size, shared), want)
    assert near(option_likelihoods(model, tiny.collator(model), SAMPLES, 5, shared=False), want)


@pytest.mark.parametrize("name", SEEING)
def test_branches_equal_rows_in_every_fusion(name: str) -> None:
    """Also in one that reads the question: all options have the same."""
    model = stirred(name)
    assert unequal_in_options(model) is None
    rows = option_likelihoods(model, tiny.collator(model), SAMPLES, 8, shared=False)
    assert near(option_likelihoods(model, tiny.collator(model), SAMPLES, 8), rows, 1e-4)
    assert len({round(one.log, 3) for some in rows for one in some}) == 8


def test_what_reads_the_question_shares_it() -> None:
    plain, words = tiny.vlm(), len(tiny.tokenizer())
    assert plain.encoder is not None
    widths = plain.encoder.width, plain.lm.width
    reader = QFormerConnector(*widths, queries=3, heads=4, instruction=True, vocab_size=words)
    model = tiny.vlm(connector=tiny.spread(reader), mask=PrefixLM())
    assert unequal_in_trees(model) is not None and unequal_in_options(model) is None
    rows = option_likelihoods(model, tiny.collator(model), SAMPLES, 8, shared=False)
    assert near(option_likelihoods(model, tiny.collator(model), SAMPLES, 8), rows)


def test_a_window_and_soft_prompts() -> None:
    model = tiny.vlm(lm=HfLanguageModel(str(tiny.sliding_qwen2())))
    model.set_adapter(SoftPromptAdapter(length=3))
    rows = option_likelihoods(model.eval(), tiny.collator(model), SAMPLES, 8, shared=False)
    assert near(option_likelihoods(model, tiny.collator(model), SAMPLES, 8), rows)


def test_long_lists_become_several_trees_and_the_prompt_is_read_once() -> None:
    model = tiny.vlm()
    collate = tiny.collator(model)
    many = choosing(tiny.ONE_TURN, tuple(f"{a} {b}" for a in tiny.WORDS for b in tiny.WORDS))
    batch = collate.choose([many])
    assert len(batch.input_ids) == 1 and len(batch.pixels) == 1 and int(batch.layout.branch.max()) == 48
    collate.encoder.max_length = 150
    several = collate.choose([many])
    assert len(several.input_ids) > 3 and several.input_ids.shape[1] <= 150
    assert near([likelihoods(model, several)], [likelihoods(model, batch)])


def test_after_examples_only_the_last_answer_counts() -> None:
    """k-shot: the examples and their answers are part of the prompt that is shared."""
    one = choosing(Sample("q", (tiny.picture(1),), (Turn("what", "red"),)), ("red", "blue"))
    pool = [Sample(f"p{k}", (tiny.picture(k),), (Turn("how many", "two green"),)) for k in (2, 3, 4)]
    asked = FewShot([one], pool, shots=2)[0]
    assert len(asked.turns) == 3 and asked.turns[-1].options == ("red", "blue")
    model = tiny.vlm()
    want = [[Likelihood(*pair) for pair in by_loop(model, asked)]]
    assert near(option_likelihoods(model, tiny.collator(model), [asked], 1), want)


def test_what_cannot_be_chosen_from() -> None:
    model, collate = tiny.vlm(mask=VisualRowsOpen()), tiny.collator(tiny.vlm())
    assert str(unequal_in_options(model)).startswith("VisualRowsOpen lets what comes before the answer see some of it")
    for shared in (True, False):
        with pytest.raises(DataError, match="Sample one has no options, and scoring=likelihood chooses from some"):
            option_likelihoods(model, collate, [tiny.ONE_TURN], 4, shared)
    with pytest.raises(DataError, match="Sample one has an empty option"):
        option_likelihoods(model, collate, [choosing(tiny.ONE_TURN, ("yes", " "))], 4)


def test_a_template_that_shows_the_answer_in_the_prompt_is_refused() -> None:
    model = tiny.vlm()
    collate = tiny.collator(model)
    encoder = collate.encoder
    train = encoder.train

    def leaking(sample: Sample) -> object:
        return train(replace(sample, turns=(replace(sample.turns[0], prompt=f"what {sample.turns[0].answer}"),)))

    encoder.train = leaking  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match="Sample one: the chat template has another prompt before another answer"):
        collate.choose([choosing(tiny.ONE_TURN)])
