"""The run folder: what may be reused, resumed or must be refused, and the files that say how far a run is."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from vlmlab.contracts.errors import LONGEST, CheckpointError, UserError, brief, listed
from vlmlab.runs.config import config_hash
from vlmlab.runs.environment import code_fingerprint, environment
from vlmlab.runs.files import (
    append,
    clear_unfinished,
    read_json,
    read_rows,
    read_yaml,
    refuse_links,
    to_json,
    write_atomic,
    write_json,
    write_over,
)
from vlmlab.runs.identity import Changes, changes, training_hash
from vlmlab.runs.lock import FolderLock, is_locked
from vlmlab.runs.names import FOLDERS, is_plain_name
from vlmlab.runs.renamed import with_present_names
from vlmlab.runs.withheld import KEY as WITHHELD
from vlmlab.runs.withheld import filled, marks

FORMAT = 1
"""Version of ``result.json``."""

BEST, BEST_FACTS = "best.safetensors", "best.json"
"""In a stage's folder, with ``evaluation.save_best``: the weights of its best look, and which one that was."""

CELL = "overrides.json"
"""What a launcher leaves in the folder of every cell of a sweep."""

NAMES = ("config.yaml", "result.json", "report.html", "metrics.jsonl", "predictions")
"""Of what a run leaves, these can lie in other people's folders as well."""

ENV: Mapping[str, type] = {
    **dict.fromkeys(("codes", "overrides"), list),
    **dict.fromkeys(("stages", "data", "packages", "carried", WITHHELD), dict),
}
"""Keys of ``env.json`` that are read, and what they are."""

StateName = Literal["running", "done", "failed", "interrupted"]


