"""Visual question answering from a JSON file of image, question and answer, with or without a split of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vlmlab.contracts.errors import DataError, UserError, listed
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts, Width
from vlmlab.data.fingerprint import Facts, files_fingerprint
from vlmlab.data.images import ImageFolder
from vlmlab.data.overlap import Stored
from vlmlab.data.readers.place import find_files, split_files
from vlmlab.data.readers.records import Row, checked_image, describe, read_each, read_rows
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, named_split, split_of, subset, unit_hash

SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the file, checked: what a Turn and its Sample are made of."""

    id: str
    image: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    kind: str
    options: tuple[str, ...] = ()

    def turn(self) -> Turn:
        """The question as a turn of a sample."""
        return Turn(self.prompt, self.answer, self.kind, self.references, options=self.options)


@dataclass(frozen=True)
class VqaFormat:
    """Which key of a row means what.

    Attributes:
        image_key, question_key, id_key: keys of the image's name, the question and the id (null: rows are numbered);
            of a list of keys the first that a row has counts.
        answer_key: key of the one answer (text or number).
        answers_key: key of the list of human answers (texts, or objects with `answer` as in VQA v2). Where a row has
            both, `answer_key` is learnt and the list is what predictions are compared with; where it has the list
            alone, the most frequent of them (the first among equals) is learnt.
        kind_keys: the first of these that a row has names the kind of question under which it is scored; where it has
            none the answer decides: yes_no, number or other.
        suffix: words after every question, such as "Answer the question using a single word or phrase.".
        image_name: how a file is called after the number under `image_key`, such as COCO_val2014_{:012d}.jpg; null: the
            key has its name.
        answer_text: key of the words of an answer that is an object.
        choices_key: key of a list of choices, one of which is the answer; null: the answer is free.
        right_key: key of the number of the right choice, from 0.
        letters: choices are listed behind the question, and the answer is a letter; false: the answer is the choice
            itself, which the question does not show.
    """

    image_key: str | Sequence[str] = "image"
    question_key: str = "question"
    id_key: str | Sequence[str] | None = "question_id"
    answer_key: str = "answer"
    answers_key: str = "answers"
    kind_keys: tuple[str, ...] = ("answer_type", "question_type")
    suffix: str = ""
    image_name: str | None = None
    answer_text: str = "answer"
    choices_key: str | None = None
    right_key: str = "correct_choice_idx"
    letters: bool = False

    def __post_init__(self) -> None:
        if self.image_name is None:
            return
        try:
            named = {self.image_name.format(number) for number in (1, 2)}
        except (ValueError, IndexError, KeyError):
            named = set()
        if len(named) < 2:
            raise UserError(
                f"image_name={self.image_name!r} makes no names of numbers; write it as in COCO_val2014_{{:012d}}.jpg."
            )


def parse_question(row: Row, form: VqaFormat, folder: ImageFolder | None) -> Question:
    """One row, checked; raises DataError (file, row, key, remedy) where it cannot be used.

    Without a folder the image comes with the row, and what is under its key only tells it from others.
    """
    key = first_key(row, form.image_key)
    image = row.text(row.get(key), key) if form.image_name is None else _numbered(row, key, form.image_name)
    if folder is not None:
        image = checked_image(row, image, folder)
    question = row.untagged(row.get(form.question_key), form.question_key)
    answer, references, options, shown = _answered(row, form)
    id_ = f"{row.file.stem}-{row.number}"
    if form.id_key is not None:
        key = first_key(row, form.id_key)
        id_ = _word(row, row.get(key), key)
    prompt = "\n".join(words for words in (question, shown, form.suffix) if words)
    return Question(id_, image, prompt, answer, references, _kind(row, form, answer), options)


def _numbered(row: Row, key: str, name: str) -> str:
    """The name of an image's file, after its number."""
    value = row.get(key)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise row.error(f"'{key}' is {describe(value)}, and no whole number", "set image_name=null if it is a name")
    return name.format(value)


def _answered(row: Row, form: VqaFormat) -> tuple[str, tuple[str, ...], tuple[str, ...], str]:
    """The answer to learn, what people answered, the options, and how they are listed behind the question."""
    if form.choices_key is None:
        return *_answers(row, form), (), ""
    answer, options, shown = _choice(row, form, form.choices_key)
    return answer, (), options, shown


