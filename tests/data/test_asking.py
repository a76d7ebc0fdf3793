"""What is asked in generation is what was learnt, with the templates and generation settings of the families.

The templates are written after theirs: where blanks are, what ends a turn, what the settings name as the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.tiny import ONE_TURN, SAMPLES, TEXT_ONLY, TWO_TURNS, WORDS, text_config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.asking import APART, check_prompt, sent
from vlmlab.data.chat import IGNORE, ChatEncoder, Encoded
from vlmlab.data.collate import Collator
from vlmlab.lm.causal import CausalLanguageModel

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
BLANK = (  # the generation prompt ends in a blank
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def bytes_of(template: str, eos: str, *others: str, bos: str | None = None, begins: bool = False) -> Any:
    """A byte-level BPE as Llama 3, Qwen2 and SmolLM have one; its offsets are trimmed where it `begins` by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [f"{word} {word}" for word in WORDS]
    bpe.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    special = dict.fromkeys((*([bos] if bos else []), eos, *others, "<|image|>"))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begins:
        start = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token=bos, chat_template=template)


def pieces_of(template: str, eos: str, *others: AddedToken, prepends: bool = True) -> Any:
    """A BPE over characters whose blank is a letter, as SentencePiece has it; Gemma's prepends none."""
    letters = sorted({letter for word in WORDS for letter in word.replace(" ", "▁")} | {"▁"})
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * prepends
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] * prepends
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([*WORDS] * 3, trainer)
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are words of the vocabulary
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", eos, "<|image|>")])
    bpe.add_tokens(list(others))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


