"""From a sample to token ids, labels and roles: the plain prompt and the tokenizer's own chat template.

Nothing here guesses lengths. The conversation is rendered once by the tokenizer's template and tokenised once; where
the template has generation markers they say what the assistant speaks, otherwise the conversation is rendered up to
each turn and the difference is the answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, Turn
from vlmlab.data.control import ControlTokens, Hidden, any_of, controls_of, guarded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
FIXED_DAY = (
    "{%- macro strftime_now(format) -%}"
    "{{- format.replace('%Y', '2024').replace('%m', '07').replace('%d', '26') "
    "| replace('%b', 'Jul') | replace('%B', 'July') -}}"
    "{%- endmacro -%}{{ '' }}"  # a newline after a tag would be dropped, after a value it is the template's
)
"""Put before every template: one that prints the day (Llama 3.2's does) would make a run depend on when it ran. The
day is Llama 3.1's own where it knows none."""

SYSTEM, USER, ANSWER = 0, 1, 2
Span: TypeAlias = tuple[int, int]
Prompt: TypeAlias = Literal["plain", "chat", "text"]
TokenCount: TypeAlias = Callable[[tuple[int, int]], int]
"""Rows and columns of a picture's pixels -> its visual tokens in the sequence."""

PICTURE = (8, 8)
"""Size of some picture, to ask how many tokens one has: all are resized to the encoder's one size."""

TURN, NEXT = Turn("question", "answer"), Turn("another", "other")
"""A conversation that any template can render, to see what it prints by itself."""


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens; all lists have one entry per token.

    Attributes:
        ids: token ids; the image placeholder id at visual positions.
        labels: the id where it is supervised, else -100.
        roles: 0 system, 1 user, 2 answer.
        image: index of the image at visual positions, -1 elsewhere.
        places: for every image the index of its first visual token, or of the token that it is before where it has
            none (the number of tokens where it is after the last).
        turns: for every image the number of answers before it.
        branch: which question of a tree, -1 for what all share; empty where it is not a tree.
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


class _Raised(Exception):
    """A chat template raised while it was rendered."""


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
        control_tokens: "refuse" samples that contain the tokenizer's control tokens, or read them there as "text".

    Attributes:
        specials: the control tokens, the longest first.
        control_ids: their ids.

    Raises:
        UserError: the template cannot be rendered, its rendering of a conversation is not a prefix of its continuation,
            or it does not print an answer as it is with an end token after it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        tokens_per_image: int | TokenCount,
        prompt: Prompt = "chat",
        max_length: int = 2048,
        control_tokens: ControlTokens = "refuse",
    ) -> None:
        for key, value, known in (
            ("prompt", prompt, Prompt),
            ("collate.control_tokens", control_tokens, ControlTokens),
        ):
            if value not in get_args(known):
                raise UserError(f"{key}={value} is unknown; use {', '.join(get_args(known))}.")
        self.tokenizer = tokenizer
        self.name = str(tokenizer.name_or_path)[-60:]  # in messages
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
        self.control_tokens = control_tokens
        self.specials = controls_of(tokenizer, "" if prompt == "plain" else self._printed(), image_token)
        self.control = any_of(self.specials)
        self.control_ids = {token_id(tokenizer, token) for token in self.specials}
        self.written_ids = self.control_ids - {tokenizer.unk_token_id}  # words may be unknown

    def train(self, sample: Sample) -> Encoded:
        """The whole conversation with its answers supervised.

        Raises:
            DataError: no supervised token, too long, or image tags that do not fit the images; names the sample.
        """
        encoded = self._encoded(sample, ask=False)
        if all(label == IGNORE for label in encoded.labels):
            raise DataError(f"Sample {sample.id} has no supervised token: its answers are empty; give it an answer.")
        return _all_supervised(encoded) if self.prompt == "text" else encoded

    def ask(self, sample: Sample) -> Encoded:
        """The conversation up to the last turn's answer, ready for generation; earlier answers keep their role.

        Raises:
            DataError: nothing to ask (a plain prompt without an image), too long, or image tags that do not fit.
        """
        encoded = self._encoded(sample, ask=True)
        if not encoded.ids:
            raise DataError(f"Sample {sample.id} has nothing to continue: plain prompts are images; use prompt=chat.")
        return encoded

    def control_token_problem(self, sample: Sample) -> str | None:
        """Why the words of a sample, with the control tokens in them, are refused; None: they are not."""
        try:
            guarded(sample, self.control, self.image_token, self.control_tokens)
        except DataError as error:
            return str(error)
        return None

    def tokens_of(self, picture: tuple[int, int]) -> int:
        """Visual tokens in the sequence of a picture of so many rows and columns of pixels."""
        return self.tokens_per_image if isinstance(self.tokens_per_image, int) else self.tokens_per_image(picture)

    @cached_property
    def stops(self) -> list[int]:
        """Where generation ends: the ids of the last supervised tokens of answers, and the tokenizer's end token.

        Raises:
            UserError: the template prints no end token after an answer.
        """
        ends = {int(self.tokenizer.eos_token_id), *last_learnt(self.train(Sample("one turn", (), (TURN,))))}
        with suppress(UserError):  # a template may be of use for single turns alone
            ends |= {*last_learnt(self.train(Sample("two turns", (), (TURN, NEXT))))}
        return sorted(ends)

    @cached_property
    def _fits(self) -> bool:
        """Whether the template can be used for a plain conversation, so that it is a row that it cannot be used for."""
        try:
            self._chat(Sample("one turn", (), (TURN,)))
        except UserError:
            return False
        return True

    def merges(self, sample: Sample) -> bool:
        """Whether the tokenizer, left to itself, would make one token of a prompt's end and its answer's beginning."""
        sample, hidden, text, answers, start = self._rendered(sample, ask=False)
        text, answers, _, _ = self._without_holes(sample, self._counts(sample), text, answers, start)
        text, plain = hidden.shown(text)
        return bool(self._cuts(text, answers, plain, *self._read(text, [], plain)))

    def _encoded(self, sample: Sample, ask: bool) -> Encoded:
        return self._tokenise(*self._rendered(sample, ask), supervise=not ask)

    def _rendered(self, sample: Sample, ask: bool) -> tuple[Sample, Hidden, str, list[Span], int]:
        """The sample with what is hidden in it, its text, the spans of its answers, and where the user begins."""
        sample, hidden = guarded(sample, self.control, self.image_token, self.control_tokens)
        render = self._plain if self.prompt == "plain" else self._chat
        try:
            return sample, hidden, *render(sample, ask)
        except _Raised as error:
            raise DataError(
                f"Sample {sample.id} is refused by the chat template of {self.name} ({error}); change the row, or give "
                "another template by lm.chat_template."
            ) from error
        except DataError:
            raise
        except UserError as error:
            if not self._fits:
                raise
            raise DataError(f"Sample {sample.id}: {error}") from error

    # -- rendering -----------------------------------------------------------------------------------------------

    def _counts(self, sample: Sample) -> list[int]:
        """Visual tokens of every image in the sequence."""
        return [self.tokens_of((image.shape[0], image.shape[1])) for image in sample.images]

    def _written(self, sample: Sample) -> list[str]:
        """What is rendered for every image: its placeholders, or a single one that is taken out again."""
        return [self.image_token * max(count, 1) for count in self._counts(sample)]

    def _plain(self, sample: Sample, ask: bool = False) -> tuple[str, list[Span], int]:
        prefix = self.begin + "".join(self._written(sample))
        answer = sample.turns[0].answer
        if ask or not answer:
            return prefix, [], len(self.begin)
        text = prefix + answer + (self.end or "")
        return text, [(len(prefix), len(text))], len(self.begin)

    def _messages(self, sample: Sample) -> list[dict[str, str]]:
        """The conversation with every image tag replaced by its placeholders."""
        prompts = _tagged(sample)
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
        try:
            texts, marked = render(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=mark,
                add_generation_prompt=add_generation_prompt,
                **dict(self.tokenizer.special_tokens_map),  # the template's variables
            )
        except Exception as error:  # a template's own words, a missing filter, sums of numbers and texts
            raise _Raised(" ".join(f"{str(error) or type(error).__name__}".split())[:80]) from error
        return texts[0], marked[0] if mark else []

    def _printed(self) -> str:
        """What the template prints for a plain conversation, and before an answer that is to be generated.

        Raises:
            UserError: it raises for that one too.
        """
        asked = [{"role": "user", "content": TURN.prompt}]
        try:
            whole, _ = self._render([*asked, {"role": "assistant", "content": TURN.answer}])
            return whole + self._render(asked, add_generation_prompt=True)[0]
        except _Raised as error:
            raise UserError(
                f"The chat template of {self.name} cannot be rendered ({error}); give another by lm.chat_template."
            ) from error

    def _chat(self, sample: Sample, ask: bool = False) -> tuple[str, list[Span], int]:
        """The rendered conversation, the character spans of its answers, and where the user begins.

        With `ask` the last answer is left out and the template's generation prompt is in its place.
        """
        messages = self._messages(sample)[: -1 if ask else None]
        text, spans = self._marked(messages, ask) if self.marked else self._differences(messages, ask)
        system = sample.system.strip()  # some templates trim what they print
        after_system = text.find(system) + len(system)
        first = next(message["content"] for message in messages if message["role"] == "user").strip()
        return text, spans, max(text.find(first, after_system), 0)

    def _marked(self, messages: list[dict[str, str]], ask: bool) -> tuple[str, list[Span]]:
        """What the template's generation markers enclose, cut after the end token."""
        text, marked = self._render(messages, add_generation_prompt=ask, mark=True)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(marked) != len(answers):
            raise UserError(
                f"The chat template of {self.name} marks {len(marked)} generations for "
                f"{len(answers)} answers; put one generation block around every assistant turn."
            )
        begun = [(start, answer) for (start, _), answer in zip(marked, answers, strict=True) if answer]
        spans = [(start, self._answer_stop(text, start, answer)) for start, answer in begun]
        for span, (_, answer) in zip(spans, begun, strict=True):
            self._check_answer(text, span, answer)
        return text, spans

    def _differences(self, messages: list[dict[str, str]], ask: bool) -> tuple[str, list[Span]]:
        """What each turn adds to the rendering; the answer and the end token after it are supervised."""
        whole, _ = self._render(messages, add_generation_prompt=ask)
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"]:
                continue
            before, _ = self._render(messages[:i], add_generation_prompt=True)
            after, _ = self._render(messages[: i + 1])
            stop = self._answer_stop(after, len(before), message["content"])
            if not after.startswith(before) and after.startswith(self._render(messages[:i])[0]):
                raise UserError(
                    f"The chat template of {self.name} does not go on from its own generation prompt "
                    f"{before[-20:]!r} when it prints an answer; give another by lm.chat_template."
                )
            # what is after the end token may change: some templates end every conversation with one more token
            if not after.startswith(before) or not whole.startswith(after[:stop]):
                raise UserError(
                    f"The chat template of {self.name} rewrites earlier turns, so that labels "
                    "cannot be told apart; use a template that only appends, or one with generation markers."
                )
            self._check_answer(after, (len(before), stop), message["content"])
            spans.append((len(before), stop))
        return whole, spans

    def _check_answer(self, text: str, span: Span, answer: str) -> None:
        """Only the answer is to be learnt, as it is and with its end: no words that the template puts before it."""
        start, stop = span
        found = text.find(answer.strip(), start)
        if found < 0 or text[start:found].strip():
            raise UserError(
                f"The chat template of {self.name} does not print the answer {answer[:40]!r} as it "
                "comes after the prompt for it; give another by lm.chat_template."
            )
        if not text.endswith(tuple(self.specials), start, stop):
            raise UserError(
                f"The chat template of {self.name} puts no end token after an answer (but "
                f"{text[stop : stop + 20]!r}), so that generation would not stop; give another by lm.chat_template, "
                f"one that prints {self.end} there."
            )

    def _answer_stop(self, text: str, start: int, answer: str) -> int:
        """End of the answer with its end token; template text after the end token is not supervised."""
        stop = text.find(answer.strip(), start)
        stop = len(text) if stop < 0 else stop + len(answer.strip())
        tail = text[stop:]
        end = next((token for token in self.specials if tail.lstrip().startswith(token)), None)
        return stop if end is None else stop + tail.index(end) + len(end)

    # -- tokens --------------------------------------------------------------------------------------------------

    def _tokenise(
        self, sample: Sample, hidden: Hidden, text: str, answers: Sequence[Span], start: int, supervise: bool
    ) -> Encoded:
        """Token ids of the text with a role and a label for each, by character offsets."""
        counts = self._counts(sample)
        text, answers, start, holes = self._without_holes(sample, counts, text, answers, start)
        ids, offsets = self._tokens(sample, hidden, text, answers)
        if len(ids) > self.max_length:
            raise DataError(f"Sample {sample.id} has {len(ids)} tokens, over max_length={self.max_length}; raise it.")
        roles = [SYSTEM if stop <= start else USER for _, stop in offsets]
        labels = [IGNORE] * len(ids)
        span = iter(answers)
        current = next(span, None)
        for index, (left, right) in enumerate(offsets):
            while current is not None and left >= current[1]:
                current = next(span, None)
            # an end token may swallow the blanks after it, and a blank's own offsets may be trimmed to nothing
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

    def _tokens(
        self, sample: Sample, hidden: Hidden, text: str, answers: Sequence[Span]
    ) -> tuple[list[int], list[Span]]:
        """Ids and offsets; an answer begins a token of its own, and what was hidden is read as ordinary characters.

        Raises:
            DataError: words of the sample would be read as control tokens all the same.
        """
        allowed = len(self.control.findall(text))
        text, plain = hidden.shown(text)
        ids, offsets = self._read(text, [], plain)
        if cuts := self._cuts(text, answers, plain, ids, offsets):
            ids, offsets = self._read(text, cuts, plain)
        if sum(token in self.written_ids for token in ids) > allowed:
            raise DataError(
                f"Sample {sample.id} contains words that the tokenizer reads as one of its control tokens; take them "
                "out of the row."
            )
        return ids, offsets

    def _read(self, text: str, cuts: Sequence[int], plain: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Ids and offsets of a text in pieces, cut at these places, and around and inside what must not be a token."""
        edges = sorted({0, len(text), *cuts, *(edge for i, j in plain for edge in (i, min(i + 1, j), j))})
        ids: list[int] = []
        offsets: list[Span] = []
        for left, right in pairwise(edges):
            own, places = self._piece(text[left:right], within=left > 0)
            ids += own
            offsets += [(left + i, left + j) for i, j in places]
        return ids, offsets

    def _piece(self, text: str, within: bool) -> tuple[list[int], list[Span]]:
        """Ids and offsets of a piece; one from `within` a text does not get the blank that some put before a text."""
        if within:
            ids, offsets = self._piece("\n" + text, within=False)
            newline, _ = self._piece("\n", within=False)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :], [(i - 1, j - 1) for i, j in offsets[len(newline) :]]
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False)
        return list(tokens["input_ids"]), list(tokens["offset_mapping"])

    def _cuts(
        self, text: str, answers: Sequence[Span], plain: Sequence[Span], ids: list[int], offsets: list[Span]
    ) -> list[int]:
        """Where an answer begins before which the prompt has other tokens than it has without the answer after it.

        Asked of what follows the last control token before the answer, which no token reaches across.
        """
        found = []
        for start, _ in answers:
            floor = max((right for _, right in plain if right <= start), default=0)
            first = bisect_left(offsets, start, key=lambda place: place[0])
            begins = False
            while first and offsets[first - 1][0] >= floor and not begins:
                first -= 1
                begins = ids[first] in self.written_ids
            begin = offsets[first][0] if begins else floor
            own, _ = self._piece(text[begin:start], within=begin > 0 and not begins)
            if ids[first : first + len(own)] != own:
                found.append(start)
        return found

    def _without_holes(
        self, sample: Sample, counts: Sequence[int], text: str, answers: Sequence[Span], start: int
    ) -> tuple[str, list[Span], int, list[int | None]]:
        """The rendered text without the placeholders of images that have no token; spans and offsets moved along.

        Returns:
            text, answers, start, and for every image the character that it is before, None where it has tokens.

        Raises:
            UserError: the template printed another number of placeholders than it was given.
        """
        width = len(self.image_token)
        found = [match.start() for match in re.finditer(re.escape(self.image_token), text)]
        if len(found) != sum(max(count, 1) for count in counts):
            raise UserError(
                f"The chat template of {self.name} prints {len(found)} image placeholders for "
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
        """For every image the number of answers before it; a plain prompt has one answer, after all of them."""
        if self.prompt == "plain":
            return [0] * len(sample.images)
        return [turn for turn, prompt in enumerate(_tagged(sample)) for _ in range(prompt.count(IMAGE_TAG))]

    def _images(self, ids: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Index of the image at every placeholder, -1 elsewhere."""
        owner = (k for k, count in enumerate(counts) for _ in range(count))
        return [next(owner) if token == self.image_id else -1 for token in ids]


def last_learnt(encoded: Encoded) -> list[int]:
    """The id of the last supervised token of every run of them."""
    ends = zip(encoded.labels, [*encoded.labels[1:], IGNORE], strict=True)
    return [label for label, following in ends if label != IGNORE and following == IGNORE]


def questions_of(sample: Sample) -> list[str]:
    """For every image what the user says in its turn, without tags."""
    return [
        " ".join(prompt.replace(IMAGE_TAG, " ").split())
        for prompt in _tagged(sample)
        for _ in range(prompt.count(IMAGE_TAG))
    ]


def _tagged(sample: Sample) -> list[str]:
    """The prompts with a tag for every image; those of a sample without tags are before its first prompt.

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
