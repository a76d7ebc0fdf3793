"""VQA v2, OK-VQA and A-OKVQA in their official files: questions and annotations apart, numbered images, choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tests import tiny
from tests.test_conf import composed

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.few_shot import FewShot
from vlmlab.data.readers.vqa import VqaJson

SHORT = "Answer the question using a single word or phrase."
TEN = ["cat"] * 4 + ["black cat"] * 3 + ["kitten", "pet", "a cat"]
NUMBERS = {"train": (9, 25, 30), "val": (42, 73)}


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def images(folder: Path, pattern: str) -> None:
    for split, numbers in NUMBERS.items():
        for number in numbers:
            file = folder / pattern.format(split=split, number=number)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tiny.picture(number, (8, 8))).save(file, "JPEG")


def asked_apart(folder: Path, prefix: str, note: Any) -> None:
    """The questions of two splits in one file, and their annotations in another."""
    images(folder, "{split}2014/COCO_{split}2014_{number:012d}.jpg")
    for split, numbers in NUMBERS.items():
        ids = [(number, number * 1000 + k) for number in numbers for k in range(2)]
        questions = [{"image_id": n, "question": f"What is in {q}?", "question_id": q} for n, q in ids]
        head = {"info": {"version": "1"}, "data_type": "mscoco", "data_subtype": f"{split}2014"}
        write(folder / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json", {**head, "questions": questions})
        notes = [{"image_id": n, "question_id": q, **note} for n, q in reversed(ids)]
        write(folder / f"{prefix}mscoco_{split}2014_annotations.json", {**head, "annotations": notes})


def answers(text: str = "answer", **more: str) -> list[dict[str, Any]]:
    return [{text: t, "answer_confidence": "yes", "answer_id": k + 1, **more} for k, t in enumerate(TEN)]


def data_of(name: str, folder: Path) -> DictConfig:
    made = OmegaConf.create({"seed": 0, "data": composed(f"data={name}").data})
    made.data.update({"path": str(folder), "images": str(folder), "val_fraction": 0.4})
    return made.data


@pytest.mark.parametrize("name", ["vqa_v2", "ok_vqa"])
def test_questions_and_annotations(name: str, tmp_path: Path) -> None:
    if name == "vqa_v2":
        note = {"answer_type": "yes/no", "question_type": "what is", "multiple_choice_answer": "cat"}
        asked_apart(tmp_path, "v2_", {**note, "answers": answers()})
    else:
        note = {"answer_type": "other", "question_type": "four"}
        asked_apart(tmp_path, "", {**note, "answers": answers("raw_answer", answer="stem")})
    data = data_of(f"{name}_few_shot", tmp_path)
    train, val = (instantiate(data[part].instruct) for part in ("train", "val"))
    assert {train[k].image_ids[0] for k in range(len(train))} | {val[k].image_ids[0] for k in range(len(val))} == {
        f"train2014/COCO_train2014_{number:012d}.jpg" for number in NUMBERS["train"]
    }
    assert all(len(train[k].turns) == 2 for k in range(len(train)))
    test = instantiate(data.benchmarks[f"{name}_val"].source)
    assert [test[k].id for k in range(len(test))] == ["42000", "42001", "73000", "73001"]
    turn = test[1].turns[0]
    assert turn.prompt == f"What is in 42001?\n{SHORT}" and turn.answer == "cat" and turn.references == tuple(TEN)
    assert turn.kind == ("yes_no" if name == "vqa_v2" else "four") and turn.options == ()
    assert test[1].image_ids == (f"val2014/COCO_val2014_{42:012d}.jpg",) and test[1].images[0].shape == (8, 8, 3)
    few = instantiate(data.benchmarks[f"{name}_few_shot"].source)
    assert isinstance(few, FewShot) and len(few) == 4 and len(few[0].turns) == len(few[0].images) == 5
    assert all("train2014" in image for image in few[0].image_ids[:4]) and "val2014" in few[0].image_ids[4]


def knowledge(folder: Path) -> None:
    images(folder, "{split}2017/{number:012d}.jpg")
    for split, numbers in NUMBERS.items():
        rows = [
            {
                "split": split, "image_id": number, "question_id": f"q{number}", "question": "What is it?",
                "choices": ["dog", "cat", "a", "tree house"], "correct_choice_idx": 1, "direct_answers": TEN,
                "difficult_direct_answer": number == 42, "rationales": ["It purrs."],
            }
            for number in numbers
        ]  # fmt: skip
        write(folder / f"aokvqa_v1p0_{split}.json", rows)


def test_direct_answers_choices_and_letters(tmp_path: Path) -> None:
    knowledge(tmp_path)
    data = data_of("a_okvqa_few_shot", tmp_path)
    train, val = (instantiate(data[part].instruct) for part in ("train", "val"))
    assert len(train) + len(val) == 3
    names = [f"a_okvqa_{name}" for name in ("val", "choices", "letters")]
    direct, choices, letters = (instantiate(data.benchmarks[name].source) for name in names)
    assert [direct[k].id for k in range(len(direct))] == ["q73"] and len(choices) == len(letters) == 2
    assert direct[0].turns[0].answer == "cat" and direct[0].turns[0].references == tuple(TEN)
    turn = choices[0].turns[0]
    assert (turn.answer, turn.options) == ("cat", ("dog", "cat", "a", "tree house")) and turn.references == ()
    assert turn.prompt == f"What is it?\n{SHORT}"
    turn = letters[0].turns[0]
    assert (turn.answer, turn.options) == ("B", ("A", "B", "C", "D"))
    listed = "A. dog\nB. cat\nC. a\nD. tree house"
    told = "Answer with the option's letter from the given choices directly."
    assert turn.prompt == f"What is it?\n{listed}\n{told}"
    few = instantiate(data.benchmarks.a_okvqa_few_shot.source, shots=2)
    assert len(few) == 1 and [turn.answer for turn in few[0].turns] == ["cat"] * 3


@pytest.mark.parametrize("name", ["vqa_v2", "ok_vqa", "a_okvqa", "a_okvqa_choices"])
def test_beside_any_data(name: str, tmp_path: Path) -> None:
    """The same as benchmarks that are added to a run."""
    source = OmegaConf.load(tiny.CONF / f"benchmark/{name}.yaml")[name].source
    if name.startswith("a_okvqa"):
        knowledge(tmp_path)
        source.update({"path": str(tmp_path / "aokvqa_v1p0_val.json"), "images": str(tmp_path / "val2017")})
    else:
        prefix, text = ("v2_", "answer") if name == "vqa_v2" else ("", "raw_answer")
        asked_apart(tmp_path, prefix, {"multiple_choice_answer": "cat", "answers": answers(text)})
        files = {"path": "OpenEnded_mscoco_val2014_questions", "annotations": "mscoco_val2014_annotations"}
        source.update({key: str(tmp_path / f"{prefix}{file}.json") for key, file in files.items()})
        source.images = str(tmp_path / "val2014")
    made = instantiate(source)
    assert len(made) == {"a_okvqa": 1, "a_okvqa_choices": 2}.get(name, 4) and made[0].turns[0].answer == "cat"
    assert len(made[0].turns[0].options) == (4 if name == "a_okvqa_choices" else 0)


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"choices": ["one"]}, {}, "'choices' is not a list of 2 to 26 choices"),
    ({"choices": None}, {}, "'choices' is not a list of 2 to 26 choices"),
    ({"choices": ["a", " "]}, {}, "'choices' is empty"),
    ({"correct_choice_idx": 4}, {}, "'correct_choice_idx' is not the number of a choice, from 0"),
    ({"correct_choice_idx": True}, {}, "'correct_choice_idx' is not the number of a choice"),
    ({"image_id": "x.jpg"}, {}, "'image_id' is text, and no whole number; set image_name=null"),
    ({"image_id": 8}, {}, "image '000000000008.jpg' is not in"),
    ({}, {"right_key": "right"}, "key 'right' is missing"),
]


@pytest.mark.parametrize(("change", "keys", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_row_is_named(change: dict[str, Any], keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    knowledge(tmp_path)
    file = tmp_path / "aokvqa_v1p0_val.json"
    rows = json.loads(file.read_text())
    write(file, [rows[0], {**rows[1], **change}])
    form = {"image_key": "image_id", "image_name": "{:012d}.jpg", "choices_key": "choices"}
    with pytest.raises(DataError) as caught:
        VqaJson(str(file), str(tmp_path / "val2017"), **(form | keys))  # type: ignore[arg-type]
    assert message in str(caught.value) and file.name in str(caught.value)


def test_without_annotations_or_names(tmp_path: Path) -> None:
    asked_apart(tmp_path, "", {"answers": answers()})
    questions, notes = (tmp_path / f"{name}.json" for name in
                        ("OpenEnded_mscoco_val2014_questions", "mscoco_train2014_annotations"))  # fmt: skip
    keys: dict[str, Any] = {"image_key": "image_id", "image_name": "COCO_val2014_{:012d}.jpg"}
    with pytest.raises(DataError, match=r"questions\.json, row 1: its 'question_id' is not in .*train2014_annotations"):
        VqaJson(str(questions), str(tmp_path / "val2014"), annotations=str(notes), **keys)
    with pytest.raises(DataError, match=r"row 1: key 'answer' is missing"):
        VqaJson(str(questions), str(tmp_path / "val2014"), **keys)
    for name in ("picture.jpg", "{:012x}{}", "{name}.jpg"):
        with pytest.raises(UserError, match="makes no names of numbers"):
            VqaJson(str(questions), image_name=name)


def test_real_questions(shared_data: Path, tmp_path: Path) -> None:
    """A-OKVQA's and OK-VQA's own, written back into the official form."""
    root = shared_data / "coco_vqa_mini"
    rows = json.loads((root / "vqa.json").read_text(encoding="utf-8"))["questions"]
    rows = [row for row in rows if (root / row["image"]).is_file()]
    known = [{**row, "direct_answers": row["answers"]} for row in rows if row["dataset"] == "A-OKVQA"]
    write(tmp_path / "a.json", known)
    keys: dict[str, Any] = {"image_key": "image_id", "image_name": "{:012d}.jpg", "multi_turn": False}
    choices = VqaJson(str(tmp_path / "a.json"), str(root / "images"), choices_key="choices", **keys)
    assert len(choices) == len(known) > 30
    assert all(choices.turns(k)[0].answer == row["choices"][row["correct_choice_idx"]] for k, row in enumerate(known))
