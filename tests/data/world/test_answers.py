"""Every answer is computed again from the text of its question by code that shares nothing with the generator."""

import re
from dataclasses import dataclass

import pytest

from vlmlab.data.world.balance import targets
from vlmlab.data.world.questions import KINDS, dialogue, draw_class, single
from vlmlab.data.world.scene import HELD_OUT, Scale, sample_scene
from vlmlab.data.world.stream import Stream

WORDS = {
    "base": {
        "color": ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"],
        "shape": ["circle", "square", "triangle", "diamond", "cross", "ring"],
        "size": ["large", "small"],
        "texture": ["solid", "striped"],
    },
    "shifted": {
        "color": ["pink", "brown", "navy", "teal", "olive", "black", "crimson", "lavender"],
        "shape": ["disc", "block", "wedge", "lozenge", "plus", "loop"],
        "size": ["major", "minor"],
        "texture": ["dotted", "checked"],
    },
}
ASKED = {"tone": "color", "form": "shape", "extent": "size", "pattern": "texture"}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
HOPS = {" in the same row as ": "row", " in the same column as ": "column", " nearest to ": "nearest"}


@dataclass(frozen=True)
class Thing:
    color: str
    shape: str
    size: str
    texture: str
    row: int
    col: int


def things(scene):
    words = WORDS[scene.domain]
    return [
        Thing(*(words[name][getattr(o, name)] for name in ("color", "shape", "size", "texture")), o.row, o.col)
        for o in scene.objects
    ]


def singular(word):
    return {"crosses": "cross", "pluses": "plus"}.get(
        word, word[:-1] if word[-1] == "s" and word not in PLAIN else word
    )


PLAIN = {"cross", "plus"}


class Reader:
    """Understands questions about one list of things."""

    def __init__(self, domain, found):
        self.words, self.things = WORDS[domain], found

    def filters(self, text):
        wanted = {}
        for word in text.split():
            if word in ("the", "a", "an") or singular(word) in ("object", "finding"):
                continue
            name = next(n for n, values in self.words.items() if word in values or singular(word) in values)
            assert name not in wanted
            wanted[name] = word if word in self.words[name] else singular(word)
        return wanted

    def matching(self, text):
        wanted = self.filters(text)
        return [t for t in self.things if all(getattr(t, name) == value for name, value in wanted.items())]

    def resolve(self, text):
        for words, hop in HOPS.items():
            if words in text:
                return self.hop(hop, self.resolve(text.split(words)[1]))
        assert text.startswith("the ")
        found = self.matching(text)
        assert len(found) == 1, f"{text!r} fits {len(found)}"
        return found[0]

    def hop(self, hop, start):
        others = [t for t in self.things if t is not start]
        if hop == "nearest":
            far = {t: (t.row - start.row) ** 2 + (t.col - start.col) ** 2 for t in others}
            found = [t for t in others if far[t] == min(far.values())]
        else:
            found = [t for t in others if (t.row == start.row if hop == "row" else t.col == start.col)]
        assert len(found) == 1
        return found[0]

    def direction(self, a, b):
        a, b = self.resolve(a), self.resolve(b)
        dx, dy = a.col - b.col, a.row - b.row
        assert abs(dx) != abs(dy)
        return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")

    def compare(self, a, b):
        more, less = len(self.matching(a)), len(self.matching(b))
        assert more or less
        term = a if more > less else re.sub(" (objects|findings)$", "", b)
        return "equal" if more == less else term

    def answer(self, question):
        for pattern, answer in (
            (r"(?:Is there|Does the \w+ show) (an? [^?]*)\?", lambda m: self.yes(m[1])),
            (r"Can (an? .*) be seen\?", lambda m: self.yes(m[1])),
            (r"How many (.*) (?:are there|are visible|does the \w+ show)\?", lambda m: str(len(self.matching(m[1])))),
            (r"Where (?:is|does) (.*?) (?:lie )?relative to (.*)\?", lambda m: self.direction(m[1], m[2])),
            (r"Seen from (.*), where is (.*)\?", lambda m: self.direction(m[2], m[1])),
            (r"Are there more (.*) or (.*)\?", lambda m: self.compare(m[1], m[2])),
            (r"Which are (?:there more of|more common), (.*) or (.*)\?", lambda m: self.compare(m[1], m[2])),
            (r"Are (.*) or (.*) more common\?", lambda m: self.compare(m[1], m[2])),
            (
                r"(?:Which|In which) (row|column) (?:is|holds|does) (.*?)(?: in| lie)?\?",
                lambda m: self.cell(m[1], m[2]),
            ),
            (r"Is (the .*) (?:large or small|major or minor)\?", lambda m: self.resolve(m[1]).size),
            (r"Is (the .*) (?:solid or striped|dotted or checked)\?", lambda m: self.resolve(m[1]).texture),
            (r"What is the (\w+) of (the .*)\?", lambda m: getattr(self.resolve(m[2]), ASKED[m[1]])),
            (
                r"(?:What|Which) (\w+) (?:is|does) (the .*?)(?: have)?\?",
                lambda m: getattr(self.resolve(m[2]), ASKED.get(m[1], m[1])),
            ),
        ):
            match = re.fullmatch(pattern, question)
            if match:
                return answer(match)
        raise AssertionError(f"not understood: {question}")

    def yes(self, term):
        article = term.split()[0]
        assert article == ("an" if term.split()[1][0] in "aeiou" else "a")
        return "yes" if self.matching(term) else "no"

    def cell(self, axis, text):
        found = self.resolve(text)
        return NUMBERS[found.row if axis == "row" else found.col]


