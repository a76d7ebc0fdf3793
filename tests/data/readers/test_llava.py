from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tests.test_conf import composed

from vlmlab.contracts.errors import DataError
from vlmlab.data.images import ImageFolder
from vlmlab.data.readers.llava import LlavaFormat, LlavaJson, parse_record
from vlmlab.data.readers.records import Row, read_rows

LEGAL = {"token_in_the_middle", "no_id", "id_number", "system_turn", "very_long_answer", "only_token"}
REASONS = {  # of malformed_derived.json: what the sentence must say
    "no_conversations": "no 'conversations' (keys: id, image)",
    "empty_conversations": "'conversations' is an empty list",
    "starts_with_gpt": "turn 1 is of role answer where user is due",
    "ends_with_human": "the last turn has no answer",
    "two_human_turns": "turn 2 is of role user where answer is due",
    "unknown_role": "turn 1 has the role 'user_'",
    "empty_answer": "'text of turn 2' is empty",
    "null_answer": "turn 2 has no text",
    "number_answer": "'text of turn 2' is a number",
    "no_value": "turn 2 has no text (keys: from)",
    "text_instead_of_value": "turn 2 has no text (keys: from, text)",
    "image_without_token": "0 image tags",
    "token_without_image": "1 image tags (<image>, <IMG_CONTEXT>, <ImageHere>) for 0 images",
    "two_tokens_one_image": "2 image tags",
    "one_token_two_images": "for 2 images",
    "token_in_answer": "turn 2 (gpt) holds an image",
    "token_upper_case": "0 image tags",
    "image_file_missing": "image 'images/does_not_exist.jpg' is not in",
    "image_path_escapes": "image '../../../etc/hostname' leaves the image folder",
    "image_null": "for 0 images",
    "image_empty_string": "'image' is empty",
    "image_number": "'image' is a number",
    "nul_and_emoji": "holds a NUL",
    "conversations_is_object": "'conversations' is an object",
}
WHOLE_FILES = {  # file: (records, records whose image files are here)
    "llava_instruct_coco.json": (302, 252),
    "scienceqa_mixed_text_and_missing_image.json": (120, 60),
    "internlm_xcomposer_only_text_example.json": (2, 2),
    "xtuner_mllm_sft_single_image_example_data.jsonl": (22, 22),
    "xtuner_mllm_sft_multi_image_example_data.jsonl": (11, 11),
    "xtuner_mllm_sft_multi_image_example_data2.jsonl": (10, 10),
    "xtuner_text_only.jsonl": (30, 30),
}
REFUSED_FILES = {
    "bunny_question_only.jsonl": "line 1: no 'conversations'",
    "llava_instruction_output_pairs.jsonl": "line 1: no 'conversations'",
    "mantis_video_chat_unsupported_media.json": "row 1: 'video' is not supported",
    "xtuner_mllm_pretrain_image_example_data.jsonl": "line 1: turn 1 has the role 'pretrain'",
    "internlm_xcomposer_single_turn_single_image_example.json": "row 1: 0 image tags",
    "llava_instruct_coco_missing_images.json": "row 1: is text instead of an object",
    "latin1_derived.json": "is not UTF-8 (byte 60)",
    "truncated_array_derived.json": "is not valid JSON",
    "broken_lines_derived.jsonl": "line 3 is not valid JSON",
}
MISSING_IMAGES = ["internlm_xcomposer_multi_turn_multi_images_example.json", "llama_factory_mllm_demo.json"]
MISSING_IMAGES += ["mantis_multi_image_chat.json", "qwen_vl_single_images.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate(("a.png", "b.png", "c.png"), 1):
        Image.new("RGB", (n, 3)).save(tmp_path / name)
    return tmp_path


def record(*values: str, **more: object) -> dict[str, Any]:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)], **more}


def write(folder: Path, records: list[Any], name: str = "chat.json") -> str:
    text = json.dumps(records) if name.endswith("json") else "\n".join(map(json.dumps, records))
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_multi_image_in_a_later_turn(folder: Path) -> None:
    path = write(
        folder, [record("Hello <image>?", "Yes.", "And\n<image> <image>", "No.", image=["a.png", "b.png", "c.png"])]
    )
    sample = LlavaJson(path)[0]
    assert [image.shape[1] for image in sample.images] == [1, 2, 3] and sample.image_ids == ("a.png", "b.png", "c.png")
    assert [(t.prompt, t.answer) for t in sample.turns] == [("Hello <image>?", "Yes."), ("And\n<image> <image>", "No.")]


