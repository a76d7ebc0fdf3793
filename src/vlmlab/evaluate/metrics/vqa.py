"""VQA accuracy: exact match after the VQA evaluator's normalisation, or agreement with ten annotators.

Normalisation and the soft accuracy follow the official evaluator (GT-Vision-Lab/VQA, vqaEval.py, BSD 2-clause;
Antol et al. 2015, arXiv 1505.00468), quirks included, so that numbers compare with published ones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.values import Count
from vlmlab.evaluate.metrics.floors import above
from vlmlab.evaluate.metrics.rows import Row

ACCURACY = "vqa_accuracy"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
DIGITS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTIONS = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've
hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's
Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll
let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at
'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
somethingd=something'd somethingd've=something'd've something'dve=something'd've somethingll=something'll
thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're theres=there's
theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's
whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(pair.split("=") for pair in _CONTRACTIONS.split())
"""The evaluator's table as it is, with its oddities: an answer without its apostrophe equals the one with it."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalise(answer: str) -> str:
    """The answer in the form in which it is compared: no case, articles or punctuation, number words as digits."""
    return _words(_without_punctuation(_one_line(answer)))


def emptied(answer: str) -> bool:
    """Whether the normalisation leaves nothing of an answer that has words: an article, as the letter A, or marks."""
    return bool(answer.strip()) and not normalise(answer)


def refuse_emptied(row: Row) -> None:
    """Refuse options that the normalisation empties: "A" would be right where nothing was said.

    Raises:
        UserError: naming the first.
    """
    if lost := next((option for option in row.options if emptied(option)), None):
        raise UserError(
            f"Question {row.id} of {row.benchmark} has the option {lost!r}, of which the VQA evaluator's normalisation "
            "leaves nothing (it drops articles and marks); score options by "
            "vlmlab.evaluate.metrics.options.OptionAccuracy."
        )


def exact_match(prediction: str, references: Iterable[str]) -> float:
    """1.0 if the normalised prediction equals any normalised reference, else 0.0."""
    answer = normalise(prediction)
    return float(any(answer == normalise(reference) for reference in references))


def soft_accuracy(prediction: str, annotators: tuple[str, ...]) -> float:
    """Agreement with several annotators, 0..1: min(agreeing / 3, 1), averaged over leaving each annotator out.

    As in the official evaluator, answers are normalised only where the annotators do not all agree to the letter.
    """
    answers = [_one_line(answer) for answer in annotators]
    answer = _one_line(prediction)
    if len(set(answers)) > 1:
        answers = [_words(_without_punctuation(text)) for text in answers]
        answer = _words(_without_punctuation(answer))
    agreeing = sum(text == answer for text in answers)
    left_out_agrees = min(1.0, (agreeing - 1) / 3) * agreeing
    left_out_differs = min(1.0, agreeing / 3) * (len(answers) - agreeing)
    return (left_out_agrees + left_out_differs) / len(answers)


class VqaAccuracy:
    """Accuracy over all questions and per kind, beside what answers that never look would reach.

    ``compute`` gives ``vqa_accuracy``, ``vqa_accuracy/count`` (number of questions), ``chance`` and
    ``normalised`` = (accuracy - floor) / (1 - floor), and each per kind as ``<name>/kind/<kind>``; where questions have
    a group, also per group as ``<name>/<group>``, with its own count. Chance is given where every question of the set
    (kind, group) states its own. The floor is the highest of chance and the accuracies of the other sets of answers
    (wrong images, no image, commonest training answers) as far as they are known; ``floor/<its name>`` says which one
    it was and how high. ``normalised`` is below 0 where the model is under its floor.

    Args:
        annotators: a question with at least this many references is scored by agreement with them (the official
            benchmarks have 10 people per question); with fewer, any reference that matches exactly counts.
    """

    of_answers = ACCURACY
    loses = staticmethod(emptied)

    def __init__(self, annotators: Count = 10) -> None:
        if annotators < 2:
            raise UserError(f"VqaAccuracy: annotators is {annotators} but agreement needs at least 2; the norm is 10.")
        self.annotators = annotators
        self._correct: dict[str, list[float]] = defaultdict(list)
        self._chance: dict[str, list[float | None]] = defaultdict(list)
        self._groups: set[str] = set()

    def score(self, prediction: Row) -> float:
        """Accuracy of one answer, 0..1; UserError if the question has no reference, or an option that is an article."""
        refuse_emptied(prediction)
        if not prediction.references:
            raise UserError(
                f"Question {prediction.id} turn {prediction.turn} of {prediction.benchmark} has no answer to compare "
                "with; give it one or remove it from the benchmark."
            )
        if len(prediction.references) >= self.annotators:
            return soft_accuracy(prediction.prediction, prediction.references)
        return exact_match(prediction.prediction, prediction.references)

    def update(self, prediction: Row) -> None:
        """Add one answered question."""
        correct = self.score(prediction)
        kinds = [f"/kind/{prediction.kind}"] if prediction.kind else []
        groups = [f"/{prediction.group}"] if prediction.group else []
        self._groups.update(groups)
        for suffix in ("", *kinds, *groups):
            self._correct[suffix].append(correct)
            self._chance[suffix].append(prediction.chance)

    def predicted(self) -> dict[str, float]:
        """Accuracy, overall, per kind and per group; UserError if there was no question."""
        if not self._correct:
            raise UserError("VqaAccuracy has no question to score; raise budget.eval_limit or check the benchmark.")
        return {f"{ACCURACY}{suffix}": fmean(values) for suffix, values in sorted(self._correct.items())}

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """Accuracy with its chance level, its share above the highest floor and the number of questions."""
        result = self.predicted()
        for suffix, values in sorted(self._correct.items()):
            accuracy = result[f"{ACCURACY}{suffix}"]
            if not suffix or suffix in self._groups:
                result[f"{ACCURACY}{suffix}/count"] = float(len(values))
            chances = [chance for chance in self._chance[suffix] if chance is not None]
            known = {name: scores.get(f"{ACCURACY}{suffix}") for name, scores in (floors or {}).items()}
            if len(chances) == len(values):
                result[f"chance{suffix}"] = fmean(chances)
                known = {"chance": result[f"chance{suffix}"], **known}
            result |= above(accuracy, {name: level for name, level in known.items() if level is not None}, suffix)
        return result


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Remove marks beside a space (all marks in an answer with a number like 1,000), turn the others into spaces."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or number else " ")
    return _FULL_STOP.sub("", out)


def _words(text: str) -> str:
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
