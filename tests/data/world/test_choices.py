"""Every choice of data that is made of the embedded world: its keys are possible and its sources give samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hydra.utils import instantiate
from tests.test_conf import CONF, composed

from vlmlab.cli.rules.values import wrong_values
from vlmlab.evaluate.metrics.boxes import BoxAccuracy
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.runs.config import plain
from vlmlab.runs.identity import changes

CHOICES = sorted(path.stem for path in (CONF / "data").glob("world*.yaml") if "\npath: ???" not in path.read_text())


def splits(node: Any) -> Iterator[str]:
    """Every ``split`` in the configuration of a source, but for that of examples."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key != "pool":
                yield from [value] if key == "split" else splits(value)
    for inner in node if isinstance(node, list) else ():
        yield from splits(inner)


@pytest.mark.parametrize("choice", CHOICES)
def test_sources_of_a_choice_give_samples_of_their_split(choice: str) -> None:
    cfg = composed(f"data={choice}")
    config = plain(cfg)
    assert not list(wrong_values(cfg, config, {"data": choice}, None))
    data = config["data"]
    assert set(splits(data["train"])) == {"train"} and set(splits(data["val"])) <= {"val"}
    assert set(splits([b["source"] for b in data["benchmarks"].values()])) <= {"test", "compositional"}
    asked = [b.source for b in cfg.data.benchmarks.values()]
    for node in (*(cfg.data.train[name] for name in cfg.data.train), *cfg.data.val.values(), *asked):
        sample = instantiate(node)[1]
        assert sample.turns[-1].answer and len(sample.image_ids) == len(sample.images)


def test_tasks_are_mixed_by_the_square_root_of_their_sizes() -> None:
    """InstructBLIP's shares, exactly to one sample; what is held out is never asked."""
    cfg = composed("data=world_mix")
    mixed = instantiate(cfg.data.train.instruct)
    roots = [size**0.5 for size in cfg.data.sizes.values()]
    counts = Counter(mixed._source.tolist())
    assert [counts[k] for k in range(len(roots))] == pytest.approx([len(mixed) * r / sum(roots) for r in roots], abs=1)
    kinds = {turn.kind for index in range(200) for turn in mixed.turns(index)}
    assert not kinds & set(cfg.data.held_out) and len(kinds) == 7
    held = instantiate(cfg.data.benchmarks.world_held_out.source)
    assert {held.turns(index)[0].kind for index in range(4)} == set(cfg.data.held_out)


@pytest.mark.parametrize("choice", ["world_boxes", "world_identifiers"])
def test_right_boxes_are_right_by_the_metric_of_the_choice(choice: str) -> None:
    benchmark = composed(f"data={choice}", "data.boxes=paligemma").data.benchmarks.world_refer
    source, metric = instantiate(benchmark.source), instantiate(benchmark.metrics[0])
    assert isinstance(metric, BoxAccuracy)
    for index in range(5):
        (turn,) = source.turns(index)
        metric.update(Row("world_refer", str(index), 0, turn.kind, turn.prompt, turn.answer, (turn.answer,)))
    assert metric.predicted() == {"iou_accuracy": 1.0, "iou": 1.0, "readable": 1.0}


def test_another_number_of_examples_is_another_scoring_of_the_same_training() -> None:
    four, two = (plain(composed("data=world_few_shot", f"data.shots={shots}")) for shots in (4, 2))
    found = changes(four, two)
    assert not found.training and found.scoring
