"""From a sample to token ids, labels and roles: the plain prompt and the tokenizer's own chat template.

Nothing here guesses lengths. The conversation is rendered once by the tokenizer's template and tokenised once; where
the template has generation markers they say what the assistant speaks, otherwise the conversation is rendered up to
each turn and the difference is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
FIXED_DAY = (
    "{%- macro strftime_now(format) -%}"
    "{{- format.replace('%Y', '2024').replace('%m', '07').replace('%d', '26') "
    "| replace('%b', 'Jul') | replace('%B', 'July') -}}"
    "{%- endmacro -%}{{ '' }}"  # a newline behind a tag would be dropped, behind a value it is the template's
)
"""Stands before every template: one that prints the day (Llama 3.2's does) would make a run depend on when it ran. The
day is Llama 3.1's own where it knows none."""

SYSTEM, USER, ANSWER = 0, 1, 2
Span: TypeAlias = tuple[int, int]
Prompt: TypeAlias = Literal["plain", "chat", "text"]


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens; all lists have one entry per token.

    Attributes:
        ids: token ids; the image placeholder id at visual positions.
        labels: the id where it is supervised, else -100.
        roles: 0 system, 1 user, 2 answer.
        image: index of the image at visual positions, -1 elsewhere.
    """

    ids: list[int]
    labels: list[int]
    roles: list[int]
    image: list[int]


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _all_supervised(encoded: Encoded) -> Encoded:
    """Every token but the first and the visual ones as a label."""
    labels = [token if image < 0 else IGNORE for token, image in zip(encoded.ids, encoded.image, strict=True)]
    return replace(encoded, labels=[IGNORE, *labels[1:]])


class ChatEncoder:
    """Turns samples into tokens for one tokenizer and one number of visual tokens per image.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        image_token: its placeholder; written `tokens_per_image` times for every image.
        tokens_per_image: 0 where vision does not enter the sequence.
        prompt: "plain" (images, then the first answer, no template: LLaVA's alignment stage), "chat" (the template,
            answers supervised), or "text" (the template, every word supervised: language modelling).
        max_length: longest sequence in tokens; a longer sample is refused by name.

    Raises:
        UserError: the template's rendering of a conversation is not a prefix of its continuation, or it does not print
            an answer as it is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        tokens_per_image: int,
        prompt: Prompt = "chat",
        max_length: int = 2048,
    ) -> None:
        if prompt not in get_args(Prompt):
            raise UserError(f"prompt={prompt} is unknown; use {', '.join(get_args(Prompt))}.")
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.image_id = token_id(tokenizer, image_token)
        self.tokens_per_image = tokens_per_image
        self.prompt = prompt
        self.max_length = max_length
        self.template = FIXED_DAY + tokenizer.get_chat_template()
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self.end = tokenizer.eos_token
        adds_begin = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.begin = tokenizer.bos_token if adds_begin else ""  # of the plain prompt; a chat template prints its own
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.specials = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)

    def train(self, sample: Sample) -> Encoded:
        """The whole conversation with its answers supervised.

        Raises:
            DataError: no supervised token, too long, or image tags that do not fit the images; names the sample.
        """
        text, answers, start = self._plain(sample) if self.prompt == "plain" else self._chat(sample)
        encoded = self._tokenise(sample, text, answers, start, supervise=True)
        if all(label == IGNORE for label in encoded.labels):
            raise DataError(f"Sample {sample.id} has no supervised token: its answers are empty; give it an answer.")
        return _all_supervised(encoded) if self.prompt == "text" else encoded

    def ask(self, sample: Sample) -> Encoded:
        """The conversation up to the last turn's answer, ready for generation; earlier answers keep their role.

        Raises:
            DataError: nothing to ask (a plain prompt without an image), too long, or image tags that do not fit.
        """
        text, answers, start = self._plain(sample, ask=True) if self.prompt == "plain" else self._chat(sample, ask=True)
        encoded = self._tokenise(sample, text, answers, start, supervise=False)
        if not encoded.ids:
            raise DataError(f"Sample {sample.id} has nothing to continue: plain prompts are images; use prompt=chat.")
        return encoded

    # -- rendering -----------------------------------------------------------------------------------------------

    def _visual_prefix(self, sample: Sample) -> str:
        self._refuse_placeholder(sample)
        return self.begin + self.image_token * (self.tokens_per_image * len(sample.images))

    def _plain(self, sample: Sample, ask: bool = False) -> tuple[str, list[Span], int]:
        prefix = self._visual_prefix(sample)
        answer = sample.turns[0].answer
        if ask or not answer:
            return prefix, [], len(self.begin)
        text = prefix + answer + (self.end or "")
        return text, [(len(prefix), len(text))], len(self.begin)

    def _refuse_placeholder(self, sample: Sample) -> None:
        """A placeholder written out in the data would be taken for an image."""
        texts = [sample.system, *(text for turn in sample.turns for text in (turn.prompt, turn.answer))]
        if any(self.image_token in text for text in texts):
            raise DataError(f"Sample {sample.id} contains the placeholder {self.image_token} as text; use {IMAGE_TAG}.")

    def _messages(self, sample: Sample) -> list[dict[str, str]]:
        """The conversation with every image tag replaced by its placeholders."""
        prompts = [turn.prompt for turn in sample.turns]
        tags = sum(prompt.count(IMAGE_TAG) for prompt in prompts)
        if tags == 0 and sample.images:
            prompts[0] = IMAGE_TAG * len(sample.images) + prompts[0]
        elif tags != len(sample.images):
            found = f"{tags} image tags for {len(sample.images)} images"
            raise DataError(f"Sample {sample.id} has {found}; make them equal.")
        self._refuse_placeholder(sample)
        placeholder = self.image_token * self.tokens_per_image
        messages = [{"role": "system", "content": sample.system}] if sample.system else []
        for prompt, turn in zip(prompts, sample.turns, strict=True):
            messages.append({"role": "user", "content": prompt.replace(IMAGE_TAG, placeholder)})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def _render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False, mark: bool = False
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and with `mark` the span of every generation block."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotations do not fit what it returns
        texts, marked = render(
            [messages],
            chat_template=self.template,
            return_assistant_tokens_mask=mark,
            add_generation_prompt=add_generation_prompt,
            **dict(self.tokenizer.special_tokens_map),  # the template's variables
        )
        return texts[0], marked[0] if mark else []

    def _chat(self, sample: Sample, ask: bool = False) -> tuple[str, list[Span], int]:
        """The rendered conversation, the character spans of its answers, and where the user begins.

        With `ask` the last answer is left out and the template's generation prompt stands in its place.
        """
        messages = self._messages(sample)[: -1 if ask else None]
        text, spans = self._marked(messages, ask) if self.marked else self._differences(sample, messages, ask)
        system = sample.system.strip()  # some templates trim what they print
        after_system = text.find(system) + len(system)
        first = next(message["content"] for message in messages if message["role"] == "user").strip()
        return text, spans, max(text.find(first, after_system), 0)

    def _marked(self, messages: list[dict[str, str]], ask: bool) -> tuple[str, list[Span]]:
        """What the template's generation markers enclose, cut behind the end token."""
        text, marked = self._render(messages, add_generation_prompt=ask, mark=True)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(marked) != len(answers):
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path} marks {len(marked)} generations for "
                f"{len(answers)} answers; put one generation block around every assistant turn."
            )
        spans = [(start, answer) for (start, _), answer in zip(marked, answers, strict=True) if answer]
        for start, answer in spans:
            self._check_answer(text, start, answer)
        return text, [(start, self._answer_stop(text, start, answer)) for start, answer in spans]

    def _differences(self, sample: Sample, messages: list[dict[str, str]], ask: bool) -> tuple[str, list[Span]]:
        """What each turn adds to the rendering; the answer and the end token after it are supervised."""
        whole, _ = self._render(messages, add_generation_prompt=ask)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"]:
                continue
            before, _ = self._render(messages[:i], add_generation_prompt=True)
            after, _ = self._render(messages[: i + 1])
            stop = self._answer_stop(after, len(before), message["content"])
            # what stands behind the end token may change: some templates end every conversation with one more token
            if not after.startswith(before) or not whole.startswith(after[:stop]):
                raise UserError(
                    f"The chat template of {self.tokenizer.name_or_path} rewrites earlier turns (sample {sample.id}): "
                    "labels cannot be told apart; use a template that only appends, or one with generation markers."
                )
            self._check_answer(after, len(before), message["content"])
            spans.append((len(before), stop))
        return whole, spans

    def _check_answer(self, text: str, start: int, answer: str) -> None:
        """Only the answer is to be learnt: no words that the template puts before it, and not a changed one."""
        found = text.find(answer.strip(), start)
        if found < 0 or text[start:found].strip():
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path} does not print the answer {answer[:40]!r} as it "
                "is behind the prompt for it; give another by lm.chat_template."
            )

    def _answer_stop(self, text: str, start: int, answer: str) -> int:
        """End of the answer with its end token; template text after the end token is not supervised."""
        stop = text.find(answer.strip(), start)
        stop = len(text) if stop < 0 else stop + len(answer.strip())
        tail = text[stop:]
        end = next((token for token in self.specials if tail.lstrip().startswith(token)), None)
        return stop if end is None else stop + tail.index(end) + len(end)

    # -- tokens --------------------------------------------------------------------------------------------------

    def _tokenise(self, sample: Sample, text: str, answers: Sequence[Span], start: int, supervise: bool) -> Encoded:
        """Token ids of the text with a role and a label for each, by character offsets."""
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
        if len(ids) > self.max_length:
            raise DataError(f"Sample {sample.id} has {len(ids)} tokens, over max_length={self.max_length}; raise it.")
        roles = [SYSTEM if stop <= start else USER for _, stop in offsets]
        labels = [IGNORE] * len(ids)
        span = iter(answers)
        current = next(span, None)
        for index, (left, right) in enumerate(offsets):
            while current is not None and left >= current[1]:
                current = next(span, None)
            # an end token may swallow the blanks behind it, and a blank's own offsets may be trimmed to nothing
            if current is not None and left >= current[0] and right > current[0]:
                roles[index] = ANSWER
                labels[index] = ids[index] if supervise and index else IGNORE  # nothing predicts the first token
        return Encoded(ids, labels, roles, self._images(ids))

    def _images(self, ids: list[int]) -> list[int]:
        """Index of the image at every placeholder: each image has the same number of them."""
        seen = 0
        image = []
        for token in ids:
            if token == self.image_id:
                image.append(seen // self.tokens_per_image)
                seen += 1
            else:
                image.append(-1)
        return image
