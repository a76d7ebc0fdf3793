"""What a user is told is one sentence of bounded length, whatever it names."""

from __future__ import annotations

import pickle

import pytest

from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import (
    LONGEST,
    CheckpointError,
    DataError,
    OutOfMemory,
    Unscored,
    UserError,
    listed,
    reason,
)

LONG = "/a/very/long/path" * 40


@pytest.mark.parametrize("kind", [UserError, DataError, CheckpointError, ConfigError])
def test_every_mistake_is_said_in_so_many_characters(kind: type[UserError]) -> None:
    told = str(
        kind(f"{LONG} has no column 'answer' ({', '.join(f'column {n}' for n in range(90))}); name the right one")
    )
    assert len(told) <= LONGEST and told.startswith("/a/very/long/path") and told.endswith("name the right one")
    assert str(kind("seed=x is wrong; give a number")) == "seed=x is wrong; give a number"
    assert str(pickle.loads(pickle.dumps(kind(told)))) == told


def test_so_are_those_made_of_others() -> None:
    unscored = Unscored({}, {LONG: LONG, "b": "why"})
    assert len(str(unscored)) <= LONGEST and unscored.failed[LONG] == LONG
    assert "and 1 more" in str(unscored) and str(unscored).endswith("tries only this again")
    assert len(str(UserError(f"{OutOfMemory('s' * 400, 1)}; {LONG}"))) <= LONGEST


def test_a_list_has_as_many_items_as_fit_and_says_how_many_more() -> None:
    names = [f"name{n}" for n in range(10)]
    assert listed(names[:3], 30) == "name0, name1, name2" and listed([]) == "none"
    assert listed(names, 29) == "name0, name1 and 8 more"
    assert listed(names, 29, "; ") == "name0; name1; and 8 more"
    assert listed(names, 5) == "name0 and 9 more"
    long = listed(["x" * 500, "y"], 100)
    assert len(long) <= 100 and long.endswith("x and 1 more")


def test_what_a_library_says_is_one_line() -> None:
    assert reason(ValueError("no\n such\tthing. ")) == "no such thing" and reason(KeyError()) == "KeyError"
    assert len(reason(OSError("word " * 200), 80)) <= 80
