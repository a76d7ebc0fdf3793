"""Tar shards with an index beside them: the samples of a set in a few large files, each read at its offset.

The layout inside is that of webdataset: the members of one sample share their folder and their name up to its first
dot, such as ``00017.jpg`` with ``00017.json`` (a record in one of the forms of `LlavaJson`) or ``00017.txt`` (a
caption). With a caption beside it, a ``.json`` without turns is what img2dataset has noted about the download, and is
not read. Of several pictures, ``00017.seg.png`` and the like are not the sample's where there is ``00017.jpg``;
``00017.0.jpg``, ``00017.1.jpg`` are. Hidden members (``._00017.jpg``) are none. Nothing is ever unpacked to disk, so a
member's name cannot lead anywhere.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError, brief, reason
from vlmlab.contracts.sample import IMAGE_TAG, Image, Sample, Turn
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts
from vlmlab.data.fingerprint import Facts, shards_fingerprint
from vlmlab.data.images import decode_image, embedded
from vlmlab.data.overlap import Stored, spread
from vlmlab.data.pixels import value_range
from vlmlab.data.readers.llava import IMAGE_KEYS, TURN_KEYS, Conversation, LlavaFormat, parse_turns
from vlmlab.data.readers.place import find_files, split_files
from vlmlab.data.readers.records import Row, parse_object
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, split_of, subset, together
from vlmlab.data.skipped import Skipped

SUFFIXES = (".tar",)
INDEX = ".index.json"
"""After the shard's name: ``{format, bytes, members: [[name, offset, size], ...]}``."""
FORMAT = 1
_END = bytes(1024)
"""How every tar file ends; without it the walk through a file that was cut would stop early and say nothing."""
_OWN = re.compile(r"(\d+\.)?\w+")
"""The ending of a member that is the sample's own rather than something about it: plain, or numbered."""
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "ico")

Place = tuple[int, int]