def _choice(row: Row, form: VqaFormat, key: str) -> tuple[str, tuple[str, ...], str]:
    """The right answer, the options, and how they are listed behind the question."""
    many, right = row.get(key), row.get(form.right_key)
    if not isinstance(many, list) or not 2 <= len(many) <= len(ascii_uppercase):
        raise row.error(f"'{key}' is not a list of 2 to {len(ascii_uppercase)} choices", "correct or remove the row")
    choices = tuple(_word(row, entry, key) for entry in many)
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
        raise row.error(f"'{form.right_key}' is not the number of a choice, from 0", "correct or remove the row")
    if not form.letters:
        return choices[right], choices, ""
    letters = tuple(ascii_uppercase[: len(choices)])
    told = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return letters[right], letters, told


def first_key(row: Row, keys: str | Sequence[str]) -> str:
    """The first of the keys that the row has; the first of all where it has none."""
    if isinstance(keys, str):
        return keys
    return next((key for key in keys if key in row.data), keys[0])


def _word(row: Row, value: object, key: str) -> str:
    """Text or a number as text; some files mix the two."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return row.untagged(value, key)


def _answers(row: Row, form: VqaFormat) -> tuple[str, tuple[str, ...]]:
    """The answer to learn and all human answers, duplicates kept because VQA accuracy counts them."""
    one, many = row.data.get(form.answer_key), row.data.get(form.answers_key)
    if many is None:
        return _word(row, row.get(form.answer_key), form.answer_key), ()
    if not isinstance(many, list) or not many:
        problem = f"'{form.answers_key}' is not a list of answers"
        raise row.error(problem, f"use '{form.answer_key}' for a single answer")
    plain = (entry.get(form.answer_text) if isinstance(entry, dict) else entry for entry in many)
    texts = tuple(_word(row, entry, form.answers_key) for entry in plain)
    learnt = Counter(texts).most_common(1)[0][0] if one is None else _word(row, one, form.answer_key)
    return learnt, texts


def _kind(row: Row, form: VqaFormat, answer: str) -> str:
    key = next((key for key in form.kind_keys if row.data.get(key) is not None), None)
    if key is None:
        return answer_kind(answer)
    kind = re.sub(r"\W+", "_", row.text(row.data[key], key).lower()).strip("_")
    if not kind:
        raise row.error(f"'{key}' holds no letter or digit", "name the kind of question, or remove the key")
    return kind


def answer_kind(answer: str) -> str:
    """yes_no, number or other, as in VQA v2, from the answer alone."""
    word = answer.strip().rstrip(".").lower()
    if word in ("yes", "no"):
        return "yes_no"
    return "number" if re.fullmatch(r"[-+]?\d+([.,]\d+)?", word) else "other"


def choose_rows(
    rows: list[Row],
    images: Sequence[str],
    split: str | None,
    split_keys: Sequence[str],
    fractions: tuple[float, float],
    seed: int,
    row_filter: RowFilter,
    words: Mapping[str, Sequence[str]] | None = None,
) -> list[Row]:
    """The rows of a split: by the first of `split_keys` the file has, otherwise by a hash of the image's name.

    A file that names train and test but no val gets its val out of its train, by image.

    Args:
        rows: all rows of the file.
        images: what the image of each row is split by, the same for rows with the same image.
        split: train, val, test, or None for all rows.
        split_keys: keys that may hold the split's name.
        fractions: shares of val and test where the file has no word on it.
        seed: of the hash.
        row_filter: takes the rows without the split's name, or with an unknown one.
        words: a file's own words for a split, beside the usual ones.

    Raises:
        DataError: a split without rows, or a bad row where the filter lets none through.
    """
    if split is None:
        return rows
    val, test = fractions
    own = {word.strip().lower(): name for name, many in (words or {}).items() for word in many}
    key = next((key for key in split_keys if any(key in row.data for row in rows)), None)
    named: list[str | None]
    if key is None:
        named = [split_of(name, val, test, seed) for name in images]
    else:
        named = [_named(row, key, own, row_filter) for row in rows]
        if "val" not in named:
            hashed = (split_of(name, val, 0.0, seed) for name in images)
            named = [h if n == "train" else n for n, h in zip(named, hashed, strict=True)]
    chosen = [row for row, name in zip(rows, named, strict=True) if name == split]
    if not chosen:
        row_filter.finish(rows[0].file if rows else "The data")  # it may be that all are bad
        counts = listed((f"{name} {n}" for name, n in sorted(Counter(filter(None, named)).items())), 80)
        remedy = "set data.test_path, raise the split's fraction, or split by image with data.split_keys=[]"
        file = rows[0].file if rows else "without usable rows"
        raise DataError(f"Data file {file} has no rows for the split '{split}' ({counts}); {remedy}")
    return chosen


def _named(row: Row, key: str, words: Mapping[str, str], row_filter: RowFilter) -> str | None:
    """The split that a row names; None where the row is left out for want of one."""
    try:
        value = row.text(row.get(key), key)
        found = words.get(value.lower()) or named_split(value)
        if found is None:
            remedy = "use train, val or test, or set data.split_keys=[]"
            raise row.error(f"'{key}' is '{value}', no known split", remedy)
        return found
    except DataError as error:
        row_filter.refuse(row, error)
        return None


def image_words(rows: Sequence[Row], form: VqaFormat) -> list[str]:
    """What is in each row for its image's name, right or wrong; of numbers the names made of them."""
    names = []
    for row in rows:
        key = first_key(row, form.image_key)
        names.append(str(row.data.get(key)))
        if form.image_name is not None:
            with suppress(DataError):
                names[-1] = _numbered(row, key, form.image_name)
    return names


