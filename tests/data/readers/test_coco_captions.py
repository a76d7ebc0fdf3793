from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tests.test_conf import composed

from vlmlab.contracts.errors import DataError
from vlmlab.data.readers.coco_captions import CocoCaptions

GOOD: dict[str, Any] = {
    "info": {},
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}, {"id": 3, "file_name": "c.png"}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "  A dog , running \n"},
        {"id": 11, "image_id": 2, "caption": "A cat."},
        {"id": 12, "image_id": 1, "caption": "a brown Dog"},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, content: object, name: str = "captions.json") -> str:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return str(folder / name)


def test_one_sample_per_caption_verbatim_but_stripped(folder: Path) -> None:
    source = CocoCaptions(write(folder, GOOD), str(folder), prompt="Describe.")
    found = [(source[i].id, source[i].turns[0].answer, source[i].image_ids) for i in range(len(source))]
    assert found == [
        ("10", "A dog , running", ("a.png",)),
        ("12", "a brown Dog", ("a.png",)),
        ("11", "A cat.", ("b.png",)),
    ]
    turn = source[0].turns[0]
    assert (turn.prompt, turn.kind, turn.references) == ("Describe.", "caption", ())
    assert [source.turns(i) for i in range(len(source))] == [source[i].turns for i in range(len(source))]


def test_one_sample_per_image_with_all_references(folder: Path) -> None:
    source = CocoCaptions(write(folder, GOOD), str(folder), all_references=True)
    assert [source[i].id for i in range(len(source))] == ["1", "2"]  # image 3 has no caption
    assert source[0].turns[0].references == ("A dog , running", "a brown Dog")
    assert len(CocoCaptions(write(folder, GOOD), str(folder), all_references=True, size=1)) == 1


def test_a_test_file_is_the_test_split(folder: Path) -> None:
    path = write(folder, GOOD)
    (folder / "val").mkdir()
    Image.new("RGB", (4, 3)).save(folder / "val/z.png")
    other = {"images": [{"id": 9, "file_name": "z.png"}], "annotations": [{"id": 1, "image_id": 9, "caption": "Z"}]}
    test = write(folder, other, "test.json")
    options: dict[str, Any] = {"test_path": test, "test_images": str(folder / "val")}
    assert CocoCaptions(path, str(folder), "test", **options)[0].turns[0].answer == "Z"
    assert len(CocoCaptions(path, str(folder), "train", val_fraction=0.0, **options)) == 3


def changed(key: str, index: int, **values: object) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    content[key][index].update(values)
    return content


BAD: list[tuple[object, str]] = [
    ([], "not in COCO captions format (a list)"),
    ({"images": []}, "not in COCO captions format (keys: images)"),
    ({**GOOD, "images": []}, "empty list as 'images'"),
    ({**GOOD, "annotations": {}}, "an object as 'annotations'"),
    ({**GOOD, "annotations": [7]}, "row of 'annotations' 1: is a number"),
    (changed("images", 1, file_name="no.png"), "row of 'images' 2: image 'no.png' is not in"),
    (changed("images", 1, file_name="/a.png"), "row of 'images' 2: image '/a.png' is an absolute path"),
    (changed("images", 1, id=1), "row of 'images' 2: image id 1 occurs twice"),
    (changed("images", 1, id=None), "row of 'images' 2: 'id' is null"),
    (changed("annotations", 2, image_id=77), "row of 'annotations' 3: image_id 77 is not an image"),
    (changed("annotations", 2, caption="\n"), "row of 'annotations' 3: 'caption' is empty"),
    (changed("annotations", 2, caption=["a"]), "row of 'annotations' 3: 'caption' is a list"),
    (changed("annotations", 2, caption="an <image>"), "row of 'annotations' 3: 'caption' holds the tag"),
    (changed("annotations", 2, id=10), "row of 'annotations' 3: annotation id 10 occurs twice"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_file_or_row_is_named(folder: Path, content: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        CocoCaptions(write(folder, content), str(folder))
    assert message in str(caught.value) and "captions.json" in str(caught.value) and "; " in str(caught.value)


def test_an_empty_split_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no captioned image for the split 'val' \(2 in all\)"):
        CocoCaptions(write(folder, GOOD), str(folder), "val", val_fraction=0.0)


def test_real_captions(shared_data: Path) -> None:
    root = shared_data / "coco_captions_mini"
    path, images = str(root / "captions.json"), str(root / "images")
    assert len(CocoCaptions(path, images)) == 1006
    ids = {s: CocoCaptions(path, images, s, all_references=True) for s in ("train", "val", "test")}
    names = {s: {source[i].image_ids[0] for i in range(len(source))} for s, source in ids.items()}
    assert sum(map(len, names.values())) == 201 == len(set.union(*names.values()))
    assert (len(names["train"]), len(names["val"]), len(names["test"])) == (167, 10, 24)
    assert len(ids["test"][0].turns[0].references) == 5


def test_the_group_gives_train_val_and_benchmark(shared_data: Path) -> None:
    loaded = composed("data=coco_captions").data
    config = OmegaConf.create({"seed": 3, "data": loaded})
    root = shared_data / "coco_captions_mini"
    config.data.path, config.data.images = str(root / "captions.json"), str(root / "images")
    assert [len(instantiate(source)) for source in config.data.train.values()] == [836] * 4
    assert [len(instantiate(source)) for source in config.data.val.values()] == [50] * 4
    assert len(instantiate(config.data.benchmarks.coco_test.source)) == 24
