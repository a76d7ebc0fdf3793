from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from PIL import Image
from tests.test_conf import composed

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.readers.split import split_of, subset
from vlmlab.data.readers.vqa import VqaJson, answer_kind


def row(number: int, image: str = "a.png", **more: object) -> dict[str, Any]:
    return {"question_id": number, "image": image, "question": f"question {number}?", "answer": "yes", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: object, name: str = "vqa.json") -> str:
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return str(folder / name)


def test_questions_of_one_image_become_conversations(folder: Path) -> None:
    path = write(folder, [row(n) for n in range(10)] + [row(10, "b.png")])
    source = VqaJson(path)
    assert [(s.id, len(s.turns), s.image_ids) for s in source] == [  # type: ignore[attr-defined]
        ("a.png#0", 5, ("a.png",)),
        ("a.png#1", 5, ("a.png",)),
        ("b.png#0", 1, ("b.png",)),
    ]
    prompts = [turn.prompt for i in range(2) for turn in source[i].turns]
    assert sorted(prompts) == sorted(f"question {n}?" for n in range(10))
    assert prompts != [turn.prompt for i in range(2) for turn in VqaJson(path, seed=1)[i].turns]
    assert source[0].turns == VqaJson(path)[0].turns == source.turns(0) and source.turns_in_memory
    assert source[0].images[0].shape == (3, 4, 3) and source[0].images[0].dtype == np.uint8


def test_one_question_per_sample(folder: Path) -> None:
    source = VqaJson(write(folder, [row(7), row(8, answer=2)]), multi_turn=False, suffix="Answer briefly.")
    assert [source[i].id for i in range(len(source))] == ["7", "8"]
    turn = source[1].turns[0]
    assert (turn.prompt, turn.answer, turn.kind) == ("question 8?\nAnswer briefly.", "2", "number")


