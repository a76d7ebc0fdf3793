"""The run folder: what may be reused, resumed or must be refused, and the files that say how far a run is."""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.runs.config import config_hash
from vlmlab.runs.environment import code_fingerprint, environment
from vlmlab.runs.files import append_line, read_json, read_rows, to_json, write_atomic, write_json, write_over
from vlmlab.runs.identity import Changes, changes, training_hash
from vlmlab.runs.lock import FolderLock, is_locked
from vlmlab.runs.renamed import with_present_names

FORMAT = 1
"""Version of ``result.json``."""

LONGEST = 300
"""Characters of a message; it names as many keys as fit."""

StateName = Literal["running", "done", "failed", "interrupted"]


class RunFolder:
    """The files of one run. Making one touches nothing; ``open`` decides and locks, the other methods read or write.

    Any number of them may stand for the same folder: one opens it, and whoever is given its path reads and writes.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None

    # -- deciding ------------------------------------------------------------------------------------------------

    def open(
        self, config: Mapping[str, Any], overrides: Sequence[str] = (), fresh: bool = False
    ) -> dict[str, Any] | None:
        """Lock the folder for this configuration and say whether anything is left to do.

        A configuration that asks for another evaluation of the same training takes the folder over: the weights stay,
        and the result so far is kept aside as ``result.old-<k>.json``, with all that belongs to it.

        Args:
            config: the plain resolved configuration (``vlmlab.runs.config.plain``).
            overrides: the task overrides.
            fresh: move what is there aside to ``<name>.old-<k>`` and begin again.

        Returns:
            The result of a finished run of the same configuration, or None: train, or go on where it stopped.

        Raises:
            UserError: another process holds the folder, or it belongs to another training.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            if fresh and self.config() is not None:
                self._move_aside()
            old = self.config()
            changed = Changes() if old is None else changes(old, config)
            result = self.result()
            if refused := self._refused(changed, result):
                if not self._learnt_nothing():
                    raise UserError(self._refusal(refused))
                old = None
                for name in ("skipped.jsonl", "metrics.jsonl"):  # of data and stages that this run may not have
                    (self.path / name).unlink(missing_ok=True)
            if is_whole(result) and not changed.scoring:
                return result
            if old is not None and changed.scoring:
                self.keep_aside()
            self._begin(config, overrides, anew=old is None)
            return None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self) -> None:
        lock = FolderLock(self.path)
        lock.acquire()
        self._lock = lock

    def _move_aside(self) -> None:
        """Rename the folder (at once, so that no half of it can be taken for a run) and lock a new one."""
        k = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{k}")).exists():
            k += 1
        before = self._lock
        self.path.rename(aside)
        self.path.mkdir(parents=True)
        log = aside / "log.txt"
        if log.exists():  # a launcher may be writing this very process's output into it
            log.rename(self.path / "log.txt")
        self._acquire()
        if before is not None:
            before.release()

    def _refused(self, changed: Changes, result: Mapping[str, Any] | None) -> Sequence[str]:
        """Those changes of the configuration that what is in this folder cannot follow."""
        if changed.training:
            return changed.training
        if self.trained():
            return ()
        if result is not None:  # its weights have been deleted
            return changed.length + changed.evaluation
        return changed.execution or (changed.length if self._left_out() else ())

    def _left_out(self) -> bool:
        """Whether training has left out rows, some perhaps because of their length."""
        return any(str(row.get("data", "")).startswith("data.train.") for row in read_rows(self.path / "skipped.jsonl"))

    def _refusal(self, changed: Sequence[str]) -> str:
        remedy = "choose another name=..., or keep that one aside and train again with fresh=true"
        for shown in range(min(8, len(changed)), 0, -1):
            more = f"; and {len(changed) - shown} more" if len(changed) > shown else ""
            text = f"{self.path} holds a run of another configuration ({'; '.join(changed[:shown])}{more}); {remedy}"
            if len(text) <= LONGEST:
                break
        return text

    def _learnt_nothing(self) -> bool:
        """Whether a run has failed here with nothing to keep, or ended before its first step: its place is free."""
        failed = self.state().get("state") == "failed"
        stepped = not failed and any(row.get("step") for row in self.metrics())
        return not (stepped or self.learnt() or (self.path / "result.json").exists())

    def _begin(self, config: Mapping[str, Any], overrides: Sequence[str], anew: bool) -> None:
        before: dict[str, Any] = {} if anew else self.env()
        write_atomic(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        codes = [code for code in before.get("codes", []) if code != code_fingerprint()]
        facts = {"overrides": [str(override) for override in overrides], "codes": [*codes, code_fingerprint()]}
        training = {"training": before.get("training") or training_hash(config)}  # as it was when its files were made
        write_json(self.path / "env.json", before | environment() | training | facts)
        known: dict[str, Any] = {} if anew else self.state()
        self.write_state("running", known.get("stage"), known.get("step"))

    # -- reading -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any] | None:
        """The configuration this folder belongs to, by present names, or None where no run has begun.

        Raises:
            UserError: the file is there and cannot be read.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            return None
        try:
            value = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is damaged ({error}); delete the folder or choose another name=...") from error
        if not isinstance(value, dict):
            raise UserError(f"{file} is no configuration; delete the folder or choose another name=...")
        config: dict[str, Any] = with_present_names(value)
        return config

    def result(self) -> dict[str, Any] | None:
        """``result.json`` of a finished run, or None.

        Raises:
            UserError: it is of another format than this code writes.
        """
        result = read_json(self.path / "result.json")
        if result is not None and result.get("format") != FORMAT:
            raise UserError(
                f"{self.path / 'result.json'} has format {result.get('format')!r} and this code reads {FORMAT}; "
                "train again with fresh=true"
            )
        return result

    def learnt(self) -> bool:
        """Whether a training has left anything that it can go on from."""
        return any(any(self.path.glob(f"stages/*/{name}")) for name in ("model.safetensors", "last.ckpt"))

    def trained(self) -> bool:
        """Whether every stage of the recipe has left its weights."""
        recipe = (self.config() or {}).get("recipe")
        stages = recipe.get("stages") if isinstance(recipe, Mapping) else None
        files = [weights_file(self.path, index, str(name)) for index, name in enumerate(stages or ())]
        return bool(files) and all(file.is_file() for file in files)

    def differs(self, config: Mapping[str, Any]) -> Changes:
        """How a configuration differs from the one this folder belongs to."""
        return changes(self.config() or {}, config)

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a whole result of this configuration is there, on whatever machine it was made."""
        there = self.config()
        if there is None or not is_whole(self.result()):
            return False
        changed = changes(there, config)
        return not changed.training and not changed.scoring

    def finished(self) -> dict[str, Any]:
        """The configuration of a finished run.

        Raises:
            UserError: this is no folder of a run.
            CheckpointError: the run is not finished.
        """
        config = self.config()
        if config is None:
            raise UserError(
                f"{self.path} is no run folder (it has no config.yaml); give the folder that training printed"
            )
        if self.result() is None:
            raise CheckpointError(f"{self.path} is not finished (no result.json); start its training command again")
        return config

    def state(self) -> dict[str, Any]:
        """``state.json``, or an empty dict; ``running`` without a living process reads ``interrupted``."""
        state = read_json(self.path / "state.json") or {}
        if state.get("state") == "running" and self._lock is None and not is_locked(self.path):
            state["state"] = "interrupted"
        return state

    def env(self) -> dict[str, Any]:
        """``env.json``, or an empty dict."""
        return read_json(self.path / "env.json") or {}

    def by_other_code(self) -> bool:
        """Whether any part of this run was made by other code of the package than the present."""
        return self.env().get("codes", [code_fingerprint()]) != [code_fingerprint()]

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, oldest first."""
        return read_rows(self.path / "metrics.jsonl")

    # -- writing -------------------------------------------------------------------------------------------------

    def write_state(
        self,
        state: StateName,
        stage: str | None = None,
        step: int | None = None,
        steps: int | None = None,
        error: str | None = None,
    ) -> None:
        """Say how far the run is: its stage, optimizer step of `steps` in that stage, and why it failed."""
        where = {"stage": stage, "step": step, "steps": steps}
        who = {"pid": os.getpid(), "host": socket.gethostname()}
        write_json(self.path / "state.json", {"state": state, **where, **who, "error": error})

    def end(self, state: StateName, error: str | None = None) -> None:
        """Say how the run ended, keeping the stage and step it had reached; on a full disk over the state before."""
        known = self.state()
        try:
            self.write_state(state, known.get("stage"), known.get("step"), known.get("steps"), error)
        except OSError:
            write_over(self.path / "state.json", to_json(known | {"state": state, "error": error}))

    def update_env(self, **facts: Any) -> None:
        """Add facts to ``env.json`` (torch threads, the device's name, hashes of the source towers)."""
        write_json(self.path / "env.json", self.env() | facts)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``; it needs ``stage`` and ``step`` to be cut back after a crash."""
        append_line(self.path / "metrics.jsonl", to_json(dict(row)))

    def cut_back(self, stage: str, step: int) -> None:
        """Forget the rows of ``metrics.jsonl`` later than this step of this stage; a replay writes them again."""
        rows = self.metrics()
        first = next((i for i, row in enumerate(rows) if row.get("stage") == stage), len(rows))
        kept = rows[:first] + [r for r in rows[first:] if r.get("stage") == stage and int(r.get("step", 0)) <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(to_json(row) + "\n" for row in kept))

    def keep_aside(self) -> None:
        """Put a result, and what was made with it, beside itself: ``result.old-1.json``, ``predictions.old-1`` ..."""
        if not (self.path / "result.json").exists():
            return
        k = 1
        while (self.path / f"result.old-{k}.json").exists():
            k += 1
        shutil.copy2(self.path / "config.yaml", self.path / f"config.old-{k}.yaml")
        for name in ("result.json", "predictions", "cost.json", "report.html"):  # first what says that it is finished
            if (there := self.path / name).exists():
                there.rename(there.with_name(f"{there.stem}.old-{k}{there.suffix}"))

    def finish(
        self,
        metrics: Mapping[str, Any],
        cost: Mapping[str, Any],
        failed: Mapping[str, str] | None = None,
        recorded: str = "",
    ) -> dict[str, Any]:
        """Write ``result.json``, the last file of a run, at once and durably; return it.

        Args:
            metrics: every score.
            cost: what the run took.
            failed: benchmarks that could not be scored, and why; the same command tries these again.
            recorded: the record of cells that this result was taken from, where it was not made here.

        Raises:
            UserError: the folder has no configuration, or a number is none.
        """
        for name, value in {**metrics, **cost}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value} and no result; look at {self.path / 'metrics.jsonl'} for its loss")
        config = self.config()
        if config is None:
            raise UserError(f"{self.path} has no config.yaml and cannot be finished; train into another folder")
        result = {
            "format": FORMAT,
            "config_hash": config_hash(config),
            "overrides": self.env().get("overrides", []),
            "seed": config.get("seed"),
            "metrics": dict(metrics),
            "cost": dict(cost),
        }
        result |= ({"failed": dict(failed)} if failed else {}) | ({"recorded": recorded} if recorded else {})
        self.write_state("done")
        write_json(self.path / "result.json", result, durable=True)
        return result


def is_whole(result: Mapping[str, Any] | None) -> bool:
    """Whether the contents of a ``result.json`` have all that was to be scored."""
    return result is not None and not result.get("failed")


def weights_file(folder: Path, index: int, name: str) -> Path:
    """Where a run folder keeps the weights of a finished stage."""
    return folder / "stages" / f"{index}_{name}" / "model.safetensors"
