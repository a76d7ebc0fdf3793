"""JSON that every reader takes; files that are there whole or not at all, whatever the disk does."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from vlmlab.contracts.errors import MachineError, UserError
from vlmlab.runs.files import append, placing, read_json, read_rows, to_json, write_json
from vlmlab.runs.folder import RunFolder

NAN, INF = float("nan"), float("inf")


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({"loss": NAN}, {"loss": "nan"}),
        ([INF, -INF, 1.5, None, True], ["inf", "-inf", 1.5, None, True]),
        ({"a": {"b": (1, NAN)}, "path": Path("x")}, {"a": {"b": [1, "nan"]}, "path": "x"}),
        (1e308, 1e308),
    ],
)
def test_numbers_that_are_none_become_words(tmp_path: Path, value: Any, read: Any) -> None:
    assert strict(to_json(value)) == read
    write_json(tmp_path / "x.json", value)
    assert strict((tmp_path / "x.json").read_text()) == read


def test_a_row_of_metrics_with_no_number_is_kept_and_cut_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"stage": "a", "step": 1, "loss": NAN, "gradient_norm": INF})
    run.log({"stage": "a", "step": 2, "loss": 1.0})
    run.cut_back("a", 1)
    assert [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"stage": "a", "step": 1, "loss": "nan", "gradient_norm": "inf"}
    ]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("metrics", "cost", "name"), [({"b/score": NAN}, {}, "b/score"), ({}, {"seconds": INF}, "seconds")]
)
def test_no_result_has_a_number_that_is_none(
    tmp_path: Path, metrics: dict[str, float], cost: dict[str, float], name: str
) -> None:
    with RunFolder(tmp_path) as run:
        run.open({"seed": 0})
        with pytest.raises(UserError, match=f"^{name} is (nan|inf) and no result"):
            run.finish(metrics, cost)
    assert not (tmp_path / "result.json").exists() and RunFolder(tmp_path).state()["state"] != "done"


# -- disks that take no more -------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_disk_does_not_take_whole_leaves_what_was_there(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match=rf"File too large: '{path}'"):
        write_json(path, {"a": "x" * 100}, durable=True)
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_library_that_says_so_in_words(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"w\.st: no space left on device"), placing(tmp_path / "w.st") as new:
        new.write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError), placing(tmp_path / "w.st"):
        raise ZeroDivisionError
    with pytest.raises(PermissionError, match="elsewhere"), placing(tmp_path / "w.st"):
        raise PermissionError(13, "Permission denied", "elsewhere")
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_the_new_file_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".a.new").symlink_to(other)
    write_json(tmp_path / "a", {})
    assert other.read_text() == "mine" and not (tmp_path / "a").is_symlink()


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n')
    with pytest.raises(OSError, match=rf"File too large: '{path}'"):
        append(path, json.dumps({"step": 2, "long": "x" * 100}))
    assert path.read_text() == '{"step": 1}\n'


def test_the_end_of_a_run_is_noted_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_state("running", "align", 3, 9)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmlab.runs.folder.write_json", full)
    folder.end("failed", "no space " + "x" * 300)
    state = folder.state()
    assert (state["state"], state["stage"], state["step"]) == ("failed", "align", 3) and "no space" in state["error"]
    folder.end("failed", "short")
    assert folder.state()["error"] == "short"
