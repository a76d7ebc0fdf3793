"""What the package ``datasets`` opens: an id of the hub, a folder, files; as Arrow rows whose images stay undecoded.

Only formats that hold data are read (`FORMATS`). Loading scripts do not exist in the versions that are asked for, and
pickled tables, which ``datasets`` would open by name, are not among the formats.
"""

from __future__ import annotations

import glob
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError, UserError, listed, reason
from vlmlab.data.fingerprint import Facts, files_fingerprint, images_fingerprint, shards_fingerprint
from vlmlab.data.readers.place import is_id, is_there
from vlmlab.data.readers.split import named_split

FORMATS = ("parquet", "arrow", "json", "csv", "imagefolder")
"""Builders of ``datasets`` that are used."""

KEPT = "cache"
"""The builder of what ``datasets`` has made before, of one of the hub that is out of reach."""

SAVED = ("dataset_dict.json", "state.json")
"""What is in a folder that ``save_to_disk`` wrote: of several splits, of one."""

SECONDS = 10.0
"""How long the hub is waited for."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

_READ_BY = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}


def needed() -> Any:
    """The package ``datasets``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "Data of the hub are read by the package datasets, which is not installed; run pip install 'vlmlab[hub]'."
        ) from error


@dataclass
class Opened:
    """A data set that was found; nothing of it has been read.

    Attributes:
        path: as it was given.
        splits: names of its splits, in its own words.
        root: the local folder it lies in; None of one of the hub.
        commit: of one of the hub, the commit that is read.
        images: whether its rows are image files (``imagefolder``), whose paths are then whole.
    """

    path: str
    splits: list[str]
    root: Path | None = None
    commit: str | None = None
    images: bool = False
    _builder: Any = None
    _saved: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its samples are called by: the id, or the name of the file or folder."""
        return self.path if self.root is None else Path(self.path).name or self.path

    def rows(self, split: str) -> Any:
        """The rows of a split as a ``datasets.Dataset`` (made and kept by ``datasets`` in its cache, memory-mapped).

        Raises:
            DataError: the files cannot be read.
        """
        if self._saved:
            return self._saved[split]
        with told(self.path):
            self._builder.download_and_prepare()
            return self._builder.as_dataset(split=split)

    def stream(self, split: str) -> Any:
        """The rows of a split one after another, as a ``datasets.IterableDataset``; nothing is downloaded at once."""
        with told(self.path):
            if self._saved:
                return self._saved[split].to_iterable_dataset()
            return self._builder.as_streaming_dataset(split=split)

    def facts(self, splits: Iterable[str]) -> Facts:
        """What changes with the content of these splits: id and commit, or the files."""
        if self.root is None:
            return {"id": self.path, "commit": self.commit, "config": str(self._builder.config.name)}
        if self._saved:
            folders = [self.root / name if (self.root / SAVED[0]).is_file() else self.root for name in splits]
            return shards_fingerprint(sorted(file for folder in folders for file in folder.glob("*.arrow")))
        files = sorted({Path(file) for split in splits for file in self._builder.config.data_files[split]})
        if not self.images:
            return shards_fingerprint(files)
        tables = [file for file in files if file.stem == "metadata"]
        pictures = (file.relative_to(self.root).as_posix() for file in files if file.stem != "metadata")
        return files_fingerprint(tables) | images_fingerprint(self.root, pictures)


def open_set(path: str, config: str | None = None, revision: str | None = None, cache: str | None = None) -> Opened:
    """Find a data set.

    Args:
        path: an id of the hub (owner/name); a folder: of parquet, JSON, CSV or Arrow files, of images with or without
            metadata, or written by ``save_to_disk``; a file or a glob of files.
        config: which of its configurations, where it has several.
        revision: of one of the hub; None: what its main branch is now.
        cache: where ``datasets`` keeps what it makes; None: its own place.

    Raises:
        DataError: nothing is there, it cannot be opened, is of a format that is not read, or of another commit.
        UserError: the package is not installed.
    """
    datasets, place = needed(), Path(path).expanduser()
    if is_id(path) and not is_there(path):
        _check_reachable(datasets, path, revision, cache)
        with told(path):
            builder = datasets.load_dataset_builder(path, config, revision=revision, cache_dir=cache)
        if _COMMIT.fullmatch(revision or "") and builder.hash != revision:
            raise DataError(
                f"data.path={path}: the cache has the commit {builder.hash} and not data.revision={revision}, and the "
                "hub cannot be reached; read that one, or connect"
            )
        return _built(path, builder, None, str(builder.hash))
    if not is_there(path):
        raise DataError(f"data.path={path} is not there; give a file, a folder, a glob, or an id of the hub")
    place = place.absolute()
    if any((place / name).is_file() for name in SAVED):
        with told(path):
            found = datasets.load_from_disk(str(place))
        saved = dict(found) if isinstance(found, dict) else {"train": found}
        return Opened(path, list(saved), place, _saved=saved)
    with told(path):
        if place.is_dir():
            builder = datasets.load_dataset_builder(str(place), config, cache_dir=cache)
        else:
            builder = _of_files(datasets, path, place, cache)
    return _built(path, builder, place if place.is_dir() else place.parent, None)


def _of_files(datasets: Any, path: str, place: Path, cache: str | None) -> Any:
    files = sorted(glob.glob(str(place), recursive=True)) if glob.has_magic(path) else [str(place)]
    kinds = {Path(file).suffix.lower() for file in files}
    if len(kinds) != 1 or not kinds <= set(_READ_BY):
        raise DataError(
            f"data.path={path} has files that end in {listed(sorted(kinds))}; give files of one kind of "
            f"{', '.join(_READ_BY)}, or a folder"
        )
    kind, more = _READ_BY[kinds.pop()]
    return datasets.load_dataset_builder(kind, data_files=files, cache_dir=cache, **more)


def _built(path: str, builder: Any, root: Path | None, commit: str | None) -> Opened:
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in FORMATS and not (kind == KEPT and commit is not None):
        raise DataError(
            f"data.path={path} is of the format '{kind}', and only {', '.join(FORMATS)} are read; convert it, tars are "
            "read by data=tar_shards"
        )
    splits = list(builder.config.data_files or builder.info.splits or ())
    return Opened(path, [str(split) for split in splits], root, commit, kind == "imagefolder", builder)


@contextmanager
def told(path: str) -> Iterator[None]:
    """Whatever ``datasets`` says of a data set as one sentence; it raises nearly anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"data.path={path} cannot be read by the package datasets ({reason(cause, 160)}); correct the path, "
            "data.config, data.revision or the files"
        ) from None