class RunFolder:
    """The files of one run. Making one touches nothing; ``open`` decides and locks, the other methods read or write.

    Any number of objects may refer to the same folder: one opens it, the others read and write in it.

    Attributes:
        path: the folder.
    """

    REMEDY = "put it back, or give the run's training command again, which writes it anew"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None

    # -- deciding ------------------------------------------------------------------------------------------------

    def open(
        self,
        config: Mapping[str, Any],
        overrides: Sequence[str] = (),
        fresh: bool = False,
        written: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Lock the folder for this configuration and say whether anything is left to do.

        A configuration that asks for another evaluation of the same training takes the folder over: the weights stay,
        and the result so far is kept aside as ``result.old-<k>.json``, with all that belongs to it.

        Args:
            config: the plain resolved configuration (``vlmlab.runs.config.plain``).
            overrides: the task overrides.
            fresh: move what is there aside to ``<name>.old-<k>`` and begin again.
            written: the configuration as it may be written down (``vlmlab.runs.withheld.stored``); None: as it is.

        Returns:
            The result of a finished run of the same configuration, or None: train, or go on where it stopped.

        Raises:
            UserError: another process holds the folder, it belongs to another training, or it holds something else.
        """
        written = config if written is None else written
        self.path.mkdir(parents=True, exist_ok=True)
        self._refuse_other_contents(fresh)
        self._acquire()
        try:
            refuse_links(self.path)
            clear_unfinished(self.path)
            if fresh and self.is_run():
                self._move_aside()
            old = self._mended(config, written)
            changed = Changes() if old is None else changes(self._filled(old, config), config)
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
            self._begin(config, written, overrides, anew=old is None)
            return None
        except BaseException:
            self.close()
            raise

    def refuses(self, config: Mapping[str, Any]) -> str | None:
        """Why `open` would refuse this configuration, whichever process holds the folder; None where it would not.

        Raises:
            UserError: the folder's own configuration or result cannot be read.
        """
        old = self.config()
        if old is None or self._cut(old, config):
            return None
        refused = self._refused(changes(self._filled(old, config), config), self.result())
        return self._refusal(refused) if refused and not self._learnt_nothing() else None

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

    def is_run(self) -> bool:
        """Whether a run has begun here: by its configuration, by ``env.json``, or by weights that it has left."""
        try:
            config = self.config() or {}
        except CheckpointError:
            config = {}
        return "recipe" in config or "codes" in (read_json(self.path / "env.json") or {}) or self.learnt()

    def _refuse_other_contents(self, fresh: bool) -> None:
        """Leave a folder alone that has files of a run's names and is none.

        Raises:
            UserError: naming the first.
        """
        if self.is_run():
            return
        there = next((name for name in NAMES if os.path.lexists(self.path / name)), None)
        if there is not None:
            raise UserError(
                f"{brief(str(self.path), 90)} has {there} and cannot be told to be a run's folder; choose another "
                "name=..., or put back what is damaged in it"
            )

    def _mended(self, config: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any] | None:
        """The configuration of what is here; one that is damaged or lost is written anew by the command it is of.

        Raises:
            CheckpointError: it is, and nothing says that it is this training's.
        """
        result, problem = self.result(), f"{brief(str(self.path / 'config.yaml'), 90)} is missing"
        try:
            there = self.config()
            if there is not None and self._cut(there, config):
                problem = f"{brief(str(self.path / 'config.yaml'), 90)} has lost keys"
            elif there is not None or result is None:
                return there  # without a result, every file of weights says which run it is of
        except CheckpointError as error:
            problem = error.args[0].partition(";")[0]
        same = result is not None and result.get("config_hash") == config_hash(written)
        if not same and self.env().get("training") != training_hash(config):
            raise CheckpointError(
                f"{problem}, and this is not the command it is of; put it back, choose another name=..., or keep the "
                "folder aside with fresh=true"
            )
        if not same:
            self.keep_aside()
        self._write_config(written)
        return dict(written)

    def _cut(self, there: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Whether ``config.yaml`` tells of another training than ``env.json``, and that one is this command's."""
        changed = changes(self._filled(there, config), config).training
        return bool(changed) and self.env().get("training") == training_hash(config)

    def _filled(self, old: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """The folder's configuration, with what it withholds where that is the same in this one."""
        known = self.env().get(WITHHELD)
        whole: dict[str, Any] = filled(old, config, known) if known else dict(old)
        return whole

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
        if (cell := aside / CELL).is_file():  # by which a launcher's table, and others, know the folder
            write_atomic(self.path / CELL, cell.read_text(encoding="utf-8", errors="replace"))
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
        begin = f"{brief(str(self.path), 100)} holds a run of another configuration"
        room = LONGEST - len(f"{begin} (); {remedy}")
        return f"{begin} ({listed(changed, room, '; ')}); {remedy}"

    def _learnt_nothing(self) -> bool:
        """Whether a run has failed here with nothing to keep, or ended before its first step: its place is free."""
        failed = self.state().get("state") == "failed"
        stepped = not failed and any(row.get("step") for row in self.metrics())
        return not (stepped or self.learnt() or (self.path / "result.json").exists())

    def _write_config(self, written: Mapping[str, Any]) -> None:
        write_atomic(self.path / "config.yaml", yaml.safe_dump(dict(written), sort_keys=False, allow_unicode=True))

    def _begin(
        self, config: Mapping[str, Any], written: Mapping[str, Any], overrides: Sequence[str], anew: bool
    ) -> None:
        before: dict[str, Any] = {} if anew else self.env()
        self._write_config(written)
        codes = [code for code in before.get("codes", []) if code != code_fingerprint()]
        facts = {"overrides": [str(override) for override in overrides], "codes": [*codes, code_fingerprint()]}
        training = {"training": before.get("training") or training_hash(config)}  # as it was when its files were made
        withheld = {WITHHELD: marked} if (marked := marks(written, config)) else {}
        write_json(self.path / "env.json", before | environment() | training | facts | withheld)
        known: dict[str, Any] = {} if anew else self.state()
        self.write_state("running", known.get("stage"), known.get("step"))

    # -- reading -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any] | None:
        """The configuration this folder belongs to, by present names, or None where no run has begun.

        Raises:
            CheckpointError: the file is there and cannot be read, or is not a configuration of plain values with names
                that stay in the folder.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            return None
        try:
            value = read_yaml(file)
            why = None if isinstance(value, dict) else "it is not a configuration"
            why = why or next(_wrong(value), None)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            why = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else str(error)
        if why is not None:
            raise CheckpointError(f"{brief(str(file), 120)} is damaged ({_clean(why)}); {self.REMEDY}")
        config: dict[str, Any] = with_present_names(value)
        return config

    def result(self) -> dict[str, Any] | None:
        """``result.json`` of a finished run, or None.

        Raises:
            UserError: it is of another format than this code writes.
        """
        result = read_json(self.path / "result.json")
        if result is None or not _is_result(result):  # damaged: it is made again from the weights
            return None
        if result.get("format") != FORMAT:
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
        return changes(self._filled(self.config() or {}, config), config)

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Whether a whole result of this configuration is there, on whatever machine it was made."""
        try:
            there = self.config()
        except CheckpointError:  # opening the folder says so
            return False
        if there is None or not is_whole(self.result()):
            return False
        changed = changes(self._filled(there, config), config)
        return not changed.training and not changed.scoring

    def finished(self) -> dict[str, Any]:
        """The configuration of a finished run.

        Raises:
            UserError: this is not a folder of a run.
            CheckpointError: the run is not finished.
        """
        config = self.config()
        if config is None:
            raise UserError(
                f"{self.path} is not a run folder (it has no config.yaml); give the folder that training printed"
            )
        if self.result() is None:
            there = "its result.json is damaged" if (self.path / "result.json").exists() else "no result.json"
            raise CheckpointError(f"{self.path} is not finished ({there}); start its training command again")
        return config

    def state(self) -> dict[str, Any]:
        """``state.json``, or an empty dict; ``running`` without a living process reads ``interrupted``."""
        state = read_json(self.path / "state.json") or {}
        if state.get("state") == "running" and self._lock is None and not is_locked(self.path):
            state["state"] = "interrupted"
        return state

    def env(self) -> dict[str, Any]:
        """``env.json``, or an empty dict where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        file = self.path / "env.json"
        found = read_json(file)
        if found is None and not os.path.lexists(file):
            return {}
        wrong = [key for key, kind in ENV.items() if not isinstance((found or {}).get(key, kind()), kind)]
        if found is None or wrong:
            which = f" (its {wrong[0]} is none)" if wrong else ""
            raise CheckpointError(
                f"{brief(str(file), 120)} is damaged{which}; delete it and give the same command: only what the run "
                "was made with is forgotten"
            )
        return found

    def by_other_code(self) -> bool:
        """Whether any part of this run was made by other code of the package than the present."""
        return self.env().get("codes", [code_fingerprint()]) != [code_fingerprint()]

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, oldest first."""
        return read_rows(self.path / "metrics.jsonl")

    def stage_facts(self, index: int, name: str) -> tuple[dict[str, Any], str]:
        """What training a finished stage took, and why that is not known from its ``stage.json``; empty: it is.

        ``metrics.jsonl`` says the same but for the memory, so that a damaged file costs no training.
        """
        file = weights_file(self.path, index, name).with_name("stage.json")
        facts = read_json(file)
        if facts is not None and all(_is_number(facts.get(key, 0)) for key in ("seconds", "peak_bytes")):
            return facts, ""
        rows = [row for row in self.metrics() if row.get("stage") == name and row.get("finished")]
        seconds = next((row["seconds"] for row in reversed(rows) if _is_number(row.get("seconds"))), None)
        what = "damaged" if os.path.lexists(file) else "missing"
        found = "metrics.jsonl has its seconds" if seconds is not None else "its seconds count as none"
        return {} if seconds is None else {"seconds": seconds}, f"{file} is {what}; {found}"

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
        append(self.path / "metrics.jsonl", to_json(dict(row)) + "\n")

    def cut_back(self, stage: str, step: int) -> None:
        """Forget the rows of ``metrics.jsonl`` later than this step of this stage; a replay writes them again."""
        rows = [row for row in self.metrics() if isinstance(row.get("step", 0), int)]
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
        if (config := self.path / "config.yaml").is_file():
            write_atomic(self.path / f"config.old-{k}.yaml", config.read_text(encoding="utf-8", errors="replace"))
        for name in ("result.json", "predictions", "cost.json", "report.html"):  # first what says that it is finished
            if (there := self.path / name).exists():
                there.rename(there.with_name(f"{there.stem}.old-{k}{there.suffix}"))

    def finish(
        self,
        metrics: Mapping[str, Any],
        cost: Mapping[str, Any],
        failed: Mapping[str, str] | None = None,
        recorded: str = "",
        notes: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Write ``result.json``, the last file of a run, at once and durably; return it.

        Args:
            metrics: every score.
            cost: what the run took.
            failed: benchmarks that could not be scored, and why; the same command tries these again.
            recorded: the record of cells that this result was taken from, where it was not made here.
            notes: what a reader of the scores should know, a sentence each.

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
        result |= {"notes": list(notes)} if notes else {}
        self.write_state("done")
        write_json(self.path / "result.json", result, durable=True)
        return result


def of_transformers(run: RunFolder) -> str | None:
    """What to do with a folder that is a model of transformers and no run, in one sentence; None where it is not."""
    if not (run.path / "config.json").is_file() or run.config() is not None:
        return None
    way = f"`vlmlab import path={run.path} to=<folder>` makes one of it"
    return f"{run.path} is a model of transformers and no run; {way}."


def _is_result(result: Mapping[str, Any]) -> bool:
    """Whether the contents of a ``result.json`` are what this code reads; of another format nothing is known."""
    if result.get("format") != FORMAT:
        return isinstance(result.get("format"), int)  # of other code; anything else is damaged
    others = all(isinstance(result.get(key, {}), Mapping) for key in ("cost", "failed"))
    return others and isinstance(result.get("metrics"), Mapping)


def _wrong(node: Any, where: str = "") -> Iterator[str]:
    """What a saved configuration of plain values cannot have: other types, missing values, names of other places."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{where}.{key}" if where else str(key)
        if not isinstance(key, str | int) or not isinstance(value, dict | list | str | bool | int | float | None):
            yield f"{here} is a {type(value).__name__}"
        elif value == "???":
            yield f"{here} has no value"
        elif where in FOLDERS and not is_plain_name(str(key)):
            yield f"{here} cannot name a {FOLDERS[where]}"
        yield from _wrong(value, here)
    if where in ("recipe", "recipe.stages", "data", "data.benchmarks") and not isinstance(node, dict | None):
        yield f"{where} is a {type(node).__name__}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _clean(why: str) -> str:
    return brief(" ".join(why.split()), 80)


def is_whole(result: Mapping[str, Any] | None) -> bool:
    """Whether the contents of a ``result.json`` have all that was to be scored."""
    return result is not None and not result.get("failed")


def weights_file(folder: Path, index: int, name: str) -> Path:
    """Where a run folder keeps the weights of a finished stage."""
    return folder / "stages" / f"{index}_{name}" / "model.safetensors"
