"""What a W&B folder holds, record by record: the log format of LevelDB with W&B's own messages in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEAD, MAGIC = 32768, 7, 7
"""Bytes of a block, of a piece's head (checksum, length, kind), and before the first piece."""


def records(file: Path) -> Iterator[Any]:
    """Every whole record of a ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), MAGIC, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:  # no room for a head
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read(folder: Path) -> list[dict[str, Any]]:
    """Of every W&B process of a run folder, in order: its run, rows, summary, and exit code (None: it never ended)."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        one: dict[str, Any] = {"rows": [], "summary": {}, "exit": None, "artifacts": [], "folder": file.parent}
        for record in records(file):
            if record.HasField("run"):
                one["run"] = record.run
            elif record.HasField("history"):
                one["rows"].append({_key(item): json.loads(item.value_json) for item in record.history.item})
            elif record.HasField("summary"):
                one["summary"] |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif record.HasField("exit"):
                one["exit"] = record.exit.exit_code
            elif record.HasField("artifact"):
                one["artifacts"].append(record.artifact)
        found.append(one)
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