def _check_reachable(datasets: Any, path: str, revision: str | None, cache: str | None) -> None:
    """Ask the hub once, since ``datasets`` itself tries for half a minute; what was read before may be in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(path, revision=revision, timeout=SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = "" if revision is None else f" at revision {revision}"
        raise DataError(
            f"data.path={path} is neither a path on this machine nor a data set that the hub shows you{at}; correct it"
        ) from None
    except Exception as error:  # whatever the network says: what is on this machine is used, or the remedy is the same
        owner, _, name = path.partition("/")
        folder = Path(cache or datasets.config.HF_DATASETS_CACHE).expanduser()
        known = importlib.import_module("datasets.naming").camelcase_to_snakecase(name)
        if not (folder / f"{owner}___{known}").is_dir():
            raise DataError(
                f"data.path={path} is not a path on this machine, the hub cannot be reached ({type(error).__name__}) "
                "and its cache has no such data set; download its files elsewhere and set data.path to their folder"
            ) from None


def choose_splits(
    opened: Opened, split: str | None, own: str | None, val: float, test: float
) -> tuple[list[str], tuple[float, float] | None]:
    """Which of a set's splits are the wanted one.

    Args:
        opened: the set.
        split: train, val, test, or None for all of them.
        own: the set's own word for it; None: it is told by its name (validation is val), and a single one is train.
        val: share of train's rows that are val where the set has none.
        test: likewise.

    Returns:
        Its splits, and the shares of val and test to be taken out of them by a hash; None: every row counts.

    Raises:
        DataError: the set has no such split.
    """
    known = listed(opened.splits)
    if own is not None:
        if own not in opened.splits:
            raise DataError(f"{opened.path} has no split '{own}' (splits: {known}); correct data.splits.{split}")
        return [own], None
    if split is None:
        return opened.splits, None
    groups: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in opened.splits:
        word = named_split(name) if len(opened.splits) > 1 else "train"
        if word is not None:
            groups[word].append(name)
    if split != "train" and groups[split]:
        return groups[split], None
    if not groups["train"]:
        raise DataError(f"{opened.path} has no split for '{split}' (splits: {known}); name one by data.splits.{split}")
    return groups["train"], (0.0 if groups["val"] else val, 0.0 if groups["test"] else test)


def check_columns(path: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raises DataError where a column that a key names is not there."""
    if missing := [name for name in wanted if name not in there]:
        raise DataError(
            f"{path} has no column '{missing[0]}' (columns: {listed(there)}); correct data.columns, whose keys name "
            "the set's own columns"
        )
