"""What is supervised: exactly the answers and their end token, whatever the template of the tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.tiny import (
    ADJACENT,
    ONE_TURN,
    SAMPLES,
    SECOND_TURN,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    chat,
    picture,
    tokenizer,
)
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.chat import ANSWER, IGNORE, SYSTEM, USER, ChatEncoder, Encoded
from vlmlab.lm.tokenizer import CHATML, train_tokenizer

UNMARKED = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
ANSWER_AND_END = "{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}"
LOOSE = CHATML.replace(ANSWER_AND_END, "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
WIDE = "".join(  # the block holds the newline after the end token too
    [
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}",
        "{%- if message['role'] == 'assistant' -%}",
        "{%- generation -%}{{ message['content'] + '<|im_end|>\\n' }}{%- endgeneration -%}",
        "{%- else -%}{{ message['content'] + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
    ]
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
REWRITES = (  # earlier answers lose what comes before </think>, as in some reasoning models
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    made.name_or_path = "somebody/template"
    return made


def special(*tokens: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False, **options) for token in tokens]


def llama3() -> PreTrainedTokenizerFast:
    """Adds a begin token by itself, and trims its offsets."""
    made = train_tokenizer(["red two green"], 300)
    made.add_tokens(special("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), special_tokens=True)
    made.bos_token, made.eos_token, made.chat_template = "<|begin|>", "<|eot_id|>", LLAMA3
    begin = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", made.convert_tokens_to_ids("<|begin|>"))]
    )
    made.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    assert made("red")["input_ids"][0] == made.bos_token_id
    return made


def phi3() -> PreTrainedTokenizerFast:
    """Ends turns by another token than its end token, and that one swallows the blanks after it."""
    made = train_tokenizer(["red two green"], 300)
    made.add_tokens(special("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", rstrip=True), special_tokens=True)
    made.eos_token, made.chat_template = "<|endoftext|>", PHI3
    return made


def zephyr() -> PreTrainedTokenizerFast:
    """Its headers are plain text."""
    made = train_tokenizer(["red two green"], 300)
    made.add_tokens(special("</s>"), special_tokens=True)
    made.eos_token, made.chat_template = "</s>", ZEPHYR
    return made


TEMPLATES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "marked": (chatml, "<|im_end|>"),
    "unmarked": (lambda: chatml(UNMARKED), "<|im_end|>"),
    "end token outside the block": (lambda: chatml(LOOSE), "<|im_end|>"),
    "newline inside the block": (lambda: chatml(WIDE), "<|im_end|>"),
    "llama3": (llama3, "<|eot_id|>"),
    "phi3": (phi3, "<|end|>"),
    "zephyr": (zephyr, "</s>"),
}
HARD = Sample(
    "hard",
    SECOND_TURN.images,
    (
        Turn("Say it", "naïve 東京 🙂 é"),
        Turn("<image>red", "red"),  # the answer is in the prompt too
        Turn("again", "two  greens,\n\tand <b>"),
        Turn("user", "assistant"),
        Turn("short", "a"),
    ),
    system="You say red.",
)


def encoder(name: str, tokens: int = 3) -> ChatEncoder:
    return ChatEncoder(TEMPLATES[name][0](), "<|image|>", tokens)


def runs_of(flags: list[bool]) -> list[list[int]]:
    """Runs of neighbouring positions that are true."""
    runs: list[list[int]] = []
    for i, flag in enumerate(flags):
        if flag and runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        elif flag:
            runs.append([i])
    return runs


def supervised(encoded: Encoded) -> list[list[int]]:
    return runs_of([label != IGNORE for label in encoded.labels])


@pytest.mark.parametrize("sample", [*SAMPLES, HARD], ids=lambda s: s.id)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_end_tokens_are_supervised_and_nothing_else(name: str, sample: Sample) -> None:
    encode = encoder(name)
    encoded = encode.train(sample)
    runs = supervised(encoded)
    said = [encode.tokenizer.decode([encoded.labels[i] for i in run]) for run in runs]
    assert said == [turn.answer + TEMPLATES[name][1] for turn in sample.turns]
    assert all(encoded.labels[i] == encoded.ids[i] for run in runs for i in run)
    assert runs_of([role == ANSWER for role in encoded.roles]) == runs
    assert len(encoded.ids) == len(encoded.labels) == len(encoded.roles) == len(encoded.image)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_the_template(name: str) -> None:
    """Rendered and tokenised by transformers in one call: no second begin token, nothing lost."""
    encode = encoder(name, tokens=0)
    messages = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "two red things are there"}]
    want = encode.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert encode.train(TEXT_ONLY).ids == want
    begin = encode.tokenizer.bos_token_id
    assert begin is None or want.count(begin) == 1


@pytest.mark.parametrize("sample", [*SAMPLES, HARD], ids=lambda s: s.id)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_the_beginning_of_its_training_row(name: str, sample: Sample) -> None:
    """Ids, roles and images of a prompt are those the model was trained on, earlier answers included."""
    encode = encoder(name)
    trained, asked = encode.train(sample), encode.ask(sample)
    start = supervised(trained)[-1][0]
    assert asked.ids == trained.ids[:start]
    assert asked.roles == trained.roles[:start]
    assert asked.image == trained.image[:start]
    assert set(asked.labels) == {IGNORE}


@pytest.mark.parametrize("sample", [*SAMPLES, HARD], ids=lambda s: s.id)
@pytest.mark.parametrize("other", ["unmarked", "end token outside the block", "newline inside the block"])
def test_markers_change_nothing(other: str, sample: Sample) -> None:
    assert encoder("marked").train(sample) == encoder(other).train(sample)


def test_roles_of_the_system_line() -> None:
    encode = encoder("marked")
    encoded = encode.train(replace(HARD, turns=(Turn("You", "red"),), images=()))
    text = {role: encode.tokenizer.decode([i for i, r in zip(encoded.ids, encoded.roles, strict=True) if r == role])
            for role in (SYSTEM, USER, ANSWER)}  # fmt: skip
    assert text[SYSTEM] == "<|im_start|>system\nYou say red.<|im_end|>\n<|im_start|>user\n"
    assert text[USER] == "You<|im_end|>\n<|im_start|>assistant\n\n"
    assert text[ANSWER] == "red<|im_end|>"


def test_images_stand_where_their_tags_are() -> None:
    encode = chat(tokens_per_image=3)
    encoded = encode.train(TWO_IMAGES)
    assert [i for i in encoded.image if i >= 0] == [0, 0, 0, 1, 1, 1]
    text = encode.tokenizer.decode(encoded.ids)
    assert text.count("<|image|>") == 6 and "see " + "<|image|>" * 3 + " what" in text
    assert [i for i in encode.train(ADJACENT).image if i >= 0] == [0, 0, 0, 1, 1, 1]
    untagged = encode.train(replace(TWO_IMAGES, turns=(Turn("which", "red"),)))
    assert encode.tokenizer.decode(untagged.ids).startswith("<|im_start|>user\n" + "<|image|>" * 6 + "which")
    assert not any(i >= 0 for i in chat(tokens_per_image=0).train(TWO_IMAGES).image)


def test_plain_is_images_then_the_answer() -> None:
    encode = chat(prompt="plain")
    encoded = encode.train(TWO_TURNS)
    assert encode.tokenizer.decode(encoded.ids) == "<|image|>" * 3 + "red blue<|im_end|>"
    assert encoded.labels == [IGNORE] * 3 + encoded.ids[3:]
    assert encode.ask(TWO_TURNS).ids == encoded.ids[:3]


def test_plain_begins_as_its_tokenizer_begins() -> None:
    made = llama3()
    encode = ChatEncoder(made, "<|image|>", 2, prompt="plain")
    encoded = encode.train(ONE_TURN)
    assert encoded.ids[:3] == [made.bos_token_id, encode.image_id, encode.image_id]
    assert encoded.ids.count(made.bos_token_id) == 1
    assert made.decode([i for i in encoded.labels if i != IGNORE]) == "two green squares<|eot_id|>"
    assert encode.ask(TEXT_ONLY).ids == [made.bos_token_id]


def test_text_supervises_every_word_but_the_first() -> None:
    as_chat, as_text = chat().train(TWO_TURNS), chat(prompt="text").train(TWO_TURNS)
    assert (as_text.ids, as_text.roles, as_text.image) == (as_chat.ids, as_chat.roles, as_chat.image)
    words = [i if image < 0 else IGNORE for i, image in zip(as_text.ids, as_text.image, strict=True)]
    assert as_text.labels == [IGNORE, *words[1:]]
    assert chat(prompt="text").ask(TWO_TURNS) == chat().ask(TWO_TURNS)


def test_a_plain_prompt_without_anything_is_refused() -> None:
    with pytest.raises(DataError, match="Sample text has nothing to continue"):
        chat(prompt="plain").ask(TEXT_ONLY)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_an_empty_answer_is_refused_with_the_id(name: str, prompt: str) -> None:
    encode = ChatEncoder(TEMPLATES[name][0](), "<|image|>", 3, prompt=prompt)
    with pytest.raises(DataError, match="Sample one has no supervised token"):
        encode.train(replace(ONE_TURN, turns=(Turn("what", ""),)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_answer_among_others_is_not_supervised(name: str) -> None:
    encode = encoder(name)
    encoded = encode.train(replace(TEXT_ONLY, turns=(Turn("what", ""), Turn("how", "red"))))
    assert encode.tokenizer.decode([i for i in encoded.labels if i != IGNORE]) == "red" + TEMPLATES[name][1]


def test_a_template_that_rewrites_history_is_refused_by_name() -> None:
    encode = ChatEncoder(chatml(REWRITES), "<|image|>", 3)
    encode.train(ONE_TURN)
    thoughtful = replace(TWO_TURNS, turns=(Turn("how", "<think>hm</think>red"), Turn("what", "green")))
    with pytest.raises(UserError, match=r"Sample two: .*somebody/template rewrites earlier turns"):
        encode.train(thoughtful)


def test_generation_blocks_that_do_not_fit_are_refused_by_name() -> None:
    everything = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
    with pytest.raises(UserError, match="somebody/template marks 1 generations for 2 answers"):
        ChatEncoder(chatml(everything), "<|image|>", 3).train(TWO_TURNS)


@pytest.mark.parametrize("turns", [("<image> and <image>",), ("<image>", "<image>")], ids=str)
def test_tags_that_do_not_fit_are_refused(turns: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="Sample one has 2 image tags for 1 images"):
        chat().train(replace(ONE_TURN, turns=tuple(Turn(prompt, "red") for prompt in turns)))


def test_a_tag_without_an_image_is_refused() -> None:
    with pytest.raises(DataError, match="Sample text has 1 image tags for 0 images"):
        chat().train(replace(TEXT_ONLY, turns=(Turn("<image>what", "red"),)))


@pytest.mark.parametrize("where", ["prompt", "answer", "system"])
@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_a_written_placeholder_is_refused(where: str, prompt: str) -> None:
    text = "see <|image|>"
    turn = Turn(text if where == "prompt" else "what", text if where == "answer" else "red")
    with pytest.raises(DataError, match=r"Sample one contains the placeholder"):
        chat(prompt=prompt).train(replace(ONE_TURN, turns=(turn,), system=text if where == "system" else ""))


def test_a_sample_that_is_too_long_is_refused_by_name() -> None:
    encode = ChatEncoder(tokenizer(), "<|image|>", 3, max_length=10)
    with pytest.raises(DataError, match=r"Sample one has \d+ tokens, over max_length=10"):
        encode.train(ONE_TURN)


def test_an_unknown_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="prompt=poem is unknown; use plain, chat"):
        ChatEncoder(tokenizer(), "<|image|>", 3, prompt="poem")  # type: ignore[arg-type]


def test_text_prompt_supervises_every_word_but_the_first_and_the_image() -> None:
    answers, words = (chat(prompt=prompt).train(TWO_TURNS) for prompt in ("chat", "text"))
    assert (words.ids, words.roles, words.image) == (answers.ids, answers.roles, answers.image)
    expected = [token if image < 0 else -100 for token, image in zip(words.ids, words.image, strict=True)]
    assert words.labels == [-100, *expected[1:]]
    assert words.labels != answers.labels


# -- images without a token in the sequence ----------------------------------------------------------------------------


def test_an_image_without_tokens_keeps_its_place_and_the_words_their_ids() -> None:
    for prompt in ("chat", "plain"):
        for sample in (ONE_TURN, TWO_IMAGES, ADJACENT, SECOND_TURN):
            bare = replace(
                sample, images=(), turns=tuple(replace(t, prompt=t.prompt.replace("<image>", "")) for t in sample.turns)
            )
            beside, text = chat(0, prompt).train(sample), chat(0, prompt).train(bare)
            assert (beside.ids, beside.labels, beside.roles) == (text.ids, text.labels, text.roles)
            within = chat(3, prompt).train(sample)
            assert beside.turns == within.turns and len(beside.places) == len(sample.images)
            for own, other in zip(beside.places, within.places, strict=True):
                assert own == other - sum(image >= 0 for image in within.image[:other])


def test_places_and_turns() -> None:
    encoded = chat(3).train(TWO_IMAGES)
    assert encoded.turns == [0, 1] and [encoded.image[p] for p in encoded.places] == [0, 1]
    assert all(encoded.image[p - 1] < 0 for p in encoded.places), "the first of its visual tokens"
    assert chat(0).train(SECOND_TURN).turns == [1]
    assert chat(0, "plain").train(ADJACENT).places == [0, 0]


def test_images_of_several_numbers_of_tokens() -> None:
    """The number may depend on a picture's size; one of none beside one of three."""
    sizes = replace(ADJACENT, images=(picture(1, (8, 8)), picture(2, (16, 8)), picture(3, (8, 24))),
                    turns=(Turn("a <image> b <image> c <image> d", "red"),))  # fmt: skip
    encode = ChatEncoder(tokenizer(), "<|image|>", lambda hw: {8: 2, 16: 0}[hw[0]] + (hw[1] == 24))
    encoded = encode.train(sizes)
    assert [i for i in encoded.image if i >= 0] == [0, 0, 2, 2, 2]
    assert [encoded.image[p] for p in encoded.places] == [0, -1, 2]
    words = encode.tokenizer.decode([i for i in encoded.ids if i != encode.image_id])
    assert "a  b  c  d" in words
    before = encode.tokenizer.decode([i for i in encoded.ids[: encoded.places[1]] if i != encode.image_id])
    assert before.endswith("a  b ") or before.endswith("a  b")


def test_a_template_that_loses_an_image_is_refused() -> None:
    encode = chat(3)
    encode.template, encode.marked = (
        "{% for m in messages %}{{ m['content'].replace('<|image|>', '') }}<|im_end|>{% endfor %}",
        False,
    )
    with pytest.raises(UserError, match=r"prints 0 image placeholders for 1 images"):
        encode.train(ONE_TURN)
