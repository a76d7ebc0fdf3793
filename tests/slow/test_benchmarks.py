"""The scripts of ``benchmarks/`` run from end to end, far too small for their numbers to mean anything.

What they compare must still be the same: pixels, losses and gradients are checked inside them.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.slow.runs import command

pytestmark = pytest.mark.slow


def lines(script: str, *words: str, cwd: Path) -> list[str]:
    done = command(f"benchmarks/{script}.py", *words, cwd=cwd, timeout=600)
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_preprocess(tmp_path: Path) -> None:
    found = lines("preprocess", "--images", "2", "--rounds", "1", cwd=tmp_path)
    assert [line.partition(":")[0] for line in found] == ["siglip 224", "siglip 384", "clip 336"]
    assert all(line.count("ratio") == 2 for line in found)


def test_training_step(tmp_path: Path) -> None:
    found = lines("training_step", "--size", "tiny", "--batch", "2", "--rounds", "1", cwd=tmp_path)
    assert [line.partition(":")[0] for line in found[1:]] == ["the same step", "memory", "time", "CPU time"]
    assert "512 words" in found[0] and "2 rows of" in found[0]
    assert all(re.search(r"vlmlab [\d.]+.* transformers [\d.]+.* ratio \d", line) for line in found[2:])


def test_trees(tmp_path: Path) -> None:
    found = lines("trees", "--size", "tiny", "--questions", "3", "--rounds", "1", cwd=tmp_path)
    assert [line.partition(":")[0] for line in found] == [
        "positions", "the same step", "memory", "time, 1 rounds", "CPU time, 1 rounds"
    ]  # fmt: skip
    assert re.search(r"tree 1 x \d+, rows and transformers 3 x \d+", found[0])
    assert all(line.count("tree / ") == 2 for line in found[2:])


def test_generation(tmp_path: Path) -> None:
    found = lines("generation", "--size", "tiny", "--tokens", "3", "--rounds", "1", cwd=tmp_path)
    assert [line.partition(",")[0] for line in found[::2]] == ["alone", "batch", "one picture"]
    assert all(re.search(r"time: vlmlab [\d.e+]+ tokens/s, transformers .*; ratio \d", line) for line in found)


def test_decoding(tmp_path: Path) -> None:
    found = lines("decoding", "--samples", "6", "--take", "3", "--rounds", "1", "--side", "64", cwd=tmp_path)
    ways = ["floor", "files", "tar", *(["parquet"] if find_spec("pyarrow") else [])]
    named = [line.split()[0] for line in found if line.startswith("  ")]
    assert named == ways * 2
    assert ("parquet: left out" in found[0]) == (find_spec("pyarrow") is None)
