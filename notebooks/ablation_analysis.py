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
# From a sweep's folder to what may be said of it: scores with intervals over seeds, beside shuffled images and
# chance; what is paired by seed; what it cost; where two compositions disagree. Nothing here trains or loads a model.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt

from vlmlab.analyse.results import MetricKey, read_sweep
from vlmlab.analyse.stats import paired_difference
from vlmlab.analyse.sweep import combinations, main_metrics
from vlmlab.analyse.text import plain_table
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.evaluate.metrics.vqa import VqaAccuracy

SWEEP = Path("../sweeps/connector_mask")
# python train.py -m name=connector_mask connector=mlp,qformer mask=bidir,causal seed=0,1,2

# %%
records = read_sweep(SWEEP)
assert any(record.done for record in records), f"{SWEEP.resolve()} has no finished cell; run the sweep above first"
rows = [row for row in combinations(records) if row.finished]
score = main_metrics(records)[0]
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
# Against the first row. Below six common seeds nothing is called a difference: the interval is printed, and no
# verdict. `vlmlab compare` takes any baseline, corrects for several comparisons, and covers other questions too.

# %%
lines = []
for row in rows[1:]:
    pair = paired_difference(row.by_seed(score), rows[0].by_seed(score))
    lines.append([row.label, str(pair.difference) if pair else "-", pair.verdict() if pair else "no common seed"])
print("\n".join(plain_table([f"minus {rows[0].label}", "difference", "verdict"], lines)) if lines else "one row only")

# %% [markdown]
# ## What it cost

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for axis, (cost, label) in zip(
    axes, {"seconds": "training, s", "trainable": "trainable parameters"}.items(), strict=True
):
    for row in rows:
        interval, spent = row.interval(score), row.cost(cost)
        if interval is not None and spent is not None:
            axis.errorbar(spent, interval.mean, yerr=interval.half or 0, fmt="o", capsize=3, label=row.label)
    axis.set_xlabel(label)
axes[0].set_ylabel(score)
axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
plt.show()

# %% [markdown]
# ## How it got there
#
# The loss of the first seed of every composition, over all its stages.

# %%
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
for row in rows:
    text = (row.finished[0].folder / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, text) if "loss" in entry]
    axis.plot(losses, label=row.label, linewidth=1)
axis.set_xlabel("logged steps, all stages in a row")
axis.set_ylabel("loss")
axis.legend(fontsize=8, frameon=False)
plt.show()

# %% [markdown]
# ## Where two compositions disagree
#
# Every answer is kept, so the questions that one gets right and the other wrong can be read. Compare the counts in
# both directions before you make a story of the examples.

# %%
metric = VqaAccuracy()


def right(row) -> dict:
    """The answers of a composition's first finished cell, by sample and turn, and which of them are right."""
    answers = read_rows(predictions_file(row.finished[0].folder, benchmark))
    return {(answer.id, answer.turn): (answer, metric.score(answer) > 0.5) for answer in answers}


best, *others = sorted(rows, key=lambda row: -row.interval(score).mean)
for other in others[:1]:
    mine, theirs = right(best), right(other)
    common = [key for key in mine if key in theirs]
    won = [key for key in common if mine[key][1] and not theirs[key][1]]
    lost = [key for key in common if theirs[key][1] and not mine[key][1]]
    print(
        f"{best.label} right and {other.label} wrong: {len(won)} of {len(common)}; the other way round: {len(lost)}\n"
    )
    for key in won[:5]:
        answer = mine[key][0]
        print(f"  {answer.kind:11} {answer.prompt}\n    {answer.prediction!r} against {theirs[key][0].prediction!r}")
