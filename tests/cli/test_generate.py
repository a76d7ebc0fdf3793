"""``vlmlab generate`` and ``vlmlab chat``: words without a key, what they print, and what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from tests.cli.asking import ask_words

from vlmlab.cli import generate
from vlmlab.cli.chat import Conversation, chat_command
from vlmlab.cli.generate import generate_command, with_key
from vlmlab.contracts.errors import UserError

QUESTIONS = [
    "What is on the table?", "it's {red}, (blue) [or] $x a=b: \"c\"",
    "ends in \\", "a\\'b", "5", "true", "日本 🙂", "''", "\\\\'",
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_word_without_a_key_is_the_question(question: str) -> None:
    words = with_key(["run=x", "image=[a.png,b.png]", question, "--help", "+a.b=1"])
    assert [words[0], words[1], words[3], words[4]] == ["run=x", "image=[a.png,b.png]", "--help", "+a.b=1"]
    override = OverridesParser.create().parse_override(words[2])
    assert override.key_or_group == "question" and str(override.value()) == question


class Parrot:
    """Says the question back, word by word."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def generate(self, image: Any, question: str, history: Any = (), stream: Any = None, **settings: Any) -> str:
        if question == "bad":
            raise UserError("the question is bad.")
        self.asked.append((image, question, list(history), settings))
        for word in question.split() if stream else ():
            stream(word)
        return question.upper()

    def probabilities(self, image: Any, question: str, answer: str, system: str = "") -> list[tuple[str, float]]:
        return [(answer, 0.25), ("<end>", 1.0)]

    def check_image(self, image: str) -> None:
        if image == "nowhere.jpg":
            raise UserError("nowhere.jpg is not a file.")


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    found = Parrot()
    monkeypatch.setattr(generate, "opened", lambda cfg, example: found)
    monkeypatch.setattr("vlmlab.cli.chat.opened", lambda cfg, example: found)
    return found


def test_an_answer_is_printed(parrot: Parrot) -> None:
    words = ["run=x", "question=what is it?", "image=[a.png,b.png]", "top_k=3", "do_sample=true"]
    code, out, err, _ = ask_words("generate", words, generate_command)
    assert (code, out, err) == (0, "WHAT IS IT?\n", "")
    settings = {"max_new_tokens": 64, "system": "", "do_sample": True, "top_k": 3}
    assert parrot.asked == [(["a.png", "b.png"], "what is it?", [], settings)]
    out = ask_words("generate", ["run=x", "question=hm", "probabilities=true"], generate_command)[1]
    assert out == "HM\n  0.2500  'HM'\n  1.0000  '<end>'\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["question=x"], 2, "which run? write run=<folder>, as in: vlmlab generate run=outputs/default"),
        (["run=x"], 2, "which question? write it at the end, as in: vlmlab generate"),
        (["run=nowhere", "question=x"], 2, "run=nowhere is not a run folder"),
        (["run=x", "question=x", "top_p=3"], 2, "top_p=3 is not possible"),
        (["run=x", "question=x", "seed=-1"], 2, "seed=-1 is not possible"),
        (["run=x", "question=x", "imgae=a"], 2, "no key 'imgae'"),
        (["run=x", "question=x", "+mask=causal"], 2, "no key 'mask'"),
    ],
)
def test_mistakes(words: list[str], code: int, said: str) -> None:
    found = ask_words("generate", words, generate_command)
    assert found[0] == code and found[2].startswith(f"error: {said}") and found[2].count("\n") == 1, found


def test_a_conversation(parrot: Parrot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["one two", "", "bad", "three", "/image nowhere.jpg", "/image b.png", "four", "/new", "five", "/foo"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    code, out, err, _ = ask_words("chat", ["run=x", "image=a.png"], chat_command)
    assert code == 0 and out.splitlines()[1:] == ["onetwo", "three", "four", "five"]
    first, third, fourth, fifth = parrot.asked
    assert first[:3] == (["a.png"], "one two", []) and third[2] == [("one two", "ONE TWO")]
    assert fourth[:3] == (["b.png"], "four", []) and fifth[:3] == (["b.png"], "five", [])
    assert [line.partition(";")[0] for line in err.splitlines()] == [
        "error: the question is bad.", "error: nowhere.jpg is not a file.", "error: /foo is not a command here",
    ]  # fmt: skip


def test_beams_are_written_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    parrot: Any = Parrot()
    Conversation(parrot, None, {"num_beams": 3}).take("hello you")
    assert capsys.readouterr().out == "HELLO YOU\n"


def test_torch_is_not_needed_for_a_mistake(tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, "-X", "importtime", "-m", "vlmlab.cli.generate", "run=nowhere", "Why?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "| torch\n" not in done.stderr and "is not a run folder" in done.stderr
