"""Records that many processes write: what is read back is what was written, or nothing."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from vlmlab.cache import shelf as module
from vlmlab.cache.shelf import ROW, SUFFIX, Shelf, make_room

LENGTH = 1000
FOLDER = f"a{SUFFIX}"


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def record(number: int) -> memoryview:
    """Bytes that belong to a number alone."""
    return memoryview((key(number) * 32)[:LENGTH])


def read(shelf: Shelf, number: int) -> bytes | None:
    into = memoryview(bytearray(LENGTH))
    return bytes(into) if shelf.read(key(number), into) else None


def filled(folder: Path, *numbers: int) -> Shelf:
    shelf = Shelf(folder, LENGTH, "numbers")
    for number in numbers:
        assert shelf.write(key(number), record(number))
    return shelf


def forked(target: Any, *arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_what_was_written_is_read_by_its_writer_and_by_others(tmp_path: Path) -> None:
    folder = tmp_path / "new" / FOLDER
    early = Shelf(folder, LENGTH)
    writer = filled(folder, 1, 2)
    late = Shelf(folder, LENGTH)
    for shelf in (writer, late):
        assert read(shelf, 1) == record(1) and read(shelf, 2) == record(2) and read(shelf, 3) is None
    assert read(early, 1) is None
    early.refresh()
    assert read(early, 1) == record(1)
    assert writer.write(key(3), record(3))
    late.refresh()
    assert read(late, 3) == record(3)
    assert not any(shelf.damaged or shelf.trouble for shelf in (early, writer, late))
    assert (folder / "about.json").is_file()


def _write_many(folder: Path, first: int, count: int) -> None:
    """Numbers in an order of its own, checking those of others on the way."""
    shelf = Shelf(folder, LENGTH)
    for i in range(count):
        number = (first + i) % count
        shelf.refresh()
        if (found := read(shelf, number)) is None:
            assert shelf.write(key(number), record(number))
        else:
            assert found == record(number)
    assert not shelf.damaged
    shelf.close()


def test_several_processes_write_the_same_keys(tmp_path: Path) -> None:
    count = 120
    processes = [forked(_write_many, tmp_path / FOLDER, first, count) for first in (0, 1, 40, 80)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    shelf = Shelf(tmp_path / FOLDER, LENGTH)
    assert all(read(shelf, number) == record(number) for number in range(count))
    rows = sum(path.stat().st_size // ROW.size for path in (tmp_path / FOLDER).glob("*.index"))
    assert count <= rows < 4 * count  # they also found what others had written


def _write_for_ever(folder: Path) -> None:
    shelf, number = Shelf(folder, LENGTH), 0
    while True:
        shelf.write(key(number), record(number))
        number += 1


def test_a_writer_that_is_killed_harms_nobody(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    for _ in range(3):
        process = forked(_write_for_ever, folder)
        while sum(path.stat().st_size for path in folder.glob("*.index")) < 500:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    shelf = Shelf(folder, LENGTH)
    found = [number for number in range(10_000) if read(shelf, number) is not None]
    assert len(found) >= 500 // ROW.size and not shelf.damaged
    assert all(read(shelf, number) == record(number) for number in found)
    assert make_room(tmp_path, 0, 0) is False  # held by us
    shelf.close()
    assert make_room(tmp_path, 0, 0) and not folder.exists()  # and by none of the dead


def test_a_forked_process_writes_files_of_its_own(tmp_path: Path) -> None:
    shelf = filled(tmp_path / FOLDER, 1)
    process = forked(shelf.write, key(2), record(2))
    process.join(60)
    assert shelf.write(key(3), record(3))
    assert len(list((tmp_path / FOLDER).glob("*.data"))) == 2
    fresh = Shelf(tmp_path / FOLDER, LENGTH)
    assert [read(fresh, number) for number in (1, 2, 3)] == [record(1), record(2), record(3)]


def test_a_damaged_record_is_struck_out_for_everybody(tmp_path: Path) -> None:
    shelf = filled(tmp_path / FOLDER, 1, 2, 3)
    data = next((tmp_path / FOLDER).glob("*.data"))
    content = bytearray(data.read_bytes())
    content[LENGTH + 7] ^= 1
    data.write_bytes(content)
    assert read(shelf, 2) is None and shelf.damaged == 1
    assert read(shelf, 1) == record(1) and read(shelf, 3) == record(3)
    fresh = Shelf(tmp_path / FOLDER, LENGTH)
    assert read(fresh, 2) is None and not fresh.damaged  # it is not offered again
    assert fresh.write(key(2), record(2))
    shelf.refresh()
    assert read(shelf, 2) == record(2)


def test_a_key_that_was_damaged_does_not_lead_to_another_record(tmp_path: Path) -> None:
    filled(tmp_path / FOLDER, 1, 2)
    index = next((tmp_path / FOLDER).glob("*.index"))
    rows = bytearray(index.read_bytes())
    rows[ROW.size : ROW.size + 32] = key(9)
    index.write_bytes(rows)
    fresh = Shelf(tmp_path / FOLDER, LENGTH)
    assert read(fresh, 9) is None and fresh.damaged == 1


@pytest.mark.parametrize("name", ["data", "index"])
def test_a_torn_end_is_left_out(tmp_path: Path, name: str) -> None:
    filled(tmp_path / FOLDER, 1, 2)
    path = next((tmp_path / FOLDER).glob(f"*.{name}"))
    path.write_bytes(path.read_bytes()[:-9])
    fresh = Shelf(tmp_path / FOLDER, LENGTH)
    assert read(fresh, 1) == record(1) and read(fresh, 2) is None
    assert fresh.damaged == (name == "data")


def test_a_full_disk_ends_the_writing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = filled(tmp_path / FOLDER, 1)
    real, left = os.pwrite, [LENGTH // 2]

    def full(file: int, content: Any, place: int) -> int:
        if not left:
            raise OSError(28, "No space left on device")
        return real(file, content[: left.pop()], place)

    monkeypatch.setattr(module.os, "pwrite", full)
    assert not shelf.write(key(2), record(2)) and shelf.trouble == "No space left on device"
    monkeypatch.undo()
    assert not shelf.write(key(3), record(3))
    fresh = Shelf(tmp_path / FOLDER, LENGTH)
    assert read(fresh, 1) == record(1) and read(fresh, 2) is None and not fresh.damaged


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shelf = Shelf(tmp_path / "file" / FOLDER, LENGTH)
    assert shelf.trouble == "Not a directory"
    assert read(shelf, 1) is None and not shelf.write(key(1), record(1))


def test_a_folder_that_is_removed_under_a_reader(tmp_path: Path) -> None:
    shelf = filled(tmp_path / FOLDER, 1)
    for path in (tmp_path / FOLDER).iterdir():
        path.unlink()
    assert read(shelf, 1) is None and not shelf.damaged


def test_room_is_made_by_what_was_used_longest_ago(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        filled(tmp_path / f"{name}{SUFFIX}", 1, 2).close()
        os.utime(tmp_path / f"{name}{SUFFIX}" / "lock", (1000 - age, 1000 - age))
    held = Shelf(tmp_path / f"held{SUFFIX}", LENGTH)
    os.utime(tmp_path / f"held{SUFFIX}" / "lock", (0, 0))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "lock").write_text("x" * 100_000)

    def there() -> set[str]:
        return {path.name.removesuffix(SUFFIX) for path in tmp_path.iterdir()}

    taken = sum(path.stat().st_size for path in tmp_path.glob(f"*{SUFFIX}/*"))
    assert make_room(tmp_path, 100, taken + 100) and there() == {"new", "middle", "old", "held", "foreign"}
    assert make_room(tmp_path, 101, taken + 100) and there() == {"new", "middle", "held", "foreign"}
    assert make_room(tmp_path, 100, LENGTH * 3) and there() == {"new", "held", "foreign"}
    assert not make_room(tmp_path, 100, 99) and there() == {"held", "foreign"}
    held.close()


def test_a_folder_removed_while_it_is_opened_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = module.fcntl.flock, [1]

    def late(file: int, kind: int) -> None:
        if left and kind == module.fcntl.LOCK_SH:
            left.pop()
            assert make_room(tmp_path, 0, 0)  # between opening the lock and holding it
        real(file, kind)

    monkeypatch.setattr(module.fcntl, "flock", late)
    shelf = filled(tmp_path / FOLDER, 1)
    assert not left and not shelf.trouble
    assert read(Shelf(tmp_path / FOLDER, LENGTH), 1) == record(1)
    assert not make_room(tmp_path, 0, 0)
