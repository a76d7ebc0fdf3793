"""That generation is asked what was learnt: shown token by token on samples, before anything trains on their kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample
from vlmlab.data.chat import ANSWER, ChatEncoder, Encoded
from vlmlab.data.questions import split_questions

if TYPE_CHECKING:
    from vlmlab.data.collate import Collator

APART = "a prompt for generation would become one token with the answer that follows: they are tokenised apart"


def check_prompt(collate: Collator, sample: Sample) -> list[str]:
    """Hold tokenizer and template to it that every prompt for generation is the beginning of what is learnt.

    It ends where the answer begins, whose first and last tokens are learnt; at the last one generation stops.

    Args:
        collate: how samples are read.
        sample: one of them.

    Returns:
        What is worth a note, a sentence each.

    Raises:
        DataError: the sample cannot be used.
        UserError: generation would be asked something else, or would not stop.
    """
    return [note for one in parts(collate, sample) for note in _proved(collate.encoder, one)]


def parts(collate: Collator, sample: Sample) -> list[Sample]:
    """The conversations as which a sample is read."""
    return [sample] if collate.questions == "conversation" else split_questions(sample)


def _proved(encoder: ChatEncoder, sample: Sample) -> Iterator[str]:
    trained = encoder.train(sample)
    answered = [k for k, turn in enumerate(sample.turns) if turn.answer]
    spoken = answered[:1] if encoder.prompt == "plain" else answered
    for k, (start, stop) in zip(spoken, _answers(trained), strict=False):
        prompt = encoder.ask(sample if encoder.prompt == "plain" else _up_to(sample, k)).ids
        learnt = trained.labels[start:stop] == trained.ids[start:stop]
        if prompt != trained.ids[:start] or not learnt:
            raise UserError(
                f"Sample {sample.id}: generation would be asked {_end(encoder, prompt)!r} and learnt is what follows "
                f"{_end(encoder, trained.ids[:start])!r}; give lm.chat_template one whose generation prompt is how its "
                "answers begin."
            )
        if trained.ids[stop - 1] not in encoder.stops:
            raise UserError(
                f"Sample {sample.id}: the answer ends in {_end(encoder, trained.ids[:stop])!r}, where generation does "
                "not stop; give another template by lm.chat_template."
            )
        words = trained.ids[start : stop - 1]
        back = encoder.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if str(back).strip() != sample.turns[k].answer.strip():
            yield "an answer does not come back from its tokens as it is written"
    if encoder.merges(sample):
        yield APART


def _answers(trained: Encoded) -> list[tuple[int, int]]:
    """Where the answers begin and end."""
    edges = [k for k, _ in enumerate(trained.roles) if _speaks(trained, k) != _speaks(trained, k - 1)]
    edges += [len(trained.roles)] * (len(edges) % 2)
    return list(zip(edges[::2], edges[1::2], strict=True))


def _speaks(trained: Encoded, k: int) -> bool:
    return k >= 0 and trained.roles[k] == ANSWER


def _up_to(sample: Sample, turn: int) -> Sample:
    """The sample that ends with a turn, with the images that are in it."""
    turns = sample.turns[: turn + 1]
    tagged = any(IMAGE_TAG in one.prompt for one in sample.turns)
    count = sum(one.prompt.count(IMAGE_TAG) for one in turns) if tagged else len(sample.images)
    return replace(sample, turns=turns, images=sample.images[:count])


def _end(encoder: ChatEncoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(ids)[-16:]))[-30:]


def sent(encoder: ChatEncoder, sample: Sample) -> str:
    """The prompt for generation as it is sent, on one line; the visual tokens of an image in brackets."""
    asked = encoder.ask(sample)
    text = ""
    for image, run in groupby(zip(asked.image, asked.ids, strict=True), key=lambda entry: entry[0]):
        ids = [token for _, token in run]
        text += str(encoder.tokenizer.decode(ids)) if image < 0 else f"[image {image + 1}: {len(ids)} tokens]"
    return repr(text)
