# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading an ablation
#
# From the results of a sweep to what may be said of them: scores with intervals over seeds, beside shuffled images and
# the lookup; what is paired by seed; what it cost; how it was learnt; where two compositions disagree. Nothing here
# trains or loads a model.
#
# `SOURCE` is any of three things: the folder of a sweep (`sweeps/<name>`), a committed record (`cells.csv`, as here),
# or an export of W&B's runs. The environment's `RESULTS` sets another one.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

from vlmlab.analyse.combination import combinations
from vlmlab.analyse.compare import compare, reach, row_band
from vlmlab.analyse.pareto import front
from vlmlab.analyse.read import read_results, reader_of
from vlmlab.analyse.results import MetricKey
from vlmlab.analyse.stats import paired_difference
from vlmlab.analyse.sweep import main_metrics
from vlmlab.analyse.text import plain_table
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.evaluate.metrics.vqa import VqaAccuracy

SOURCE = Path(os.environ.get("RESULTS", "../experiments/connector_vs_mask/cells.csv"))

# %%
records = read_results(SOURCE)
assert any(record.done for record in records), f"{SOURCE.resolve()} has no finished cell; train some of them first"
rows = [row for row in combinations(records) if row.finished]
scores = main_metrics(records)
score = "world_test/vqa_accuracy" if "world_test/vqa_accuracy" in scores else scores[0]
benchmark = MetricKey.parse(score).benchmark
print(f"{len(records)} cells, {sum(record.done for record in records)} finished; the score is {score}")
for record in records:
    if not record.done:
        print(f"  {record.state}: {record.folder.name} {record.reason}")

# %% [markdown]
# ## Scores
#
# The last two columns are the score minus the same model's score with wrong images, and minus the lookup (the commonest
# training answer to the same words), paired by seed. Where an interval holds zero, the model has not been shown to use
# the picture, or to know more than the words of the question tell, whatever its score is.


# %%
def above(row, floor):
    """How much higher a composition scores than one of its floors."""
    pair = paired_difference(row.by_seed(score), row.by_seed(f"{score}/{floor}"))
    return pair.difference if pair else None


floors = ["shuffled", "lookup"]
titles = [*rows[0].values, "n", "score", *floors, "chance", *(f"- {floor}" for floor in floors)]
beside = [score, *(f"{score}/{floor}" for floor in floors), f"{benchmark}/chance"]
cells = [[*row.values.values(), str(len(row.finished)), *(str(row.interval(name) or "-") for name in beside),
          *(str(above(row, floor) or "-") for floor in floors)] for row in rows]  # fmt: skip
print("\n".join(plain_table(titles, cells, keys=len(rows[0].values))))

# %% [markdown]
# ## By kind of question
#
# Normalised: 0 is the highest floor of that kind (chance, wrong images, none, the lookup), 1 is all right. A mean over
# kinds can hide that one was never learnt.

