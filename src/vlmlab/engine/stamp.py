"""Whose a file of weights is, and whether it is whole: its checksum, and the run and stage that made it."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from vlmlab.contracts.errors import CheckpointError, reason
from vlmlab.contracts.terminal import tell
from vlmlab.digest import fingerprint
from vlmlab.recipe.stage import Stage
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.identity import digest, stage_leaves

CHECKSUM, RUN = "checksum", "run"
"""Keys of what a file says about itself."""

RECORD = "stages"
"""Key of ``env.json``: the hash of every stage, as it was when the run began."""

REMEDY = "put the run's own file back, or delete it to train that stage again"


@dataclass(frozen=True)
class Stamp:
    """The run and stage that a file belongs to.

    Attributes:
        seed: the run's.
        stage: the stage's name.
        index: its place in the recipe.
        config: hash of what the configuration says of the stage; equal for runs that have this stage in common.
    """

    seed: int | None
    stage: str
    index: int
    config: str

    def check(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Refuse a file of another run or stage; one made before files had stamps is accepted with a note.

        Raises:
            CheckpointError: naming what differs.
        """
        if facts.get("stage") != self.stage:
            raise CheckpointError(f"{path} is of the stage {facts.get('stage')} and not of {self.stage}; {REMEDY}.")
        found = facts.get(RUN)
        if not isinstance(found, Mapping):
            tell(f"note: {path} carries no checksum and no name of its run; it is taken as it is", sys.stderr)
            return
        for key, mine in asdict(self).items():
            if found.get(key) != mine:
                what = "configuration" if key == "config" else key
                raise CheckpointError(
                    f"{path} belongs to another run ({what} {found.get(key)}, here {mine}); {REMEDY}."
                )


def stamps(cfg: DictConfig, stages: list[Stage], folder: RunFolder, writes: bool) -> dict[str, Stamp]:
    """The stamp of every stage by its name, as noted in the run's ``env.json`` when it began.

    Args:
        cfg: the configuration.
        stages: of its recipe.
        folder: the run folder.
        writes: whether to note those that are not noted yet.
    """
    config = plain(cfg)
    known: dict[str, str] = folder.env().get(RECORD) or {}
    hashes = {stage.name: known.get(stage.name) or stage_hash(config, stage) for stage in stages}
    if writes and known != hashes:
        folder.update_env(**{RECORD: known | hashes})
    return {s.name: Stamp(config.get("seed"), s.name, s.index, hashes[s.name]) for s in stages}


def recorded(folder: RunFolder, stage: Stage) -> Stamp | None:
    """The stamp of a stage of a run that is there; None where it was made before there were any."""
    known = (folder.env().get(RECORD) or {}).get(stage.name)
    return None if known is None else Stamp((folder.config() or {}).get("seed"), stage.name, stage.index, known)


def stage_hash(config: Mapping[str, Any], stage: Stage) -> str:
    """16 hexadecimal digits of a stage's own keys and of what else of the configuration it reads."""
    return digest({"stage": asdict(stage), "read": stage_leaves(config, stage.data)})


def checksum(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits of what a file says and of every bit of its tensors."""
    said = {key: value for key, value in facts.items() if key != CHECKSUM}
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {fingerprint(tensor)}\n".encode())
    return digest.hexdigest()


def check_whole(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file that has changed since it was written; one made before files had a checksum is let through.

    Raises:
        CheckpointError: it has.
    """
    if (CHECKSUM in facts or RUN in facts) and facts.get(CHECKSUM) != checksum(facts, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content; {REMEDY}.")


def check_archive(path: Path) -> None:
    """Refuse an archive of torch any of whose records has changed since it was written.

    Raises:
        CheckpointError: naming the first such record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # whatever a reader says of bytes that mean nothing
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); {REMEDY}.") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken} is not that of its content; {REMEDY}.")
