import hashlib
import importlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.data.world import base, fitting, sources
from vlmlab.data.world.questions import KINDS
from vlmlab.data.world.scene import HELD_OUT, sample_scene
from vlmlab.data.world.sources import (
    LooseCaptions,
    WorldCaptions,
    WorldInstruct,
    WorldInterleaved,
    WorldInterleavedInstruct,
    WorldPhrasings,
    WorldQuestions,
    WorldStatements,
    WorldTaskCaptions,
    WorldTaskInstruct,
    WorldTaskQuestions,
    WorldText,
    WorldTextInstruct,
)
from vlmlab.data.world.words import lexicon

CONFIG = Path(__file__).parents[3] / "conf" / "data" / "world.yaml"
SOURCES = {
    "short": WorldCaptions("short", "train", 200),
    "dense": WorldCaptions("dense", "val", 200),
    "mixed": WorldCaptions("mixed", "train", 200, seed=3),
    "conversation": WorldQuestions("train", 200, multi_turn=True),
    "single": WorldQuestions("test", 200),
    "compositional": WorldQuestions("compositional", 200),
    "instruct": WorldInstruct("train", 200),
    "interleaved": WorldInterleaved("test", 200),
    "text": WorldText("train", 200),
    "shifted": WorldInstruct("train", 200, domain="shifted"),
    "shifted_single": WorldQuestions("test", 200, domain="shifted"),
    "shifted_interleaved": WorldInterleaved("train", 200, seed=1, domain="shifted"),
    "statements": WorldStatements("train", 200),
}

GOLDEN = {
    "short": ["24ff003ee3efcc37", "738867153295e3ab", "4b735f2da8f4aff9"],
    "dense": ["af9b4478ffe1cdaf", "235c6cc4c9943e0c", "e043ed881832b92d"],
    "mixed": ["65476614a11c669b", "b48563e4018554da", "d1ce6d323cc3e573"],
    "conversation": ["f7b9a7f5499d932e", "570fa3f12a31abca", "5268541ca2604778"],
    "single": ["b3f60396cd264351", "204394043f4042b1", "9cd934d7068e01cc"],
    "compositional": ["85baed8ebd540fa4", "473dbbb9b774d2ca", "5505a8fae062837b"],
    "instruct": ["f7b9a7f5499d932e", "570fa3f12a31abca", "561cd30873ba02ff"],
    "interleaved": ["12f71f197f5557c1", "46d3c08bd87cb55f", "d1751e0a9568cd51"],
    "text": ["6eafd9a0f1327a27", "19fa79c23fbc6e49", "ac9def43bb095361"],
    "shifted": ["be2feaf532f402e8", "7cf8faa6ffcd9346", "8b5ebc6facd5aea0"],
    "shifted_single": ["72a92d3f0636fae0", "53238279bcf649cc", "052ef57a58181b15"],
    "shifted_interleaved": ["2c8b2f82a9d59259", "b9236a3b7a8b99a0", "eaa2f308dbf09f47"],
    "statements": ["9c16def0829730ae", "351f7bef752394e1", "db0645e73873d95e"],
}


def digest(sample):
    """A hash of everything in a sample."""
    words = repr((sample.id, sample.turns, sample.system, sample.image_ids)).encode()
    return hashlib.sha256(words + b"".join(image.tobytes() for image in sample.images)).hexdigest()[:16]


@pytest.mark.parametrize("name", SOURCES)
def test_golden_samples(name):
    assert [digest(SOURCES[name][index]) for index in (0, 57, 199)] == GOLDEN[name]


@pytest.mark.parametrize("name", SOURCES)
def test_samples_do_not_depend_on_the_order_of_access(name):
    source = SOURCES[name]
    forward = [digest(source[index]) for index in range(20)]
    backward = [digest(source[index]) for index in reversed(range(20))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("name", SOURCES)
def test_samples_are_well_formed(name):
    samples = list(SOURCES[name])
    assert len(samples) == len(SOURCES[name]) == 200
    assert len({sample.id for sample in samples}) == 200
    for sample in samples:
        assert len(sample.images) == len(sample.image_ids)
        assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in sample.images)
        assert sample.turns and all(turn.answer and turn.kind for turn in sample.turns)
        assert all(turn.chance is None or 0 < turn.chance <= 0.5 for turn in sample.turns)


@pytest.mark.parametrize("name", SOURCES)
def test_turns_come_without_pixels(name, monkeypatch):
    samples = [SOURCES[name][index] for index in range(8)]
    monkeypatch.setattr(base, "render", lambda scene: pytest.fail("an image was drawn"))
    assert [SOURCES[name].turns(index) for index in range(8)] == [sample.turns for sample in samples]
    with pytest.raises(IndexError):
        SOURCES[name].turns(200)