def annotated(rows: Iterable[Row], file: Path, id_key: str, row_filter: RowFilter) -> Iterator[Row]:
    """Each question with its annotation, which is the row of another file with the same id (VQA v2, OK-VQA).

    Raises:
        DataError: the annotations cannot be read, or a question has none and the filter lets none through.
    """
    notes = {str(note.data.get(id_key)): note.data for note in read_rows(file, ("annotations",))}
    for row in rows:
        note = notes.get(str(row.data.get(id_key)))
        if note is None:
            row_filter.refuse(
                row, row.error(f"its '{id_key}' is not in {file}", "give the annotations of these questions")
            )
            continue
        yield Row(row.file, row.number, {**note, **row.data}, row.unit)


def question_rows(
    files: Sequence[Path],
    annotations: Path | None,
    id_key: str,
    where: Mapping[str, Sequence[Any]],
    row_filter: RowFilter,
    source: str,
) -> list[Row]:
    """The rows of the files with their annotations; of those that have a key of `where` the ones with its values.

    Raises:
        DataError: a file cannot be read, or more of `source` is bad than the filter lets through.
    """
    rows = [row for file in files for row in row_filter.rows(read_each(file, ("questions", "data"), id_key))]
    if annotations is not None:
        rows = list(annotated(rows, annotations, id_key, row_filter))
    if not rows:
        row_filter.finish(source)
    return [row for row in rows if all(row.data.get(key, words[0]) in words for key, words in where.items())]


