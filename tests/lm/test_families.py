"""Four families with their own chat templates through ``lm=hf``: one step of training, and what exactly is learnt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.test_conf import composed
from tests.tiny import SAMPLES, SECOND_TURN, TWO_TURNS, WORDS, collator, save, siglip, vlm
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.chat import IGNORE, ChatEncoder
from vlmlab.lm.hf import HfLanguageModel

TEMPLATES = Path(__file__).resolve().parents[1] / "fixtures" / "chat_templates"
SOURCES: dict[str, dict[str, str]] = json.loads((TEMPLATES / "sources.json").read_text())


@dataclass(frozen=True)
class Family:
    """A family's classes, its template, and the special tokens that its tokenizer has."""

    config: Any
    model: Any
    template: str
    end: str  # of a turn
    tokens: dict[str, str]  # the tokenizer's named special tokens
    others: tuple[str, ...] = ()
    tied: bool = False
    begins: bool = False  # the tokenizer itself puts its begin token before a text
    swallows: bool = False  # special tokens take the blanks after them, as Phi-3's do
    changes: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "qwen2": Family(
        Qwen2Config, Qwen2ForCausalLM, "qwen2_5", "<|im_end|>",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ("<|im_start|>",), tied=True,
    ),
    "llama": Family(
        LlamaConfig, LlamaForCausalLM, "llama3_2", "<|eot_id|>",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, ("<|start_header_id|>", "<|end_header_id|>"),
        begins=True,
    ),
    "phi3": Family(
        Phi3Config, Phi3ForCausalLM, "phi3", "<|end|>",
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), swallows=True, changes={"sliding_window": 2047},
    ),
    "smollm2": Family(
        LlamaConfig, LlamaForCausalLM, "smollm2", "<|im_end|>",
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, tied=True,
    ),
}  # fmt: skip
HARD = Sample(
    "hard",
    SECOND_TURN.images,
    (
        Turn("Say it", "naïve 東京 🙂 é"),
        Turn("<image>red", "red"),  # the answer is in the prompt too
        Turn("again", "two  greens,\n\tand <b>"),
        Turn("user", "assistant"),
    ),
    system="You say red. ",
)


def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few words, with the family's special tokens and no image token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([*WORDS] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    special = dict.fromkeys((*family.tokens.values(), *family.others))
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=family.swallows) for t in special])
    if family.begins:
        begin = family.tokens["bos_token"]
        start = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))])
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    template = (TEMPLATES / f"{family.template}.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, padding_side="left", **family.tokens)


@cache
def folder(name: str, template: str | None = None) -> Path:
    """A random checkpoint as transformers saves it."""
    family = FAMILIES[name]
    made = tokenizer(family)
    if template is not None:
        made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    config = family.config(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=family.tied,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        **family.changes,
    )
    path = save(family.model(config), f"{name}-{template or family.template}")
    made.save_pretrained(path)
    return path


def encoder(name: str) -> ChatEncoder:
    lm = HfLanguageModel(str(folder(name)))
    return ChatEncoder(lm.tokenizer, lm.image_token, 3)


def said(encode: ChatEncoder, labels: list[int]) -> list[str]:
    """The text of every run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [encode.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_templates_are_those_of_their_source(name: str) -> None:
    assert hashlib.sha256((TEMPLATES / name).read_bytes()).hexdigest() == SOURCES[name]["sha256"]
    assert {path.name for path in TEMPLATES.glob("*.jinja")} == set(SOURCES)


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_are_the_answers_and_the_end_of_their_turns(name: str) -> None:
    encode = encoder(name)
    for sample in (*SAMPLES, HARD):
        encoded = encode.train(sample)
        assert said(encode, encoded.labels) == [turn.answer + FAMILIES[name].end for turn in sample.turns], sample.id
        start = max(i for i, label in enumerate(encoded.labels) if label == IGNORE and i < _last_run(encoded.labels))
        asked = encode.ask(sample)
        assert asked.ids == encoded.ids[: start + 1], sample.id
        assert asked.roles == encoded.roles[: start + 1], sample.id


def _last_run(labels: list[int]) -> int:
    """Where the last run of supervised tokens begins."""
    supervised = [i for i, label in enumerate(labels) if label != IGNORE]
    return next(i for i in reversed(supervised) if labels[i - 1] == IGNORE)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_token_moves_no_other(name: str) -> None:
    before, lm = tokenizer(FAMILIES[name]), HfLanguageModel(str(folder(name)))
    assert "<|image|>" not in before.get_vocab()
    assert lm.tokenizer.get_vocab() == {**before.get_vocab(), "<|image|>": len(before)}
    assert lm.image_id == len(before)
    head, table = lm.model.get_output_embeddings().weight, lm.model.get_input_embeddings().weight
    assert (head is table) == FAMILIES[name].tied and len(head) == len(table) == len(before) + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_of_training(name: str, tmp_path: Path) -> None:
    """The whole way of a run: composed, labelled by the family's template, a step, and its proofs."""
    from vlmlab.runs.config import plain
    from vlmlab.runs.folder import RunFolder
    from vlmlab.train.run import train

    cfg = composed(
        "lm=hf", f"lm.path={folder(name)}", "encoder=hf", f"encoder.path={siglip()}", "recipe=joint", "debug=step",
        "recipe.stages.joint.batch_size=4", "collate.max_length=4096", "precision=fp32", "trainer.progress=false",
    )  # fmt: skip
    with RunFolder(tmp_path) as run:
        run.open(plain(cfg))
        assert train(cfg, tmp_path) is None
        (row,) = [row for row in run.metrics() if "loss" in row]
    assert row["step"] == 1 and 0 < row["loss"] < 100 and row["gradient_norm"] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_a_model(name: str) -> None:
    """What the collator hands to the loss, padded and packed."""
    model = vlm(lm=HfLanguageModel(str(folder(name))))
    encode = ChatEncoder(model.lm.tokenizer, model.lm.image_token, model.tokens_per_image)
    for pack in (None, 2000):
        batch = collator(model, pack_length=pack)(SAMPLES)
        texts = [text for row in batch.labels.tolist() for text in said(encode, row)]
        assert texts == [turn.answer + FAMILIES[name].end for sample in SAMPLES for turn in sample.turns]


def test_a_template_that_rewrites_history_is_refused_by_name() -> None:
    """Qwen3 prints an empty thought before the last answer only, so that every turn changes the one before it."""
    path = folder("qwen2", "qwen3")
    lm = HfLanguageModel(str(path))
    encode = ChatEncoder(lm.tokenizer, lm.image_token, 3)
    with pytest.raises(UserError, match=rf"{path} rewrites earlier turns"):
        encode.train(TWO_TURNS)
    with pytest.raises(UserError, match=rf"{path} does not print the answer 'two green squares' as it comes after"):
        encode.train(SAMPLES[0])


def test_another_template_can_be_given() -> None:
    template = (TEMPLATES / "smollm2.jinja").read_text()
    lm = HfLanguageModel(str(folder("qwen2", "qwen3")), chat_template=template)
    encode = ChatEncoder(lm.tokenizer, lm.image_token, 3)
    assert said(encode, encode.train(TWO_TURNS).labels) == ["red blue<|im_end|>", "green two<|im_end|>"]


def test_the_day_does_not_matter() -> None:
    """Llama 3.2's template prints the date; a run that is resumed tomorrow must see the same tokens."""
    encode = encoder("llama")
    assert "Today Date: 26 Jul 2024" in encode.tokenizer.decode(encode.train(TWO_TURNS).ids)
