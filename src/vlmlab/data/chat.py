"""From a sample to token ids, labels and roles: the plain prompt and the tokenizer's own chat template.

Nothing here guesses lengths. The conversation is rendered once by the tokenizer's template and tokenised once; where
the template has generation markers they say what the assistant speaks, otherwise the conversation is rendered up to
each turn and the difference is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
TokenCount: TypeAlias = Callable[[tuple[int, int]], int]
"""Rows and columns of a picture's pixels -> its visual tokens in the sequence."""

PICTURE = (8, 8)
"""Size of some picture, to ask how many tokens one has: all are resized to the encoder's one size."""


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens; all lists have one entry per token.

    Attributes:
        ids: token ids; the image placeholder id at visual positions.
        labels: the id where it is supervised, else -100.
        roles: 0 system, 1 user, 2 answer.
        image: index of the image at visual positions, -1 elsewhere.
        places: for every image the index of its first visual token, or of the token that it stands before where it has
            none (the number of tokens where it stands behind the last).
        turns: for every image the number of answers before it.
        branch: which question of a tree, -1 for what all share; empty where it is no tree.
    """

    ids: list[int]
    labels: list[int]
    roles: list[int]
    image: list[int]
    places: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)


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
    """Turns samples into tokens for one tokenizer and so many visual tokens per image.

    An image without a token in the sequence has its place all the same: one placeholder is rendered by the template
    and taken out of the text before that is tokenised, so that the words are those of a sample without image.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        image_token: its placeholder; written once for every visual token.
        tokens_per_image: one number for all images, or a function of their pixels; 0 where vision does not enter the
            sequence.
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
        tokens_per_image: int | TokenCount,
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

    def tokens_of(self, picture: tuple[int, int]) -> int:
        """Visual tokens in the sequence of a picture of so many rows and columns of pixels."""
        return self.tokens_per_image if isinstance(self.tokens_per_image, int) else self.tokens_per_image(picture)

    # -- rendering -----------------------------------------------------------------------------------------------

    def _counts(self, sample: Sample) -> list[int]:
        """Visual tokens of every image in the sequence."""
        return [self.tokens_of((image.shape[0], image.shape[1])) for image in sample.images]

    def _written(self, sample: Sample) -> list[str]:
        """What is rendered for every image: its placeholders, or a single one that is taken out again."""
        return [self.image_token * max(count, 1) for count in self._counts(sample)]

    def _visual_prefix(self, sample: Sample) -> str:
        self._refuse_placeholder(sample)
        return self.begin + "".join(self._written(sample))

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
        prompts = _tagged(sample)
        self._refuse_placeholder(sample)
        written = iter(self._written(sample))
        messages = [{"role": "system", "content": sample.system}] if sample.system else []
        for prompt, turn in zip(prompts, sample.turns, strict=True):
            content = re.sub(re.escape(IMAGE_TAG), lambda _: next(written), prompt)
            messages.append({"role": "user", "content": content})
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
        counts = self._counts(sample)
        text, answers, start, holes = self._without_holes(sample, counts, text, answers, start)
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
        image = self._images(ids, counts)
        places = [
            image.index(k)
            if hole is None
            else next((i for i, (_, right) in enumerate(offsets) if right > hole), len(ids))
            for k, hole in enumerate(holes)
        ]
        return Encoded(ids, labels, roles, image, places, self._turns(sample))

    def _without_holes(
        self, sample: Sample, counts: Sequence[int], text: str, answers: Sequence[Span], start: int
    ) -> tuple[str, list[Span], int, list[int | None]]:
        """The rendered text without the placeholders of images that have no token; spans and offsets moved along.

        Returns:
            text, answers, start, and for every image the character that it stands before, None where it has tokens.

        Raises:
            UserError: the template printed another number of placeholders than it was given.
        """
        width = len(self.image_token)
        found = [match.start() for match in re.finditer(re.escape(self.image_token), text)]
        if len(found) != sum(max(count, 1) for count in counts):
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path} prints {len(found)} image placeholders for "
                f"{len(counts)} images (sample {sample.id}); give one by lm.chat_template that prints all of a prompt."
            )
        cuts: list[int] = []
        holes: list[int | None] = []
        at = 0
        for count in counts:
            holes.append(None if count else found[at] - width * len(cuts))
            cuts += [] if count else [found[at]]
            at += max(count, 1)

        def moved(offset: int) -> int:
            return offset - width * sum(cut < offset for cut in cuts)

        kept = "".join(text[i:j] for i, j in zip([0, *(c + width for c in cuts)], [*cuts, len(text)], strict=True))
        return kept, [(moved(i), moved(j)) for i, j in answers], moved(start), holes

    def _turns(self, sample: Sample) -> list[int]:
        """For every image the number of answers before it; a plain prompt has one answer, behind all of them."""
        if self.prompt == "plain":
            return [0] * len(sample.images)
        return [turn for turn, prompt in enumerate(_tagged(sample)) for _ in range(prompt.count(IMAGE_TAG))]

    def _images(self, ids: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Index of the image at every placeholder, -1 elsewhere."""
        owner = (k for k, count in enumerate(counts) for _ in range(count))
        return [next(owner) if token == self.image_id else -1 for token in ids]


def asked(sample: Sample) -> list[str]:
    """For every image what the user says in its turn, without tags."""
    return [
        " ".join(prompt.replace(IMAGE_TAG, " ").split())
        for prompt in _tagged(sample)
        for _ in range(prompt.count(IMAGE_TAG))
    ]


def _tagged(sample: Sample) -> list[str]:
    """The prompts with a tag for every image; those of a sample without tags stand before its first prompt.

    Raises:
        DataError: tags that do not fit the images.
    """
    prompts = [turn.prompt for turn in sample.turns]
    tags = sum(prompt.count(IMAGE_TAG) for prompt in prompts)
    if tags == 0 and sample.images:
        prompts[0] = IMAGE_TAG * len(sample.images) + prompts[0]
    elif tags != len(sample.images):
        raise DataError(f"Sample {sample.id} has {tags} image tags for {len(sample.images)} images; make them equal.")
    return prompts
