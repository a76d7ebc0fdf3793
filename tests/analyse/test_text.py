"""Tables keep their width and their key columns."""

from __future__ import annotations

import pytest

from vlmlab.analyse.text import markdown_table, plain_table, short_number


def test_alignment_and_two_line_header() -> None:
    assert plain_table(["key", "set\nscore"], [["a", "0.5"], ["bcde", "10.25"]]) == [
        "        set",
        "key   score",
        "----  -----",
        "a       0.5",
        "bcde  10.25",
    ]


def test_wide_tables_are_continued_with_their_keys() -> None:
    header = ["connector", "mask", *(f"column {i}" for i in range(30))]
    lines = plain_table(header, [["mlp", "bidir", *(str(i) for i in range(30))]], keys=2)
    assert max(map(len, lines)) <= 120
    assert (
        sum(line.startswith("connector  mask ") for line in lines) == sum(line.startswith("mlp ") for line in lines) > 1
    )
    values = [word for line in lines if line.startswith("mlp") for word in line.split()[2:]]
    assert values == [str(i) for i in range(30)]


def test_long_names_make_room_at_eighty_columns() -> None:
    header = ["stages.align.train.connector", "data", "set\na_long_score_name"]
    lines = plain_table(header, [["x" * 50, "y" * 50, "0.5"]], keys=2, width=80)
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["stages.align.train.connector", "data", "a_long_score_name"]
    assert lines[3].split()[-1] == "0.5" and lines[3].startswith("x" * 27)


def test_markdown_escapes_its_bars() -> None:
    assert markdown_table(["a", "set\nb"], [["x|y", "1"]]) == ["| a | set b |", "|---|---|", "| x\\|y | 1 |"]


def test_long_cells_are_cut() -> None:
    lines = plain_table(["k"], [["x" * 100]])
    assert lines[-1] == "x" * 39 + "\N{HORIZONTAL ELLIPSIS}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (16, "16"), (412.34, "412"), (0.0123, "0.0123"), (9999, "9999"), (98304, "98.3k"), (1234567, "1.23M"),
     (3.2e9, "3.2G"), (-12345, "-12.3k"), (2e15, "2000T")],
)  # fmt: skip
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text
