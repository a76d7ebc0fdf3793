"""Tar shards with an index beside them: the samples of a set in a few large files, each read at its offset.

The layout inside is that of webdataset: the members of one sample share their name up to its first dot, such as
``00017.jpg`` with ``00017.json`` (a record in one of the forms of `LlavaJson`) or ``00017.txt`` (a caption). Nothing is
ever unpacked to disk, so a member's name cannot lead anywhere.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import IMAGE_TAG, Image, Sample, Turn
from vlmlab.data.fingerprint import Facts, shards_fingerprint
from vlmlab.data.images import decode_image
from vlmlab.data.readers.llava import IMAGE_KEYS, TURN_KEYS, Conversation, LlavaFormat, parse_turns
from vlmlab.data.readers.place import find_files, split_files
from vlmlab.data.readers.records import Row, parse_object
from vlmlab.data.readers.sieve import Sieve, verified
from vlmlab.data.readers.split import check_split, split_of, subset
from vlmlab.data.skipped import Skipped

SUFFIXES = (".tar",)
INDEX = ".index.json"
"""Behind the shard's name: ``{format, bytes, members: [[name, offset, size], ...]}``."""
FORMAT = 1
_END = bytes(1024)
"""How every tar file ends; without it the walk through a file that was cut would stop early and say nothing."""
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "ico")

Place = tuple[int, int]


def write_index(shard: Path) -> Path:
    """Write the index of a tar file beside it; readers take it instead of walking through the headers.

    Raises:
        DataError: the file is no plain tar file.
    """
    members = [[name, *place] for name, place in _scan(shard)[0].items()]
    file = shard.with_name(shard.name + INDEX)
    half = file.with_name(f".{file.name}.new")
    half.write_text(json.dumps({"format": FORMAT, "bytes": shard.stat().st_size, "members": members}), "utf-8")
    return half.replace(file)