def test_loose_shapes_tell_their_turns_without_pixels(monkeypatch):
    loose = LooseCaptions("train", 4)
    turns = loose[3].turns
    monkeypatch.setattr(sources, "render_loose", lambda scene: pytest.fail("an image was drawn"))
    assert loose.turns(3) == turns


def test_compositional_questions_that_turn_on_a_held_out_pair_are_marked():
    words = lexicon("base")
    pairs = [(words.colors[color], words.shapes[shape], words.plurals[shape]) for color, shape in HELD_OUT]

    def named(text):
        return any(f"{color} {form}" in text.replace(t, "").replace("  ", " ")
                   for color, *forms in pairs for form in forms for t in words.textures)  # fmt: skip

    turns = [SOURCES["compositional"].turns(index)[0] for index in range(200)]
    assert {turn.group for turn in turns} == {"held_out_pair", "other"}
    for turn in turns:
        completed = turn.kind == "attribute" and any(
            {turn.answer, other} == {color, shape} and other in turn.prompt.rstrip("?").split()
            for color, shape, _ in pairs
            for other in (color, shape)
        )
        assert (turn.group == "held_out_pair") == (named(turn.prompt) or completed), turn
    assert sum(turn.group == "held_out_pair" for turn in turns) > 20
    others = [turn for name in ("single", "conversation", "text") for index in range(20)
              for turn in SOURCES[name].turns(index)]  # fmt: skip
    assert not {turn.group for turn in others} - {""}


def test_size_does_not_change_samples():
    assert digest(WorldQuestions("test", 8)[7]) == digest(WorldQuestions("test", 2000)[7])


def test_indices_outside_are_refused():
    for index in (-1, 200):
        with pytest.raises(IndexError):
            SOURCES["short"][index]


def test_short_captions_come_with_five_references_and_their_own_prompts():
    short, dense = SOURCES["short"], SOURCES["dense"]
    assert all(len(s.turns[0].references) == 5 and s.turns[0].answer in s.turns[0].references for s in short)
    assert not {s.turns[0].prompt for s in short} & {s.turns[0].prompt for s in dense}


def test_mixed_captions_and_instruct_mix_as_said():
    kinds = [sample.turns[0].kind for sample in WorldCaptions("mixed", "train", 1000)]
    assert 0.45 < kinds.count("caption") / 1000 < 0.55
    samples = list(WorldInstruct("train", 1000, caption_fraction=0.3))
    assert 0.26 < sum("caption" in sample.turns[0].kind for sample in samples) / 1000 < 0.34
    assert not any("caption" in s.turns[0].kind for s in WorldInstruct("train", 100, caption_fraction=0))


def test_statements_are_told_or_asked_as_said() -> None:
    kinds = [sample.turns[0].kind for sample in WorldStatements("train", 1000)]
    assert all(0.2 < kinds.count(form) / 1000 < 0.3 for form in ("caption", "dense", "answered", "question"))
    by_form = {
        form: [sample.turns[0].answer for sample in WorldStatements("val", 100, forms=[form])] for form in set(kinds)
    }
    assert all(text.count("?") == 1 and text.endswith("?") for text in by_form["question"])
    assert all(1 <= text.count("?") <= 2 and text.endswith(".") for text in by_form["answered"])
    assert not any("?" in text for form in ("caption", "dense") for text in by_form[form])
    prompts = {sample.turns[0].prompt for sample in SOURCES["dense"]}
    asked = sum(any(text.startswith(prompt) for prompt in prompts) for text in by_form["dense"])
    assert 35 < asked < 65
    with pytest.raises(UserError, match="no statements of form 'told'; set forms to some of: caption"):
        WorldStatements("train", 10, forms=["told"])


def test_no_conversation_is_empty() -> None:
    source = WorldQuestions("train", 200, multi_turn=True, kinds=["relation"])  # a scene of one object has none
    assert all({turn.kind for turn in source[index].turns} == {"relation"} for index in range(200))


def test_kinds_can_be_chosen():
    source = WorldQuestions("test", 40, kinds=["count", "relation"])
    assert [sample.turns[0].kind for sample in source] == ["count", "relation"] * 20
    turns = WorldQuestions("train", 20, multi_turn=True, kinds=["existence"])[3].turns
    assert {turn.kind for turn in turns} == {"existence"}