def test_text_only_system_and_ids(folder: Path) -> None:
    first = record("Hi", "Ho", id=5)
    first["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    source = LlavaJson(write(folder, [first, record("Hi", "Ho", id="5"), record("Hi", "Ho")], "chat.jsonl"))
    assert [source[i].id for i in range(3)] == ["5", "5#2", "chat-3"]
    assert (source[0].system, source[1].system, source[0].images) == ("Be kind.", "", ())
    assert [source.turns(i) for i in range(len(source))] == [source[i].turns for i in range(len(source))]


def test_messages_with_parts(folder: Path) -> None:
    untagged = [
        {"type": "text", "text": "Look:"},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "What?"},
    ]
    tagged = [{"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "See <IMG_CONTEXT> now"}]
    messages = [
        {"role": "user", "content": untagged},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": tagged},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    sample = LlavaJson(write(folder, [{"messages": messages}]))[0]
    assert [t.prompt for t in sample.turns] == ["Look:\n<image>\nWhat?", "See <image> now"]
    assert sample.image_ids == ("a.png", "b.png") and sample.turns[1].answer == "Yes."


def test_images_without_tags_are_a_choice(folder: Path) -> None:
    path = write(folder, [record("What?", "A dog.", image="a.png")])
    with pytest.raises(DataError, match=r"row 1: 0 image tags .* set data\.prepend_images=true"):
        LlavaJson(path)
    sample = LlavaJson(path, prepend_images=True)[0]
    assert sample.turns[0].prompt == "What?" and len(sample.images) == 1  # the chat puts them before the first prompt


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("<image>", "A", image="a.png", images=["a.png"]), "more than one place"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "part of type 'video'"),
        ({"messages": ["hi"]}, "turn 1 is text instead of an object"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 has the role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last turn has no answer"),
        (record("q", "a", id=[1]), "'id' is a list"),
        (record("<image>", "a", image=[None]), "'image' is null"),
        (record("q", "a", videos=["x.mp4"]), "'videos' is not supported"),
    ],
    ids=str,
)
def test_more_bad_records(folder: Path, bad: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        LlavaJson(write(folder, [record("q", "a"), bad]))
    assert "chat.json, row 2: " in str(caught.value) and message in str(caught.value)


def test_held_out_conversations_share_no_first_image(folder: Path) -> None:
    for n in range(30):
        Image.new("RGB", (1, 1)).save(folder / f"{n}.png")
    path = write(folder, [record("<image>", "a", image=f"{n % 30}.png") for n in range(90)])
    train, val = (LlavaJson(path, split=split, val_fraction=0.3) for split in ("train", "val"))
    images = [{s[i].image_ids[0] for i in range(len(s))} for s in (train, val)]
    assert len(train) + len(val) == 90 and not images[0] & images[1] and len(val) > 6
    with pytest.raises(DataError, match="no record for the split 'val'"):
        LlavaJson(path, split="val", val_fraction=0.0)


def test_every_malformed_record_has_its_decision(shared_data: Path) -> None:
    root = shared_data / "llava_records"
    form, images = LlavaFormat(), ImageFolder(root)
    cases = json.loads((root / "malformed_derived.json").read_text(encoding="utf-8"))
    assert {case["case"] for case in cases} == LEGAL | REASONS.keys()
    for number, case in enumerate(cases, 1):
        row = Row(Path("malformed.json"), number, case["record"])
        if case["case"] in LEGAL:
            parse_record(row, form, images)
            continue
        with pytest.raises(DataError) as caught:
            parse_record(row, form, images)
        text = str(caught.value)
        assert text.startswith(f"malformed.json, row {number}: ") and REASONS[case["case"]] in text, case["case"]


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_real_records_are_read(shared_data: Path, name: str) -> None:
    path = shared_data / "llava_records" / name
    images, rows = ImageFolder(path.parent), read_rows(path)
    used = 0
    for row in rows:
        try:
            used += bool(parse_record(row, LlavaFormat(), images).turns)
        except DataError as error:
            assert f"{row.unit} {row.number}: image '" in str(error) and "is not in" in str(error)
    assert (len(rows), used) == WHOLE_FILES[name]


@pytest.mark.parametrize("name", MISSING_IMAGES)
def test_records_of_absent_images_are_otherwise_sound(shared_data: Path, name: str, tmp_path: Path) -> None:
    path = shared_data / "llava_records" / name
    for row in read_rows(path):
        names = row.data.get("image", row.data.get("images"))
        for image in names if isinstance(names, list) else [names]:
            (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / image).write_bytes(b"x")
        parsed = parse_record(row, LlavaFormat(), ImageFolder(tmp_path))
        assert sum(turn.prompt.count("<image>") for turn in parsed.turns) == len(parsed.images) >= 1


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_files_of_other_kinds_are_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        LlavaJson(str(shared_data / "llava_records" / name))
    assert REFUSED_FILES[name] in str(caught.value) and name in str(caught.value)


def test_real_samples_have_pixels(shared_data: Path) -> None:
    source = LlavaJson(str(shared_data / "llava_records/xtuner_mllm_sft_multi_image_example_data2.jsonl"))
    sample = source[1]
    assert len(sample.images) == 2 and sample.turns[1].prompt.startswith("<image>\n")
    assert all(image.ndim == 3 for image in sample.images)


def test_the_group_gives_train_and_val(folder: Path) -> None:
    config = OmegaConf.create({"seed": 3, "data": composed("data=llava").data})
    config.data.path = write(folder, [record("q <IMG_CONTEXT>", "a", image=n) for n in ("a.png", "b.png", "c.png")])
    config.data.val_fraction = 0.5
    lengths = [len(instantiate(config.data[part].instruct)) for part in ("train", "val")]
    assert sum(lengths) == 3 and min(lengths) >= 1
