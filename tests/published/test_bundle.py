"""A run that is not a model of transformers is carried with its towers; and a hub that cannot be reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny
from tests.published import models
from tests.published.splitting import imported

import vlmlab
from vlmlab.contracts.errors import UserError
from vlmlab.export import export
from vlmlab.published.hub import push
from vlmlab.runs.folder import RunFolder


def test_it_opens_where_its_towers_are_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = imported(models.ovis2_folder(), tmp_path / "run", image_size=tiny.SIZE)
    want = vlmlab.load(run, device="cpu").generate(tiny.picture(1), "what", max_new_tokens=5)
    with pytest.raises(UserError, match="this composition is not a model of transformers: Llava has"):
        export(run, tmp_path / "hf", form="hf")
    assert set(export(run, tmp_path / "out")) == {"run", "card"}
    assert "It is written as a run, for vlmlab.load." in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This composition is not a model of transformers: Llava has" in card and "license: unknown" in card
    run.rename(tmp_path / "gone")
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert vlmlab.load(moved, device="cpu").generate(tiny.picture(1), "what", max_new_tokens=5) == want
    assert RunFolder(moved).env()["published"]["class"] == "Ovis2ForConditionalGeneration"
    assert {path.name for path in (moved / "towers").iterdir()} == {"encoder", "lm"}


def test_without_a_hub_it_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^hub=me/x cannot be written \(.*\); the folder is whole"):
        push(tmp_path, "me/x", endpoint="http://127.0.0.1:9")
