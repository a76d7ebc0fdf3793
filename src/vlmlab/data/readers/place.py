"""Where a data set's files are: a file, a folder, a glob of shards, or an id of the hub. Never imports torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from vlmlab.contracts.errors import DataError
from vlmlab.data.readers.split import named_split

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIX = re.compile(r"\.(json|jsonl|ndjson|csv|tsv|parquet|tar|txt|zip|gz|arrow)$", re.IGNORECASE)


def is_id(path: str) -> bool:
    """Whether this can be an id of the hub (owner/name): nothing of that name is here, nor its first folder."""
    if not _ID.fullmatch(path) or _FILE_SUFFIX.search(path):
        return False
    return not Path(path).exists() and not Path(path).parent.is_dir()


def is_there(path: str) -> bool:
    """Whether the path, or a file that the glob means, is on this machine."""
    place = Path(path).expanduser()
    return place.exists() or bool(glob.has_magic(path) and glob.glob(str(place), recursive=True))


def find_files(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a data set, sorted by name: the file itself, those of a folder, of a glob, or of a hub's data set.

    Args:
        path: a file, a folder (searched through all levels for `suffixes`), a glob such as data/train-*.parquet, or an
            id such as lmms-lab/LLaVA-ReCap-558K, whose files are downloaded into the hub's own cache when first used.
        suffixes: endings of file names, with the dot, in lower case.

    Raises:
        DataError: nothing is there, or the id's files are neither here nor reachable.
    """
    place = Path(path).expanduser()
    kinds = ", ".join(suffixes)
    if place.is_dir():
        found = _in_folder(place, suffixes)
        if not found:
            raise DataError(f"Folder {path} holds no file that ends in {kinds}; set data.path to where they are")
        return found
    if place.exists() and not place.is_file():
        raise DataError(f"data.path={path} is a pipe or a device, not a file; give the file itself")
    if place.exists() or not (glob.has_magic(path) or is_id(path)):
        return [place]  # anyone who opens it says what is wrong with it
    if glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"No file fits data.path={path}; correct the glob (relative paths start at {Path.cwd()})")
        return found
    found = _in_folder(_snapshot(path, suffixes), suffixes)
    if not found:
        raise DataError(f"The hub's data set {path} holds no file that ends in {kinds}; give another data.path")
    return found


def _in_folder(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.name.lower().endswith(tuple(suffixes)))
    return sorted(f for f in files if f.is_file() and not any(p.startswith(".") for p in f.relative_to(folder).parts))


def _snapshot(name: str, suffixes: Sequence[str]) -> Path:
    """A local copy of a data set of the hub; only its data files."""
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in suffixes]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # whatever the network or the hub's library says: the remedy is the same
        reason = type(error).__name__
        raise DataError(
            f"data.path={name} is neither a path on this machine nor a data set the hub gives ({reason}); download its "
            "files elsewhere and set data.path to their folder"
        ) from error


def split_files(
    files: Sequence[Path], split: str | None, val: float, test: float
) -> tuple[list[Path], tuple[float, float] | None]:
    """The files of a split by their names' first word (train-00000-of-00026.parquet, validate.json).

    A file with no such word is one of train, and so is a single file whatever its name. A split without files of its
    own is a part of train.

    Returns:
        The files, and the shares of val and test to be taken out of them by a hash; None: every row counts.
    """
    if split is None:
        return list(files), None
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for file in files:
        named = named_split(re.split(r"[-_.]", file.name, maxsplit=1)[0]) if len(files) > 1 else None
        groups[named or "train"].append(file)
    if split != "train" and groups[split]:
        return groups[split], None
    return groups["train"], (0.0 if groups["val"] else val, 0.0 if groups["test"] else test)
