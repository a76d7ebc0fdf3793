"""Reading image-text samples from files, parquet and tar shards: time against decoding the same bytes from memory.

    python benchmarks/decoding.py [folder of images] [--samples 1000] [--take 100] [--rounds 9] [--side 384]

The floor is what no reader can avoid: Pillow's decoder on bytes that are in memory already, and vlmlab's preprocessing
to `side` pixels. The readers do that and all the rest: ``LlavaJson`` (a JSON list beside an image folder),
``LlavaParquet`` (row groups of 100 rows, as the hub's image sets have; needs pyarrow, left out without it) and
``TarShards`` (with an index). All hold the same JPEG files, of a folder or made here (640 x 480), and give the same
pixels, which is checked. One thread, no workers; the disk is warm, so that nothing waits for it, and seconds are those
of this process's own computing, which neighbours on the machine disturb less.

Each round every way reads the same samples, in order and then shuffled. A ratio is taken in each round, of times;
printed are the median and the quartiles over rounds; 1 is the floor.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from vlmlab.contracts.sample import Image, SampleSource
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.tar import TarShards, write_shard
from vlmlab.encoder.preprocess import Preprocess

ROW_GROUP = 100
ANSWER = "A man on a horse rides past two parked cars while a child holding a red umbrella looks on from the pavement."
Read = Callable[[int], Image]


def photograph(seed: int) -> bytes:
    """A JPEG file of 640 x 480: soft shapes with fine grain, which cost a decoder about what a photograph does."""
    random = np.random.default_rng(seed)
    coarse = Pillow.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))  # bicubic
    grain = random.normal(0, 8, (480, 640, 1))
    file = io.BytesIO()
    pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
    Pillow.fromarray(pixels).save(file, "jpeg", quality=85)
    return file.getvalue()


def photographs(folder: Path | None, most: int = 200) -> list[bytes]:
    if folder is None:
        return [photograph(seed) for seed in range(min(most, 50))]
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))[:most]]


# -- the same samples in every form ------------------------------------------------------------------------------------


def record(number: int) -> dict[str, Any]:
    said = [("human", "<image>\nWhat can be seen here?"), ("gpt", ANSWER)]
    return {"id": f"{number:06d}", "conversations": [{"from": role, "value": text} for role, text in said]}


def files(folder: Path, pictures: Sequence[bytes]) -> SampleSource:
    (folder / "images").mkdir()
    for number, picture in enumerate(pictures):
        (folder / "images" / f"{number:06d}.jpg").write_bytes(picture)
    rows = [{**record(number), "image": f"{number:06d}.jpg"} for number in range(len(pictures))]
    (folder / "chat.json").write_text(json.dumps(rows))
    return LlavaJson(str(folder / "chat.json"), str(folder / "images"))


def tar(folder: Path, pictures: Sequence[bytes]) -> SampleSource:
    members = []
    for number, picture in enumerate(pictures):
        members += [(f"{number:06d}.jpg", picture), (f"{number:06d}.json", json.dumps(record(number)).encode())]
    write_shard(folder / "shard-00000.tar", members)
    return TarShards(str(folder / "shard-00000.tar"))


def parquet(folder: Path, pictures: Sequence[bytes]) -> SampleSource:
    import pyarrow
    import pyarrow.parquet

    from vlmlab.data.readers.parquet import LlavaParquet

    rows = [{**record(n), "image": {"bytes": picture, "path": f"{n:06d}.jpg"}} for n, picture in enumerate(pictures)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "shard.parquet", row_group_size=ROW_GROUP)
    return LlavaParquet(str(folder / "shard.parquet"))


def readers(folder: Path, pictures: Sequence[bytes], settings: Preprocess) -> dict[str, Read]:
    """The ways by name, the floor first."""

    def floor(index: int) -> Image:
        with Pillow.open(io.BytesIO(pictures[index])) as picture:
            return settings(np.asarray(picture.convert("RGB")))

    def read(source: SampleSource, index: int) -> Image:
        return settings(source[index].images[0])

    forms = {"files": files, "tar": tar}
    if importlib.util.find_spec("pyarrow"):
        forms["parquet"] = parquet
    else:
        print("parquet: left out, since pyarrow is not installed (pip install 'vlmlab[parquet]')")
    return {"floor": floor, **{name: partial(read, form(folder, pictures)) for name, form in forms.items()}}


# -- measuring ---------------------------------------------------------------------------------------------------------


def timed(read: Read, indices: Sequence[int]) -> float:
    """Seconds of this process's own computing per sample."""
    start = time.process_time()
    for index in indices:
        read(index)
    return (time.process_time() - start) / len(indices)


def compare(ways: dict[str, Read], rounds: Sequence[Sequence[int]]) -> list[str]:
    """One line per way; every round all of them read the same samples, one after the other."""
    seconds = np.array([[timed(read, indices) for read in ways.values()] for indices in rounds])  # (rounds, ways)
    low, middle, high = np.quantile(seconds / seconds[:, :1], [0.25, 0.5, 0.75], axis=0)
    speed = 1 / np.median(seconds, axis=0)
    lines = [f"  floor {speed[0]:.0f} samples/s"]
    for n, name in list(enumerate(ways))[1:]:
        spread = f"quartiles {low[n]:.2f} to {high[n]:.2f}, {len(rounds)} rounds"
        lines.append(f"  {name} {speed[n]:.0f} samples/s, ratio {middle[n]:.2f} ({spread})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--samples", type=int, default=1000, help="in every form; pictures come again")
    parser.add_argument("--take", type=int, default=100, help="of them read by each way in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", type=int, default=384)
    given = parser.parse_args()
    found = photographs(given.folder)
    pictures = [found[number % len(found)] for number in range(given.samples)]
    random, take = np.random.default_rng(0), min(given.take, given.samples)
    with tempfile.TemporaryDirectory() as folder:
        ways = readers(Path(folder), pictures, Preprocess(given.side, given.side))
        for index in random.integers(0, given.samples, 20).tolist():
            want, *others = (read(index) for read in ways.values())
            assert all(np.array_equal(want, other) for other in others), f"sample {index} has not the same pixels"
        starts = random.integers(0, given.samples - take + 1, given.rounds).tolist()
        ordered = [range(start, start + take) for start in starts]
        shuffled = [random.permutation(given.samples)[:take].tolist() for _ in starts]
        size = sum(map(len, pictures)) / len(pictures) / 1024
        print(f"{given.samples} samples, JPEG files of {size:.0f} KiB on average, to {given.side} pixels")
        for name, rounds in {"in order": ordered, "shuffled": shuffled}.items():
            print(f"{name}:", *compare(ways, rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