class VqaJson:
    """Questions about images as samples; records are read and checked at once, pixels when a sample is asked for.

    The file is a JSON list, JSON lines, an object with the list under `questions` or `data`, or an object of rows by
    their ids, as GQA's. Image names are relative to `images`. Without `test_path`, train, val and test come out of
    `path`: by the first of `split_keys` its rows have, otherwise by a hash of the image's name, so that no image is in
    two splits. With `test_path`, the whole of that file is the test split and `path` gives train and val.

    Args:
        path: the JSON file; or a folder or glob of them, or an id of the hub. Files named after a split (train.json,
            validate.json) are that split.
        images: the image folder; null is the folder of the (first) file itself.
        split: train, val, test, or null for every row of `path`.
        test_path: a file that is the test split.
        multi_turn: the questions of one image as one conversation (training) instead of one sample each (benchmark).
        max_turns: most questions in one conversation; more are dealt evenly over several.
        size: only so many samples, chosen by seed; null for all.
        seed: of the questions' order inside a conversation and of the choice of `size`.
        split_seed: of the split by image; apart from `seed`, so that runs with other seeds share their test split.
        val_fraction, test_fraction: shares of the images where the file has no split of its own.
        split_keys: keys that may hold the split's name; empty: always split by image.
        split_words: a file's own words for a split, such as {test: [test_freeform, test_para]}.
        where: keep only rows whose key has one of these values, such as {q_lang: [en]}; rows without the key stay.
        image_key, question_key, id_key, answer_key, answers_key, kind_keys, suffix: see `VqaFormat`.
        image_name, answer_text, choices_key, right_key, letters: likewise.
        annotations: a file whose rows (a list, or one under `annotations`) have the answers to those of `path`, by
            their id; null: they have their answers.
        max_bad_fraction: share of the rows that may be unusable and are left out; 0: the first is an error.
        verify: decode all images at once, to leave out questions about broken ones (for sets that are scored).
        image_roots, image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the rows that were left out.

    Raises:
        DataError: the file, the folder or a row cannot be used, or the split is empty.
    """

    turns_in_memory = True

    def __init__(
        self,
        path: Text,
        images: Text | None = None,
        split: Split | None = None,
        test_path: Text | None = None,
        multi_turn: bool = True,
        max_turns: Width = 8,
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        test_fraction: Share = 0.1,
        split_keys: Texts = ("official_split", "split"),
        split_words: Mapping[str, Sequence[str]] | None = None,
        where: Mapping[str, Sequence[Any]] | None = None,
        image_key: Text | Texts = "image",
        question_key: Text = "question",
        id_key: Text | Texts | None = "question_id",
        answer_key: Text = "answer",
        answers_key: Text = "answers",
        kind_keys: Texts = ("answer_type", "question_type"),
        suffix: str = "",
        image_name: Text | None = None,
        answer_text: Text = "answer",
        choices_key: Text | None = None,
        right_key: Text = "correct_choice_idx",
        letters: bool = False,
        annotations: Text | None = None,
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_roots: Texts = (),
        image_range: Levels = "auto",
    ) -> None:
        check_split(split, val_fraction, test_fraction)
        form = VqaFormat(
            image_key, question_key, id_key, answer_key, answers_key, tuple(kind_keys), suffix,
            image_name, answer_text, choices_key, right_key, letters,
        )  # fmt: skip
        separate = test_path is not None and split == "test"
        source = test_path if test_path is not None and separate else path
        found = find_files(source, SUFFIXES)
        test = 0.0 if test_path is not None else test_fraction
        files, shares = split_files(found, None if separate else split, val_fraction, test)
        self._folder = ImageFolder(images if images is not None else found[0].parent, image_roots, image_range)
        self._files = files if annotations is None else [*files, Path(annotations).expanduser()]
        row_filter = RowFilter(max_bad_fraction)
        by_id = id_key if isinstance(id_key, str) else next(iter(id_key or ()), "id")
        notes = None if annotations is None else self._files[-1]
        rows = question_rows(files, notes, by_id, where or {}, row_filter, source)
        named = split if shares is not None else None
        names = image_words(rows, form)
        if named is not None:
            same = self._folder.same(names)
            names = [same[name] for name in names]
        rows = choose_rows(
            rows, names, named, tuple(split_keys), shares or (0.0, 0.0), split_seed, row_filter, split_words
        )
        questions = [question for _, question in unique_questions(rows, form, self._folder, row_filter)]
        row_filter.finish(source)
        if verify:
            questions = verified(
                questions, row_filter, lambda q: self._folder.load(q.image), lambda q: q.id, lambda q: q.image
            )
        self.skipped = row_filter.finish(source)
        groups = conversations(questions, max_turns, seed) if multi_turn else [(q.id, (q,)) for q in questions]
        self._groups = [groups[i] for i in subset([name for name, _ in groups], size, seed)]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        name, questions = self._groups[index]
        image = questions[0].image
        return Sample(name, (self._folder.load(image),), self.turns(index), image_ids=(image,))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its image."""
        return tuple(question.turn() for question in self._groups[index][1])

    def stored(self, most: int) -> Iterator[Stored]:
        """Its images as they are kept."""
        return self._folder.stored((question.image for _, group in self._groups for question in group), most)

    def fingerprint(self) -> Facts:
        """Facts that change with the content of its files."""
        return files_fingerprint(self._files) | self._folder.fingerprint(
            question.image for _, group in self._groups for question in group
        )

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return self._groups[index][0]


def unique_questions(
    rows: Sequence[Row], form: VqaFormat, folder: ImageFolder | None, row_filter: RowFilter
) -> list[tuple[Row, Question]]:
    """The usable rows; an id that is there twice makes the second row unusable."""
    first: dict[str, int] = {}

    def parse(row: Row) -> tuple[Row, Question]:
        question = parse_question(row, form, folder)
        before = first.setdefault(question.id, row.number)
        if before != row.number:
            problem = f"id '{question.id}' is that of {row.unit} {before} too"
            raise row.error(problem, "make the ids unique, or set data.id_key=null to number the rows")
        return row, question

    return row_filter.keep(rows, parse)


def conversations(questions: list[Question], max_turns: int, seed: int) -> list[tuple[str, tuple[Question, ...]]]:
    """The questions of each image, shuffled by seed and dealt evenly over as few conversations as `max_turns` lets."""
    if max_turns < 1:
        raise DataError(f"max_turns={max_turns} leaves no question in a conversation; use 1 or more")
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    made = []
    for image, group in by_image.items():
        shuffled = sorted(group, key=lambda q: unit_hash(q.id, seed))
        parts = -(-len(shuffled) // max_turns)
        made += [(f"{image}#{part}", tuple(shuffled[part::parts])) for part in range(parts)]
    return made