@pytest.mark.parametrize("domain", ["base", "shifted"])
@pytest.mark.parametrize("split", ["train", "compositional"])
def test_answers_of_conversations(domain, split):
    for index in range(600):
        scene = sample_scene(split, index, domain=domain)
        reader = Reader(domain, things(scene))
        for question in dialogue(scene, Stream(index)):
            assert reader.answer(question.prompt) == question.answer, (scene.id, question)


@pytest.mark.parametrize("domain", ["base", "shifted"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_single_questions(domain, kind):
    asked = 0
    for index in range(400):
        scene = sample_scene("test", index, domain=domain)
        stream = Stream(index)
        question = single(scene, stream, kind, draw_class(stream, kind), insist=False)
        if question:
            asked += 1
            assert question.kind == kind
            assert Reader(domain, things(scene)).answer(question.prompt) == question.answer, (scene.id, question)
    assert asked > 50


@pytest.mark.parametrize("scale", [Scale(2, 1, 2), Scale(4, 2, 3), Scale(6, 3, 9), Scale(8, 12, 16)])
def test_answers_at_other_scales(scale):
    weights = targets(scale)
    for index in range(100):
        scene = sample_scene("train", index, scale=scale)
        reader = Reader("base", things(scene))
        for question in dialogue(scene, Stream(index), weights=weights):
            assert reader.answer(question.prompt) == question.answer, (scene.id, question)
            assert (question.template, question.key) in weights[question.kind] and question.chance < 1


def test_the_reader_finds_a_wrong_answer():
    found = [Thing("red", "circle", "large", "solid", 0, 0), Thing("blue", "ring", "small", "solid", 0, 3)]
    reader = Reader("base", found)
    assert reader.answer("What color is the object in the same row as the ring?") == "red"
    assert reader.answer("Where is the red object relative to the ring?") == "left"
    assert reader.answer("Which are there more of, circles or squares?") == "circles"
    assert reader.answer("Are there more red or blue objects?") == "equal"
    with pytest.raises(AssertionError):
        reader.answer("What color is the solid object?")


def test_questions_are_six_to_eight_different_and_spread_over_the_kinds():
    for index in range(1500):
        scene = sample_scene("train", index)
        questions = dialogue(scene, Stream(index))
        assert 6 <= len(questions) <= 8
        assert len({question.prompt for question in questions}) == len(questions)
        kinds = [question.kind for question in questions]
        assert kinds.count("existence") * 3 <= len(kinds)
        if len(scene.objects) >= 3 and len({(t.color, t.shape) for t in scene.objects}) >= 3:
            assert len(set(kinds)) >= 5


def test_form_of_questions_and_answers():
    for index in range(500):
        for question in dialogue(sample_scene("train", index), Stream(index)):
            assert question.prompt.endswith("?")
            assert question.prompt[0].isupper()
            assert question.answer == question.answer.lower()
            assert len(question.answer.split()) == 1


def test_held_out_pairs_are_never_named_in_training_and_mostly_concerned_in_the_compositional_split():
    words = WORDS["base"]
    pairs = [(words["color"][color], words["shape"][shape]) for color, shape in HELD_OUT]
    named = re.compile("|".join(rf"{color} (?:\w+ )?{shape}" for color, shape in pairs))
    for index in range(1500):
        for question in dialogue(sample_scene("train", index), Stream(index)):
            assert not named.search(question.prompt)
    concerned = total = 0
    for index in range(300):
        scene = sample_scene("compositional", index)
        held = [t for t in things(scene) if (t.color, t.shape) in pairs]
        for question in dialogue(scene, Stream(index)):
            if question.kind in ("attribute", "position"):
                total += 1
                reference = re.search(r"the ([\w ]+?)(?: have| in|\?| large or| solid or)", question.prompt)
                target = Reader("base", things(scene)).matching(reference[1])
                concerned += target[0] in held
    assert concerned / total > 0.75
