"""Samples as files of the LLaVA form: a JSON list of conversations beside a folder of PNGs, for other trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, SampleSource

FILE, IMAGES = "data.json", "images"


def write_llava(source: SampleSource, folder: str | Path, n: int | None = None) -> Path:
    """Write a source's samples so that ``data=llava data.path=<folder>/data.json`` reads them again.

    An image is written once, under its own name; a sample without tags gets one for each of its images before its
    first prompt, which is what it means.

    Args:
        source: what is written, such as ``WorldWritten``.
        folder: a new or empty folder.
        n: how many samples, from the first; None: all.

    Returns:
        The JSON file.

    Raises:
        UserError: the folder has files in it.
        DataError: a sample has a turn without a prompt or an answer, which the form cannot say.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} has files in it; give a new or empty folder.")
    (folder / IMAGES).mkdir(parents=True)
    rows = [_row(source[index], folder) for index in range(len(source) if n is None else min(n, len(source)))]
    path = folder / FILE
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def _row(sample: Sample, folder: Path) -> dict[str, Any]:
    from PIL import Image

    names = []
    for k, image in enumerate(sample.images):
        known = sample.image_ids[k] if sample.image_ids else f"{sample.id}-{k}"
        name = f"{IMAGES}/{known.replace('/', '_')}.png"
        if not (folder / name).exists():
            Image.fromarray(image).save(folder / name)
        names.append(name)
    images: dict[str, Any] = {} if not names else {"image": names[0] if len(names) == 1 else names}
    return {"id": sample.id, **images, "conversations": _turns(sample)}


def _turns(sample: Sample) -> list[dict[str, str]]:
    turns = [{"from": "system", "value": sample.system}] if sample.system else []
    tagged = any(IMAGE_TAG in turn.prompt for turn in sample.turns)
    for k, turn in enumerate(sample.turns):
        tags = "" if tagged or k else f"{IMAGE_TAG}\n" * len(sample.images)
        if not turn.prompt or not turn.answer:
            raise DataError(f"Sample {sample.id} turn {k + 1} has no prompt or no answer; leave it out.")
        turns += [{"from": "human", "value": tags + turn.prompt}, {"from": "gpt", "value": turn.answer}]
    return turns