def test_ten_answers_the_first_of_the_most_frequent_is_learnt(folder: Path) -> None:
    answers = ["desk", "table", "table", "desk", "busy"]
    rows = [{"question_id": 1, "image": "a.png", "question": "?", "answers": answers}]
    rows.append({**rows[0], "question_id": 2, "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers]})
    rows.append({**rows[0], "question_id": 3, "answer": "busy"})
    source = VqaJson(write(folder, {"questions": rows}), multi_turn=False)
    assert [source[i].turns[0].answer for i in range(3)] == ["desk", "desk", "busy"]
    assert all(source[i].turns[0].references == tuple(answers) for i in range(3))


def test_kind_from_the_field_or_the_answer(folder: Path) -> None:
    rows = [row(0, answer_type="yes/no"), row(1, question_type="SIZE, PRES"), row(2, answer="Two cats")]
    source = VqaJson(write(folder, rows), multi_turn=False)
    assert [source[i].turns[0].kind for i in range(3)] == ["yes_no", "size_pres", "other"]
    assert [answer_kind(a) for a in ("Yes.", "no", "3", "-1.5", "three", "not")] == [
        "yes_no", "yes_no", "number", "number", "other", "other"
    ]  # fmt: skip


def test_split_by_image_is_disjoint_and_complete(folder: Path) -> None:
    for n in range(40):
        Image.new("RGB", (1, 1)).save(folder / f"{n}.png")
    path = write(folder, [row(n, f"{n % 40}.png") for n in range(120)])
    found = {s: VqaJson(path, split=s, val_fraction=0.2, test_fraction=0.2) for s in ("train", "val", "test")}
    images = {s: {source[i].image_ids[0] for i in range(len(source))} for s, source in found.items()}
    assert not (images["train"] & images["val"] | images["train"] & images["test"] | images["val"] & images["test"])
    assert len(set.union(*images.values())) == 40
    assert images["test"] == {f"{n}.png" for n in range(40) if split_of(f"{n}.png", 0.2, 0.2, 0) == "test"}
    other = VqaJson(path, split="test", val_fraction=0.2, test_fraction=0.2, split_seed=1)
    assert {other[i].image_ids[0] for i in range(len(other))} != images["test"]


def test_split_golden() -> None:
    """Known values: a changed hash would silently mix the test images of older runs into training."""
    assert [split_of(f"images/{n}.png", 0.2, 0.3, 0) for n in range(6)] == GOLDEN


GOLDEN = ["val", "test", "train", "val", "train", "val"]


def test_split_of_the_file_and_of_a_test_file(folder: Path) -> None:
    rows = [row(0, official_split="train"), row(1, "b.png", official_split="validation")]
    rows.append(row(2, "c.png", official_split="Test"))
    path = write(folder, rows)
    assert [VqaJson(path, split=s, multi_turn=False)[0].id for s in ("train", "val", "test")] == ["0", "1", "2"]
    assert len(VqaJson(path)) == 3
    test = write(folder, [row(5)], "test.json")
    assert VqaJson(path, split="test", test_path=test, multi_turn=False)[0].id == "5"
    assert VqaJson(path, split="train", test_path=test, multi_turn=False)[0].id == "0"
    with pytest.raises(DataError, match=r"no rows for the split 'test' \(train 1\).*data\.test_path"):
        VqaJson(write(folder, rows[:1]), split="test", val_fraction=0.0)
    with pytest.raises(DataError, match=r"row 1: 'split' is 'minival', no known split"):
        VqaJson(write(folder, [row(0, split="minival")]), split="train")


def test_size_is_a_seeded_choice_in_file_order() -> None:
    names = [str(n) for n in range(100)]
    chosen = subset(names, 10, 0)
    assert chosen == sorted(chosen) == subset(names, 10, 0) and len(set(chosen)) == 10 and chosen != list(range(10))
    assert subset(names, 10, 1) != chosen and subset(names, None, 0) == list(range(100)) == subset(names, 500, 0)
    assert set(chosen) < set(subset(names, 20, 0))
    with pytest.raises(UserError, match="size=0"):
        subset(names, 0, 0)


BAD_ROWS: list[tuple[object, str]] = [
    ("text", "row 2: is text instead of an object"),
    ({"question_id": 1, "question": "?", "answer": "yes"}, "row 2: key 'image' is missing"),
    (row(1, image=""), "row 2: 'image' is empty"),
    (row(1, image=5), "row 2: 'image' is a number instead of text"),
    (row(1, image="none.png"), "row 2: image 'none.png' is not in"),
    (row(1, image="../a.png"), "row 2: image '../a.png' leaves the image folder"),
    (row(1, question=None), "row 2: 'question' is null"),
    (row(1, question="<image> what?"), "row 2: 'question' holds the tag <image>"),
    (row(1, question="a\0b"), "row 2: 'question' holds a NUL"),
    (row(1, question="\ud800"), "row 2: 'question' holds a NUL or a broken character"),
    (row(1, answer=" "), "row 2: 'answer' is empty"),
    (row(1, answer=True), "row 2: 'answer' is true or false"),
    (row(1, answers=[]), "row 2: 'answers' is not a list of answers"),
    (row(1, answers=["a", None]), "row 2: 'answers' is null"),
    (row(0), "row 2: id '0' is that of row 1 too"),
    (row(1, answer_type="?!"), "row 2: 'answer_type' holds no letter"),
    (row(1, answer_type=["x"]), "row 2: 'answer_type' is a list"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_bad_row_names_file_row_key_and_remedy(folder: Path, bad: object, message: str) -> None:
    path = write(folder, [row(0), bad])
    with pytest.raises(DataError) as caught:
        VqaJson(path)
    text = str(caught.value)
    assert text.startswith(f"{path}, {message}") and "; " in text and "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "empty list"),
        ("{bad", "not valid JSON"),
        ("3", "holds a number"),
        ('{"rows": []}', r"one object \(keys: rows\).*'questions' or 'data'"),
        ('[{"a": 1, "a": 2}]', "key 'a' occurs twice"),
        ("[" * 100000, "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_file_is_named(folder: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        VqaJson(write(folder, content))
    assert "vqa.json" in str(caught.value)


def test_files_and_folders_that_are_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give the right path"):
        VqaJson(str(folder / "absent.json"))
    with pytest.raises(DataError, match=r"holds no file that ends in \.json"):
        VqaJson(str(folder))
    path = write(folder, [row(0)])
    with pytest.raises(DataError, match=r"Image folder .*absent does not exist"):
        VqaJson(path, images=str(folder / "absent"))
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        VqaJson(path, split="dev")
    with pytest.raises(UserError, match="add up to less than 1"):
        VqaJson(path, val_fraction=0.5, test_fraction=0.5)
    (folder / "latin.json").write_bytes('[{"question": "Où?"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        VqaJson(str(folder / "latin.json"))


def test_json_lines_and_numbered_rows(folder: Path) -> None:
    path = write(folder, "\ufeff" + json.dumps(row(0)) + "\n\n" + json.dumps(row(0)) + "\n", "q.jsonl")
    assert [s.id for s in VqaJson(path, id_key=None, multi_turn=False)] == ["q-1", "q-3"]  # type: ignore[attr-defined]


def test_easy_vqa(shared_data: Path) -> None:
    root = shared_data / "easy_vqa_mini"
    train = VqaJson(str(root / "train.json"), split="train", test_path=str(root / "test.json"), val_fraction=0.1)
    test = VqaJson(str(root / "train.json"), split="test", test_path=str(root / "test.json"), multi_turn=False)
    kinds = Counter(test[i].turns[0].kind for i in range(0, len(test), 29))
    assert len(test) == 2900 and kinds["yes_no"] > 60 and kinds["other"] > 15
    assert max(len(train[i].turns) for i in range(50)) <= 8
    assert train[0].images[0].shape == (64, 64, 3)


def test_medical_and_ten_answer_files(shared_data: Path) -> None:
    rad = {
        s: VqaJson(str(shared_data / "vqa_rad/vqa.json"), split=s, multi_turn=False) for s in ("train", "val", "test")
    }
    assert sum(map(len, rad.values())) == 1790 and len(rad["test"]) == 242
    train, val = ({s[i].image_ids[0] for i in range(len(s))} for s in (rad["train"], rad["val"]))
    assert not train & val
    slake = VqaJson(str(shared_data / "slake/vqa.json"), split="val", multi_turn=False)
    assert len(slake) == 1385
    coco = VqaJson(str(shared_data / "coco_vqa_mini/vqa.json"), multi_turn=False)
    assert len(coco) == 49 and len(coco[0].turns[0].references) == 10


CONF = Path(__file__).parents[3] / "conf/data"


def test_the_group_gives_train_val_and_benchmark(folder: Path) -> None:
    config = OmegaConf.create({"seed": 3, "data": composed("data=vqa").data})
    with pytest.raises(MissingMandatoryValue):
        _ = config.data.path
    config.data.path = write(folder, [row(n, split=("train", "val", "test")[n % 3]) for n in range(9)])
    sources = [config.data.train.instruct, config.data.val.instruct, config.data.benchmarks.vqa_test.source]
    assert [len(instantiate(source)[0].turns) for source in sources] == [3, 3, 1]
    assert list(config.data.train) == list(config.data.val) == ["short", "dense", "captions", "instruct"]
    assert (config.data.train.short.split, config.data.val.short.split) == ("train", "val")