def write_index(shard: Path) -> Path:
    """Write the index of a tar file beside it; readers take it instead of walking through the headers.

    Raises:
        DataError: the file is not a plain tar file.
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
                raise DataError(f"Data file {shard} is cut off or not a plain tar file; write it again, uncompressed")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                plain = member.isreg() and not member.issparse() and member.offset_data + member.size <= size
                if plain and member.name not in members:
                    members[member.name] = (member.offset_data, member.size)
                elif not member.isdir():
                    refused.append(member.name)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"Data file {shard} is not a plain tar file ({reason(error)}); write it again, uncompressed"
        ) from None
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


@dataclass(slots=True, eq=False)
class _Group:
    """The members of one sample, its own or else those about it: records, captions, pictures in their order.

    `number` is that of its text in the shard.
    """

    shard: int
    key: str
    number: int = 0
    records: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


class TarShards:
    """Conversations or captions out of tar shards, as samples; members are read when a sample is asked for.

    A record without `image` or `images` means the pictures of its own name; one that names images means members of its
    shard. Links, devices, and further members of the same name are never read. Samples that name the same members are
    in one split; where split by key, one with pictures of its own may not name others'.

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
        image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the members and samples that were left out at construction.

    Raises:
        DataError: a shard or its index cannot be used, or the split is empty.
    """

    def __init__(
        self,
        path: Text,
        split: Split | None = None,
        prompt: str = "Describe the picture briefly.",
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        test_fraction: Share = 0.0,
        tags: Texts = (IMAGE_TAG,),
        prepend_images: bool = False,
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_range: Levels = "auto",
    ) -> None:
        check_split(split, val_fraction, test_fraction)
        self._files, shares = split_files(find_files(path, SUFFIXES), split, val_fraction, test_fraction)
        self._prompt, self._form = prompt, LlavaFormat(tuple(tags), prepend_images)
        self._values = value_range(image_range)
        self._members: list[dict[str, Place]] = []
        row_filter = RowFilter(max_bad_fraction)
        groups: list[_Group] = []
        for number, shard in enumerate(self._files):
            members, refused = _indexed(shard)
            self._members.append(members)
            for name in refused:
                row_filter.skip(
                    f"{shard.stem}/{name}", DataError(f"{shard}, member {name} is not a plain file; remove it")
                )
            groups += _grouped(number, members)
        row_filter.seen = len(groups) + len(row_filter.skipped)
        self._alone = shares is not None
        if shares is not None:
            names = together([self._split_by(g) for g in groups])
            groups = [g for g, name in zip(groups, names, strict=True) if split_of(name, *shares, split_seed) == split]
        if not groups:
            raise DataError(
                f"{path} has no sample for the split '{split}'; put .json or .txt members beside the images"
            )
        groups = [groups[i] for i in subset([self._name(g) for g in groups], size, seed)]
        if verify:
            groups = verified(groups, row_filter, self._sample, self._name)
        self.skipped: list[Skipped] = row_filter.finish(path)
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._groups[index])

    def stored(self, most: int) -> Iterator[Stored]:
        """The pictures of its samples as they are kept; those that records name are left out."""
        for group in spread(self._groups, most):
            for member in group.pictures:
                name = f"{self._files[group.shard].stem}/{member}"
                yield Stored(name, self._members[group.shard][member][1], partial(self._bytes, group, member))

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
        row = self._row(group, {})
        for texts in (group.records, group.captions):
            if len(texts) > 1:
                remedy = "what comes before the first dot names a sample: give each its own, as in a-b.txt"
                raise row.error(f"members {' and '.join(texts[:2])} are of one sample", remedy)
        if group.records:
            said = self._said(group, group.records[0])
            if not group.captions or any(key in said.data for key in TURN_KEYS):
                record, pictures = self._record(group, said)
                return record.turns, record.system, pictures
        caption = row.untagged(self._text(group, group.captions[0]), "the caption")
        if len(group.pictures) != 1:
            raise row.error(f"has {len(group.pictures)} images", "give a caption one image")
        return (Turn(self._prompt, caption, "caption"),), "", group.pictures

    def _said(self, group: _Group, member: str) -> Row:
        """A record as it is in its member."""
        return self._row(group, parse_object(self._text(group, member), f"{self._place(group)}, member {member}"))

    def _record(self, group: _Group, row: Row) -> tuple[Conversation, list[str]]:
        parts = (m for key in TURN_KEYS for m in row.data.get(key) or () if isinstance(m, dict))
        inside = any(isinstance(message.get("content", message.get("value")), list) for message in parts)
        if not inside and all(row.data.get(key) is None for key in IMAGE_KEYS):
            return parse_turns(row, self._form, len(group.pictures)), group.pictures
        record = parse_turns(row, self._form)
        return record, [self._named(group, row, name) for name in record.images]

    def _named(self, group: _Group, row: Row, name: str) -> str:
        """The member that a record means by an image's name."""
        known = self._members[group.shard]
        plain = posixpath.normpath(name)
        member = next((m for m in (name, plain, f"./{plain}") if m in known), None)
        if member is None:
            reason, remedy = embedded(name), "name a member, or leave the image key out"
            raise row.error(f"image '{brief(name, 120)}' {reason or 'is not a member of the shard'}", remedy)
        if self._alone and group.pictures and _key(member) != group.key:
            remedy = "name its own, or name the shards after splits (train-0.tar, val-0.tar)"
            raise row.error(f"has pictures and names '{member}', which is another sample's", remedy)
        return member

    def _split_by(self, group: _Group) -> list[str]:
        """What a sample is split by: its name, and those of the samples whose pictures its record names."""
        names = [self._name(group)]
        if group.pictures or not group.records:
            return names
        try:
            _, pictures = self._record(group, self._said(group, group.records[0]))
        except DataError:  # it is met again, and named, when it is asked for
            return names
        stem = self._files[group.shard].stem
        return [*names, *(f"{stem}/{_key(picture)}" for picture in pictures)]

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
        return decode_image(io.BytesIO(data), f"{self._place(group)}/{member}", self._values)

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


def _key(name: str) -> str:
    """What a member's sample is called: its name up to the first dot after its folder."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _grouped(shard: int, members: Mapping[str, Place]) -> list[_Group]:
    """Members by key; keys with pictures alone are not samples (records may name them)."""
    groups: dict[str, _Group] = {}
    about: dict[str, _Group] = {}
    for number, name in enumerate(members, 1):
        base = name.rpartition("/")[2]
        ending = base.partition(".")[2].lower()
        if base.startswith("."):
            continue
        key = _key(name)
        own = groups.setdefault(key, _Group(shard, key))
        group = own if _OWN.fullmatch(ending) else about.setdefault(key, _Group(shard, key))
        kind = ending.rpartition(".")[2]
        if kind in ("json", "txt"):
            (group.records if kind == "json" else group.captions).append(name)
            group.number = number
        elif kind in PICTURES:
            group.pictures.append(name)
    return [group for group in map(_with_others, groups.values(), map(about.get, groups)) if _has_text(group)]


def _with_others(own: _Group, about: _Group | None) -> _Group:
    """A sample; where it has no member of a kind that is plainly its own, the others of its name count."""
    if about is not None:
        if not _has_text(own):
            own.records, own.captions, own.number = about.records, about.captions, about.number
        own.pictures = own.pictures or about.pictures
    return own


def _has_text(group: _Group) -> bool:
    return bool(group.records or group.captions)