@pytest.mark.parametrize(("grid", "objects"), [(2, [1, 2]), (5, [4, 8])])
def test_every_kind_is_asked_at_other_scales(grid, objects, monkeypatch):
    monkeypatch.setattr(base, "weights_of", lambda scale: fitting.fit(20, 1, scale))  # shares are another test's
    source = WorldQuestions("test", 70, grid=grid, objects=objects)
    turns = [source.turns(index)[0] for index in range(70)]
    assert {turn.kind for turn in turns} == set(KINDS) and all(turn.chance <= 0.5 for turn in turns)
    assert source[0].images[0].shape == (16 * grid, 16 * grid, 3)
    instruct = WorldInstruct("train", 10, kinds=["position"], grid=grid, objects=objects, caption_fraction=0)
    assert {turn.kind for index in range(10) for turn in instruct.turns(index)} == {"position"}
    assert f"-{grid}x{grid}-" in instruct[0].id


def test_a_kind_that_no_scene_offers_is_refused():
    source = WorldQuestions("test", 1, kinds=["position"], grid=2, objects=[4, 4])
    assert source[0].turns  # four objects of which one can be singled out
    full = WorldQuestions("test", 20, kinds=["two_hop"], grid=4, objects=[16, 16])
    with pytest.raises(UserError, match=r"No scene with grid=4 and objects=\[16, 16\] has a question of kind two_hop"):
        [full.turns(index) for index in range(20)]


def test_the_picture_of_a_question_is_the_scene_it_names():
    from vlmlab.data.world.render import render

    for sample in list(SOURCES["single"])[:30]:
        split, index = sample.image_ids[0].split("/")[1:]
        assert (sample.images[0] == render(sample_scene(split, int(index)))).all()


def test_interleaved_answers_are_right_and_balanced():
    colors = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"]
    shapes = ["circles", "squares", "triangles", "diamonds", "crosses", "rings"]
    answers = []
    for sample in WorldInterleaved("test", 600):
        (turn,) = sample.turns
        assert turn.prompt.count(IMAGE_TAG) == len(sample.images) == len(set(sample.image_ids))
        term = turn.prompt.rstrip("?").split("more " if len(sample.images) == 2 else "most ")[1]
        counts = []
        for name in sample.image_ids:
            things = sample_scene("test", int(name.split("/")[-1])).objects
            word = term.split()[0]
            wanted = ("shape", shapes.index(word)) if word in shapes else ("color", word)
            if word == "objects":
                counts.append(len(things))
            elif wanted[0] == "shape":
                counts.append(sum(t.shape == wanted[1] for t in things))
            else:
                counts.append(sum(t.color == colors.index(word) for t in things))
        best = ("first", "second", "third").index(turn.answer)
        assert all(counts[best] > count for place, count in enumerate(counts) if place != best)
        answers.append((len(sample.images), turn.answer))
    for number in (2, 3):
        mine = [answer for count, answer in answers if count == number]
        assert all(abs(mine.count(a) / len(mine) - 1 / number) < 0.08 for a in set(mine))


def test_a_share_of_instructions_is_interleaved_and_the_others_are_unchanged():
    plain, mixed = WorldInstruct("train", 400), WorldInterleavedInstruct("train", 400, interleaved_fraction=0.5)
    several = [index for index in range(400) if mixed.turns(index)[0].kind == "interleaved"]
    assert 0.4 < len(several) / 400 < 0.6
    assert all(mixed.turns(index) == plain.turns(index) for index in range(400) if index not in several)
    assert all(mixed.turns(i) == WorldInterleaved("train", 400).turns(i) for i in several)
    large = WorldInterleavedInstruct("train", 40, grid=6, objects=[2, 8], interleaved_fraction=1.0)[3]
    assert len(large.images) > 1 and {image.shape for image in large.images} == {(96, 96, 3)}
    assert "-6x6-" in large.id


def test_a_share_of_instructions_has_no_image_and_the_others_are_unchanged():
    plain, mixed = WorldInstruct("train", 400), WorldTextInstruct("train", 400, text_fraction=0.25)
    told = [index for index in range(400) if mixed.turns(index) != plain.turns(index)]
    assert 0.19 < len(told) / 400 < 0.31
    for index in told[:20]:
        sample = mixed[index]
        assert not sample.images and not sample.image_ids and len(sample.turns) >= 6
        assert "row" in sample.turns[0].prompt and all(turn.prompt for turn in sample.turns)
    assert not WorldTextInstruct("train", 9, text_fraction=1.0)[3].images
    assert all(WorldTextInstruct("train", 40, text_fraction=0.0).turns(i) == plain.turns(i) for i in range(40))


