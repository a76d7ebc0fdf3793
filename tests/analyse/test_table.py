"""The final table of a run."""

from __future__ import annotations

from types import ModuleType

from vlmlab.analyse.table import benchmark_tables, final_table


def test_tables_put_levels_beside_the_accuracy_they_belong_to(cells: ModuleType) -> None:
    quiz, tales = benchmark_tables(cells.metrics(0.9, 0.8))
    assert (quiz.name, quiz.count, quiz.columns) == (
        "quiz", 40, ("score", "value", "shuffled", "no_image", "lookup", "chance", "normalised", "over"),
    )  # fmt: skip
    rows = dict(quiz.rows)
    assert list(rows) == ["vqa_accuracy", "  count", "  new (7)"]  # kinds, then groups with their numbers
    assert rows["vqa_accuracy"] == (0.9, 0.3, 0.25, 0.4, 0.28, (0.9 - 0.4) / 0.6, "lookup")
    assert (rows["  count"][:5], rows["  count"][-1]) == ((0.8, 0.2, None, None, 0.2), "chance")
    assert rows["  new (7)"] == (0.5, 0.1, None, None, None, 0.4 / 0.9, "shuffled")
    assert (tales.count, tales.columns) == (10, ("score", "value", "shuffled", "leave_one_out", "human", "of human"))
    assert tales.rows == [("cider_d", (0.8, 0.1, 0.75 * 0.8, 1.0, 0.75 * 0.8))]


def test_a_ceiling_is_compared_with_over_as_many_references_or_not_at_all() -> None:
    (tales,) = benchmark_tables({"tales/cider_d": 0.8, "tales/grammar/cider_d": 2.0})
    assert (tales.columns, tales.rows) == (("score", "value", "grammar"), [("cider_d", (0.8, 2.0))])
    (tales,) = benchmark_tables({"t/cider_d": 0.8, "t/cider_d/leave_one_out": 0.6, "t/grammar/cider_d": 2.0})
    assert tales.rows == [("cider_d", (0.8, 0.6, 2.0, 0.3))] and tales.columns[-1] == "of grammar"


def test_final_table(cells: ModuleType) -> None:
    text = final_table(cells.result(0.9))
    assert max(map(len, text.splitlines())) <= 120
    lines = text.splitlines()
    assert lines[0] == "quiz (40 items)"
    assert "  vqa_accuracy  0.900     0.300     0.250   0.400   0.280       0.833    lookup" in lines
    assert "    count       0.800     0.200                     0.200       0.750    chance" in lines
    assert "    new (7)     0.500     0.100                                 0.444  shuffled" in lines
    assert lines[-1] == "cost  seconds 12.5, params 1.5M, visual_tokens 16"


def test_final_table_of_an_empty_result() -> None:
    assert final_table({}).strip() == "no metrics"


def test_unknown_scores_are_rows() -> None:
    (table,) = benchmark_tables({"held_out/loss": 1.5, "held_out/loss/shuffled": 2.0, "held_out/loss/no_image": 2.5})
    assert table.columns == ("score", "value", "shuffled", "no_image")
    assert table.rows == [("loss", (1.5, 2.0, 2.5))]