# %%
keys = [MetricKey.parse(name) for record in records for name in record.metrics]
normalised = [key for key in keys if (key.benchmark, key.score, key.baseline) == (benchmark, "normalised", "")]
kinds = sorted({key.kind for key in normalised if key.kind})
values = [[row.interval(f"{benchmark}/normalised/kind/{kind}") for kind in kinds] for row in rows]
figure, axis = plt.subplots(figsize=(1.2 * len(kinds) + 2, 0.5 * len(rows) + 1.4), layout="constrained")
means = [[float("nan") if value is None else value.mean for value in line] for line in values]
axis.imshow(means, cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
for y, line in enumerate(values):
    for x, value in enumerate(line):
        axis.text(x, y, str(value or "-"), ha="center", va="center", fontsize=8)
axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
axis.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
axis.set_title(f"{benchmark}, normalised", fontsize=9, loc="left")
plt.show()

# %% [markdown]
# ## Differences, paired by seed
#
# Against the first row, with the sign-flip test corrected by Holm. The table says first whether anything can be
# significant with so many seeds at all. `vlmlab compare` takes any baseline, and covers other questions too.

# %%
compared = compare(rows, rows[0], score, single_answers=False) if len(rows) > 1 else []
for one in compared:
    print(one.sentence(rows[0].label))
if (sentence := reach(compared)) is not None:
    print(f"\n{sentence}")
figure, axis = plt.subplots(figsize=(7, 0.5 * len(compared) + 1.2), layout="constrained")
for y, one in enumerate(compared):
    if one.difference is not None:
        axis.errorbar(one.difference.mean, y, xerr=one.difference.half or 0, fmt="o", capsize=3, color="#4C78A8")
axis.axvline(0, color="#777777", linewidth=1)
axis.set_yticks(range(len(compared)), [one.row.label for one in compared], fontsize=8)
axis.set_ylim(len(compared) - 0.4, -0.6)
axis.set_title(f"{score} minus {rows[0].label}, 95 % over seeds", fontsize=9, loc="left")
plt.show()

# %% [markdown]
# ## Score against cost
#
# The line goes through what no other composition beats at the same cost or less, by the means; where intervals overlap,
# another seed may draw it otherwise. A W&B export has no costs.

# %%
COSTS = {"seconds": "training, s", "trainable": "trainable parameters", "flops_sample": "FLOPs a sample"}
figure, axes = plt.subplots(1, len(COSTS), figsize=(12, 3.4), layout="constrained", sharey=True)
for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
    points = [(row, row.cost(cost), row.interval(score)) for row in rows]
    points = [point for point in points if point[1] is not None and point[2] is not None]
    for row, spent, interval in points:
        axis.errorbar(spent, interval.mean, yerr=interval.half or 0, fmt="o", capsize=3, label=row.label)
    best = front([spent for _, spent, _ in points], [interval.mean for *_, interval in points])
    axis.plot([points[i][1] for i in best], [points[i][2].mean for i in best], color="#777777", linewidth=1, zorder=0)
    axis.set_xlabel(label)
axes[0].set_ylabel(score)
axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
plt.show()

# %% [markdown]
# ## How it got there
#
# Mean over seeds and its interval: of what cells looked at while they trained (`evaluation.every`, kept in `looks.csv`
# beside a record), or else of the training loss, which only a sweep's folder has.

# %%
read = reader_of(SOURCE)
shown = next((name for name in ("held_out/gap", "loss") if any(row_band(row, name, read) for row in rows)), None)
if shown is None:
    print("no curves: these results were not looked at while they were trained")
else:
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for row in rows:
        band = row_band(row, shown, read)
        (line,) = axis.plot([step for step, _ in band], [mean.mean for _, mean in band], label=row.label, linewidth=1)
        known = [(step, mean) for step, mean in band if mean.half is not None]
        lows, highs = [mean.low for _, mean in known], [mean.high for _, mean in known]
        axis.fill_between([step for step, _ in known], lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("optimizer steps, over all stages")
    axis.set_ylabel(shown)
    axis.legend(fontsize=8, frameon=False)
    plt.show()

# %% [markdown]
# ## Where two compositions disagree
#
# A sweep's folder keeps every answer, so the questions that one composition gets right and the other wrong can be read.
# Compare the counts in both directions before you make a story of the examples. A record has no single answers.

# %%
metric = VqaAccuracy()


def right(row) -> dict:
    """The answers of a composition's first finished cell, by sample and turn, and which of them are right."""
    answers = read_rows(predictions_file(row.finished[0].folder, benchmark))
    return {(answer.id, answer.turn): (answer, metric.score(answer) > 0.5) for answer in answers}


best, *others = sorted(rows, key=lambda row: -row.interval(score).mean)
answered = [row for row in (best, *others) if predictions_file(row.finished[0].folder, benchmark).is_file()]
if len(answered) < 2:
    print("no single answers here; give the folder of a sweep")
for other in answered[1:2]:
    mine, theirs = right(answered[0]), right(other)
    common = [key for key in mine if key in theirs]
    won = [key for key in common if mine[key][1] and not theirs[key][1]]
    lost = [key for key in common if theirs[key][1] and not mine[key][1]]
    print(f"{answered[0].label} right and {other.label} wrong: {len(won)} of {len(common)}; the reverse: {len(lost)}")
    for key in won[:5]:
        answer = mine[key][0]
        print(f"  {answer.kind:11} {answer.prompt}\n    {answer.prediction!r} against {theirs[key][0].prediction!r}")
