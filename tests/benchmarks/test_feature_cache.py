"""The benchmark runs, and compares what it says it compares."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.feature_cache import CELLS, SMALL, TOWER, Setting, compare, real_size

TINY = Setting("tiny", TOWER | {"image_size": 32, "num_hidden_layers": 1}, SMALL, images=4, batch=2)


def stage(work: Path, connector: str, mask: str, cache: str) -> dict[str, Any]:
    file = work / f"{connector}-{mask}-{cache}" / "stages" / "0_align" / "stage.json"
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def test_a_tiny_comparison(tmp_path: Path) -> None:
    lines = compare(TINY, tmp_path)
    assert re.search(r"ratio \d+\.\d\d, floor (0\.\d\d|1\.00); first cell \d+\.\d\d, later ones \d+\.\d\d$", lines[1])
    assert re.search(r"tower \S+ ms in a batch, \S+ ms alone; hash \S+ ms, read \S+ ms \(\d+ kB\)", lines[2])
    assert len(CELLS) == 4
    for number, cell in enumerate(CELLS):  # the first fills the cache and the others show the tower nothing
        counts = stage(tmp_path, *cell, "disk")["cache"]
        assert (counts["hits"], counts["misses"]) == ((4, 0) if number else (0, 4))
        assert "cache" not in stage(tmp_path, *cell, "none")
    assert re.search(r"hash \S+ ms, read \S+ ms, write \S+ ms", real_size(tmp_path))