def test_task_words_stand_before_every_prompt_and_change_nothing_else():
    arguments = {"split": "train", "size": 60}
    for plain, told in (
        (WorldInstruct(**arguments), WorldTaskInstruct(**arguments)),
        (WorldQuestions(**arguments), WorldTaskQuestions(**arguments)),
        (WorldCaptions("mixed", **arguments), WorldTaskCaptions("mixed", **arguments)),
    ):
        for index in range(60):
            for turn, other in zip(told.turns(index), plain.turns(index), strict=True):
                word, _, prompt = turn.prompt.partition(" ")
                assert replace(turn, prompt=prompt) == other
                assert word == ("[caption]" if other.kind in ("caption", "dense_caption") else "[vqa]")
    sample = WorldTaskQuestions(**arguments)[5]
    assert sample.id == WorldQuestions(**arguments)[5].id and len(sample.images) == 1


def _config():
    """The configuration, the sources of benchmarks in the place of the benchmarks."""
    config = OmegaConf.to_container(OmegaConf.create({"data": yaml.safe_load(CONFIG.read_text())}), resolve=True)[
        "data"
    ]
    scale = {key: config.pop(key) for key in ("grid", "objects", "kinds")}
    assert scale == {"grid": 4, "objects": [1, 5], "kinds": None}
    config["benchmarks"] = {name: keys["source"] for name, keys in config["benchmarks"].items()}
    return config


@pytest.mark.parametrize(
    ("make", "choices"),
    [
        (lambda: WorldCaptions("long", "train", 1), "short, dense, mixed"),
        (lambda: WorldCaptions("short", "dev", 1), "train, val, test, compositional"),
        (lambda: WorldQuestions("test", 1, domain="xray"), "base, shifted"),
        (lambda: WorldQuestions("test", 1, kinds=["color"]), "attribute, existence, count"),
        (lambda: WorldQuestions("test", 1, kinds=[]), "attribute, existence, count"),
        (lambda: WorldQuestions("test", 0), "1 or more"),
        (lambda: WorldInstruct("train", 1, caption_fraction=1.5), "0 to 1"),
        (lambda: WorldTextInstruct("train", 1, text_fraction=-0.5), "text_fraction .* 0 to 1"),
        (lambda: WorldInterleavedInstruct("train", 1, interleaved_fraction=1.5), "interleaved_fraction .* 0 to 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make, choices):
    with pytest.raises(UserError, match=choices) as caught:
        make()
    assert str(caught.value).count(".") - len(re.findall(r"\d\.\d", str(caught.value))) == 1
    assert "\n" not in str(caught.value)


def test_the_configuration_builds_every_source():
    config = _config()
    told = config.pop("probe")
    assert told.pop("_target_") == "vlmlab.data.world.cells.WorldCells" and told["split"] == "train"
    assert set(config) == {"train", "val", "benchmarks"}
    assert set(config["train"]) == set(config["val"])
    for group in config.values():
        for name, keys in group.items():
            module, target = keys.pop("_target_").rsplit(".", 1)
            source = getattr(importlib.import_module(module), target)(**keys)
            assert source[0].turns, name
            assert len(source) == keys["size"]


def test_splits_of_the_configuration_are_disjoint():
    config = _config()
    assert {keys["split"] for keys in config["train"].values()} == {"train"}
    assert {keys["split"] for keys in config["val"].values()} == {"val"}
    assert {keys["split"] for keys in config["benchmarks"].values()} == {"test", "compositional"}


def test_the_world_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, vlmlab.data.world.sources; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_both_phrasings_of_the_same_questions():
    kinds = [kind for kind in KINDS if kind != "two_hop"]
    drawn, both = WorldQuestions("test", 70, kinds=kinds), WorldPhrasings("test", 70)
    assert len(both) == 140
    for index in range(70):
        one, other = (both.turns(2 * index + k)[0] for k in (0, 1))
        (asked,) = drawn.turns(index)
        assert one.prompt != other.prompt and asked.prompt in (one.prompt, other.prompt)
        assert one.answer == other.answer == asked.answer and one.kind == other.kind == asked.kind
        assert (one.group, other.group) == ("phrasing_1", "phrasing_2")
    assert both[5].image_ids == drawn[2].image_ids and both[5].id == f"{drawn[2].id}/phrasing_2"
    with pytest.raises(IndexError):
        both[140]
    with pytest.raises(UserError, match="single questions; leave multi_turn out"):
        WorldPhrasings("test", 1, multi_turn=True)
    with pytest.raises(UserError, match="of kind two_hop have one phrasing; leave it out"):
        WorldPhrasings("test", 1, kinds=["count", "two_hop"])