def turn_tokens(*tokens: str, **options: Any) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, **options) for token in tokens]


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template, the end of a turn, what its settings name as that, and whether it has a system."""

    make: Callable[[], Any]
    end: str
    settings: tuple[str, ...]
    system: bool = True


FAMILIES = {
    "llama3": Family(
        lambda: bytes_of(
            LLAMA3, "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
            bos="<|begin_of_text|>", begins=True,
        ),
        "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "qwen2": Family(
        lambda: bytes_of(DEFAULT_SYSTEM + CHATML, "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
        "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen2_5_base": Family(
        lambda: bytes_of(DEFAULT_SYSTEM + CHATML, "<|endoftext|>", "<|im_end|>", "<|im_start|>"),
        "<|im_end|>", ("<|endoftext|>",),
    ),
    "smollm": Family(
        lambda: bytes_of(CHATML, "<|im_end|>", "<|endoftext|>", bos="<|im_start|>"), "<|im_end|>", ("<|endoftext|>",)
    ),
    "mistral": Family(lambda: pieces_of(MISTRAL, "</s>"), "</s>", ("</s>",), system=False),
    "mistral_v3": Family(
        lambda: pieces_of(MISTRAL, "</s>", *turn_tokens("[INST]", "[/INST]", special=True)), "</s>", (), system=False
    ),
    "gemma": Family(
        lambda: pieces_of(
            GEMMA, "<eos>", *turn_tokens("<start_of_turn>", "<end_of_turn>", special=False), prepends=False
        ),
        "<end_of_turn>", ("<eos>",), system=False,
    ),
    "phi3": Family(
        lambda: pieces_of(
            PHI3, "<|endoftext|>",
            *turn_tokens("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", special=False, rstrip=True),
        ),
        "<|end|>", ("<|endoftext|>", "<|end|>"),
    ),
    "blank": Family(lambda: bytes_of(BLANK, "</s>"), "</s>", ("</s>",)),
    "blank, trimmed": Family(lambda: bytes_of(BLANK, "</s>", bos="<s>", begins=True), "</s>", ("</s>",)),
    "blank, pieces": Family(lambda: pieces_of(BLANK, "</s>"), "</s>", ("</s>",)),
}  # fmt: skip
ANSWERS = ("red", "two green squares", "a", "5 of 7", "(yes)", "Ünïcode 東京 🙂", "two\nlines", "- a\n- b", "'s")
HARD = [
    Sample(f"hard{k}", ONE_TURN.images, (Turn("what", answer), Turn("red", answer))) for k, answer in enumerate(ANSWERS)
]


@cache
def tokenizer(name: str) -> Any:
    made = FAMILIES[name].make()
    made.name_or_path = f"somebody/{name}"
    return made


def encoder(name: str, tokens: int = 3, **options: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer(name), "<|image|>", tokens, **options)


def collator(encode: ChatEncoder) -> Collator:
    return Collator(encoder=encode, resize=None, pad_id=0)


def runs(encoded: Encoded) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for k, label in enumerate(encoded.labels):
        if label != IGNORE:
            found[-1].append(k)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_the_beginning_of_what_is_learnt_and_answers_end_where_generation_stops(name: str) -> None:
    encode, family = encoder(name), FAMILIES[name]
    for sample in (*SAMPLES, *HARD):
        encoded = encode.train(sample)
        assert len(runs(encoded)) == len(sample.turns)
        for run, turn in zip(runs(encoded), sample.turns, strict=True):
            assert encode.tokenizer.decode(encoded.ids[run[0] : run[-1]]).strip() == turn.answer
            assert encoded.ids[run[-1]] == encode.tokenizer.convert_tokens_to_ids(family.end)
            assert encoded.ids[run[-1]] in encode.stops
        last = runs(encoded)[-1]
        assert encode.ask(sample).ids == encoded.ids[: last[0]]
        assert set(check_prompt(collator(encode), sample)) <= ({APART} if name.startswith("blank") else set())
    assert check_prompt(collator(encode), HARD[0]) == [APART] * name.startswith("blank")


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_tokens_are_the_end_of_answers_whatever_settings_say(name: str) -> None:
    family, made = FAMILIES[name], tokenizer(name)
    ids = {token: made.convert_tokens_to_ids(token) for token in (*family.settings, family.end, made.eos_token)}
    lm = CausalLanguageModel(Qwen2ForCausalLM(Qwen2Config(**text_config(num_hidden_layers=1, vocab_size=800))), made)
    for settings in ([], list(family.settings)):
        lm.__dict__.pop("stop_ids", None)
        lm.model.generation_config = GenerationConfig(eos_token_id=[ids[token] for token in settings] or None)
        assert set(lm.stop_ids) == {ids[family.end], ids[made.eos_token], *(ids[token] for token in settings)}
    end = ids[family.end]
    word = made("red", add_special_tokens=False)["input_ids"]
    assert lm.texts(torch.tensor([[*word, end, *word]]), lm.stop_ids) == ["red"]
    assert family.end in lm.stops_line()
    made.clean_up_tokenization_spaces = True
    spaced = made("red , blue .", add_special_tokens=False)["input_ids"]
    assert lm.texts(torch.tensor([spaced]), lm.stop_ids) == ["red , blue ."]
    made.clean_up_tokenization_spaces = False


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma", "phi3", "blank"])
def test_a_plain_prompt_ends_in_the_end_token(name: str) -> None:
    encode = encoder(name, prompt="plain")
    encoded = encode.train(ONE_TURN)
    assert encoded.labels[-1] == encode.tokenizer.eos_token_id in encode.stops
    assert check_prompt(collator(encode), TWO_TURNS) == []


def test_the_demo_prompts_are_read_in_one_piece() -> None:
    """The tokenizers that ship put no blank before an answer, so their tokens are what they were."""
    from vlmlab.lm.embedded import EmbeddedLanguageModel

    lm = EmbeddedLanguageModel()
    encode = ChatEncoder(lm.tokenizer, lm.image_token, 3)
    for sample in SAMPLES:
        assert not encode.merges(sample) and check_prompt(collator(encode), sample) == []
    assert lm.stop_ids == [lm.tokenizer.eos_token_id]


# -- templates that do not ask what they teach -------------------------------------------------------------------------


def with_template(template: str, name: str = "qwen2") -> ChatEncoder:
    made = FAMILIES[name].make()
    made.chat_template, made.name_or_path = template, "somebody/broken"
    return ChatEncoder(made, "<|image|>", 3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
            "does not go on from its own",
        ),
        (CHATML.replace("+ '<|im_end|>\n'", "+ '\n'"), "puts no end token after an answer"),
        (
            CHATML.replace("m['content'] +", "m['content'] | upper +"),
            "does not print the answer 'two green squares' as",
        ),
    ],
)
def test_a_template_that_teaches_something_else_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError, match=f"somebody/broken {message}") as caught:
        with_template(template).train(ONE_TURN)
    assert not isinstance(caught.value, DataError) and len(str(caught.value)) <= 300


def test_a_marked_template_whose_generation_prompt_is_another_is_refused() -> None:
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    encode = with_template(marked)
    encode.train(ONE_TURN)
    with pytest.raises(
        UserError, match=r"Sample one: generation would be asked .*assistant' and learnt is what follows"
    ):
        check_prompt(collator(encode), ONE_TURN)


@pytest.mark.parametrize(
    "template",
    [CHATML + "{% endif %}", CHATML.replace("m['content']", "m['content'] | shout"), "{{ raise_exception('never') }}",
     "{{ messages[0]['content'] + 1 }}", "{{ nothing.at.all }}"],
)  # fmt: skip
def test_a_template_that_always_raises_is_refused_at_once(template: str) -> None:
    with pytest.raises(UserError, match=r"chat template of somebody/broken cannot be rendered \(") as caught:
        with_template(template)
    assert not isinstance(caught.value, DataError) and "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.system])
def test_a_row_that_a_template_refuses_is_a_bad_row(name: str) -> None:
    encode = encoder(name)
    assert encode.train(TEXT_ONLY)
    for use in (encode.train, encode.ask):
        with pytest.raises(
            DataError, match=rf"Sample text is refused by the chat template of somebody/{name} \("
        ) as caught:
            use(replace(TEXT_ONLY, system="Be brief."))
        assert len(str(caught.value)) <= 300


def test_a_row_that_a_template_changes_is_a_bad_row() -> None:
    encode = with_template(CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +"))
    assert encode.train(ONE_TURN)
    with pytest.raises(DataError, match=r"Sample one: .*does not print the answer"):
        encode.train(replace(ONE_TURN, turns=(Turn("what", "<think>hm</think>red"),)))


def test_the_prompt_as_it_is_sent() -> None:
    assert sent(encoder("smollm"), ONE_TURN) == repr(
        "<|im_start|>user\n[image 1: 3 tokens]what colour is it<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sent(encoder("blank"), TEXT_ONLY) == repr("USER: how many ASSISTANT: ")


def test_an_answer_that_its_tokens_do_not_hold_is_a_note() -> None:
    made = FAMILIES["qwen2"].make()
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert check_prompt(
        collator(ChatEncoder(made, "<|image|>", 3)), replace(ONE_TURN, turns=(Turn("What", "Red"),))
    ) == ["an answer does not come back from its tokens as it is written"]
