"""Labels with a tokenizer of Llama 2's kind: blanks are letters, one is put before every text, bytes as a last resort.

Phi-3, TinyLlama, Vicuna and Gemma have one. Where an answer begins and ends is then not where a token does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.tiny import CONF, ONE_TURN, SAMPLES, WORDS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.chat import IGNORE, ChatEncoder, Encoded

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "chat_templates"
BLANK = "▁"


def made(template: str, end: str, *special: str, swallows: bool = False) -> PreTrainedTokenizerFast:
    """As transformers converts Llama 2's tokenizer, over a few words."""
    letters = sorted({letter for word in WORDS for letter in word.replace(" ", BLANK)} | {BLANK})
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([*WORDS] * 3, trainer)
    bpe = Tokenizer.from_str(bpe.to_str())
    more = [AddedToken(token, special=True, normalized=False, rstrip=swallows) for token in (*special, "<|image|>")]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", end)])
    bpe.add_special_tokens(more)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=end, chat_template=template)


def vicuna() -> PreTrainedTokenizerFast:
    return made(OmegaConf.load(CONF / "lm" / "vicuna_7b.yaml").chat_template, "</s>")


def gemma() -> PreTrainedTokenizerFast:
    return made(OmegaConf.load(CONF / "lm" / "gemma_2b.yaml").chat_template, "</s>")


def phi3() -> PreTrainedTokenizerFast:
    special = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    return made((FIXTURES / "phi3.jinja").read_text(), "<|endoftext|>", *special, swallows=True)


HARD = Sample(
    "hard",
    ONE_TURN.images,
    (
        Turn("Say it", "naïve 東京 🙂 é"),
        Turn("red", "red"),
        Turn("again", "two  greens,\n\tand <b>"),
        Turn("short", "a"),
    ),
    system="You say red.",
)


def said(encode: ChatEncoder, encoded: Encoded) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [encode.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(("make", "end"), [(vicuna, "</s>"), (gemma, "</s>"), (phi3, "<|end|>")])
def test_supervised_are_the_answers_and_the_end_of_their_turns(
    make: Callable[[], PreTrainedTokenizerFast], end: str
) -> None:
    encode = ChatEncoder(make(), "<|image|>", 3)
    for sample in (*SAMPLES, HARD):
        encoded = encode.train(sample)
        words = [text.replace(" " + end, end) for text in said(encode, encoded)]
        assert words == [turn.answer + end for turn in sample.turns], sample.id
        last = max(i for i, label in enumerate(encoded.labels) if label != IGNORE)
        start = max(i for i in range(last) if encoded.labels[i] == IGNORE) + 1
        assert encode.ask(sample).ids == encoded.ids[:start], sample.id