def write_shard(shard: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar file of these members, and its index; the same members give the same bytes.

    Args:
        shard: the file to be made.
        members: name and content of each.
    """
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))
    write_index(shard)
    return shard


def _scan(shard: Path) -> tuple[dict[str, Place], list[str]]:
    """Offset and size of every plain member, and the names of all others (links, devices, names given twice)."""
    members: dict[str, Place] = {}
    refused: list[str] = []
    size = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            file.seek(max(size - len(_END), 0))
            if file.read() != _END:
                raise DataError(f"Data file {shard} is cut off or no plain tar file; write it again, uncompressed")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                plain = member.isreg() and not member.issparse() and member.offset_data + member.size <= size
                if plain and member.name not in members:
                    members[member.name] = (member.offset_data, member.size)
                elif not member.isdir():
                    refused.append(member.name)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"Data file {shard} is no plain tar file ({error}); write it again, uncompressed") from None
    return members, refused


def _indexed(shard: Path) -> tuple[dict[str, Place], list[str]]:
    """The members of a shard, from its index where there is one."""
    file = shard.with_name(shard.name + INDEX)
    if not file.is_file():
        return _scan(shard)
    size = shard.stat().st_size
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        members = {str(name): (int(offset), int(length)) for name, offset, length in content["members"]}
        sound = content["format"] == FORMAT and content["bytes"] == size
        sound = sound and all(offset >= 0 <= length and offset + length <= size for offset, length in members.values())
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(
            f"Index {file} is not that of {shard.name}; delete it (the tar is then read without) or renew it"
        )
    return members, []


@dataclass(slots=True)
class _Group:
    """The members of one sample: its text by kind, with its number in the shard, and its pictures in their order."""

    shard: int
    key: str
    number: int = 0
    record: str | None = None
    caption: str | None = None
    pictures: list[str] = field(default_factory=list)


class TarShards:
    """Conversations or captions out of tar shards, as samples; members are read when a sample is asked for.

    A record without `image` or `images` means the pictures of its own name; one that names images means members of its
    shard. Links, devices, and further members of the same name are never read.

    Args:
        path: a shard, a folder or a glob of shards, or an id of the hub.
        split: train, val, test, or null for every sample: by the files' names, otherwise by a hash of the key.
        prompt: the instruction of captions.
        size: only so many samples, chosen by seed; null for all.
        seed: of the choice of `size`.
        split_seed: of the split; apart from `seed`, so that runs with other seeds share their held-out samples.
        val_fraction, test_fraction: shares of the samples.
        tags, prepend_images: see `vlmlab.data.readers.llava.LlavaFormat`.
        max_bad_fraction: share of the samples that may be unusable and are left out; 0: the first is an error.
        verify: read and decode all samples at once (for sets that are scored).

    Attributes:
        skipped: the members and samples that were left out at construction.

    Raises:
        DataError: a shard or its index cannot be used, or the split is empty.
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        prompt: str = "Describe the picture briefly.",
        size: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        tags: Sequence[str] = (IMAGE_TAG,),
        prepend_images: bool = False,
        max_bad_fraction: float = 0.0,
        verify: bool = False,
    ) -> None:
        check_split(split, val_fraction, test_fraction)
        self._files, shares = split_files(find_files(path, SUFFIXES), split, val_fraction, test_fraction)
        self._prompt, self._form = prompt, LlavaFormat(tuple(tags), prepend_images)
        self._members: list[dict[str, Place]] = []
        sieve = Sieve(max_bad_fraction)
        groups: list[_Group] = []
        for number, shard in enumerate(self._files):
            members, refused = _indexed(shard)
            self._members.append(members)
            for name in refused:
                sieve.skip(f"{shard.stem}/{name}", DataError(f"{shard}, member {name} is no plain file; remove it"))
            groups += _grouped(number, members)
        sieve.seen = len(groups) + len(sieve.skipped)
        if shares is not None:
            groups = [g for g in groups if split_of(self._name(g), *shares, split_seed) == split]
        if not groups:
            raise DataError(
                f"{path} has no sample for the split '{split}'; put .json or .txt members beside the images"
            )
        groups = [groups[i] for i in subset([self._name(g) for g in groups], size, seed)]
        if verify:
            groups = verified(groups, sieve, self._sample, self._name)
        self.skipped: list[Skipped] = sieve.finish(path)
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._groups[index])

    def fingerprint(self) -> Facts:
        """Facts that change with the content of its files."""
        return shards_fingerprint(self._files)

    def label(self, index: int) -> str:
        """The id of a sample, without loading it: shard and key."""
        return self._name(self._groups[index])

    def _name(self, group: _Group) -> str:
        return f"{self._files[group.shard].stem}/{group.key}"

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without reading its images."""
        return self._words(self._groups[index])[0]

    def _sample(self, group: _Group) -> Sample:
        name = self._name(group)
        turns, system, pictures = self._words(group)
        images = tuple(self._picture(group, picture) for picture in pictures)
        return Sample(name, images, turns, system, tuple(f"{name}#{k}" for k in range(len(images))))

    def _words(self, group: _Group) -> tuple[tuple[Turn, ...], str, list[str]]:
        """Turns and system line of a sample, and the names of its pictures."""
        if group.record is not None:
            record, pictures = self._record(group, group.record)
            return record.turns, record.system, pictures
        caption = self._row(group, {}).untagged(self._text(group, group.caption or ""), "the caption")
        if len(group.pictures) != 1:
            raise self._row(group, {}).error(f"has {len(group.pictures)} images", "give a caption one image")
        return (Turn(self._prompt, caption, "caption"),), "", group.pictures

    def _record(self, group: _Group, member: str) -> tuple[Conversation, list[str]]:
        row = self._row(group, parse_object(self._text(group, member), f"{self._place(group)}, member {member}"))
        parts = (m for key in TURN_KEYS for m in row.data.get(key) or () if isinstance(m, dict))
        inside = any(isinstance(message.get("content", message.get("value")), list) for message in parts)
        if not inside and all(row.data.get(key) is None for key in IMAGE_KEYS):
            return parse_turns(row, self._form, len(group.pictures)), group.pictures
        record = parse_turns(row, self._form)
        known = self._members[group.shard]
        for name in record.images:
            if name not in known:
                raise row.error(
                    f"image '{name}' is no member of the shard", "name a member, or leave the image key out"
                )
        return record, list(record.images)

    def _place(self, group: _Group) -> Path:
        return self._files[group.shard]

    def _row(self, group: _Group, data: Mapping[str, Any]) -> Row:
        return Row(self._place(group), group.number, dict(data), "member")

    def _text(self, group: _Group, member: str) -> str:
        try:
            return self._bytes(group, member).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{self._place(group)}, member {member} is not UTF-8; convert it") from None

    def _picture(self, group: _Group, member: str) -> Image:
        data = self._bytes(group, member)
        if not data:
            raise DataError(f"{self._place(group)}, member {member} is an empty file; replace it or remove its sample")
        return decode_image(io.BytesIO(data), f"{self._place(group)}/{member}")

    def _bytes(self, group: _Group, member: str) -> bytes:
        offset, size = self._members[group.shard][member]
        handle = os.open(self._place(group), os.O_RDONLY)
        try:
            data = os.pread(handle, size, offset)
        finally:
            os.close(handle)
        if len(data) != size:
            raise DataError(f"{self._place(group)}, member {member} is cut off; write the shard again")
        return data


def _grouped(shard: int, members: Mapping[str, Place]) -> list[_Group]:
    """Members by key; keys with pictures alone are no samples (records may name them)."""
    groups: dict[str, _Group] = {}
    for number, name in enumerate(members, 1):
        folder, slash, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        group = groups.setdefault(f"{folder}{slash}{stem}", _Group(shard, f"{folder}{slash}{stem}"))
        kind = ending.lower()
        if kind == "json":
            group.record, group.number = name, number
        elif kind == "txt":
            group.caption, group.number = name, number
        elif kind.rpartition(".")[2] in PICTURES:
            group.pictures.append(name)
    return [group for group in groups.values() if group.record or group.caption]
