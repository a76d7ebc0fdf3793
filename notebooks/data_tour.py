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
# # A tour of the embedded world
#
# What the shipped towers and the demo are trained on: generated scenes, captions in two styles, questions whose
# answers are balanced so that a model that does not look is at a known chance level. Nothing is downloaded; every
# sample is made when it is asked for, and is the same on every machine.

# %%
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill

import matplotlib.pyplot as plt
from hydra import compose, initialize_config_dir
from IPython.display import HTML

from vlmlab.cli.conf import conf_folder
from vlmlab.contracts.sample import Sample
from vlmlab.data.world.sources import LooseCaptions, WorldCaptions, WorldInstruct, WorldInterleaved, WorldQuestions
from vlmlab.inspect.inspection import inspect_stage, write_page
from vlmlab.recipe.stage import parse


def show(samples: list[Sample], titles: list[str]) -> None:
    """The images of some samples in a row, each under its words."""
    pairs = [(image, title) for sample, title in zip(samples, titles, strict=True) for image in sample.images]
    _, axes = plt.subplots(1, len(pairs), figsize=(2.3 * len(pairs), 3.1), squeeze=False, layout="constrained")
    for axis, (image, title) in zip(axes[0], pairs, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title("\n".join(fill(line, 27) for line in title.split("\n")), fontsize=8)
        axis.set_axis_off()
    plt.show()


# %% [markdown]
# ## Two ways to tell a scene
#
# Five short references, uneven as people write them, and one dense re-caption that leaves nothing out. Each is asked
# for by prompts of its own, so that one model can learn both.

# %%
short = WorldCaptions(style="short", split="test", size=4)
dense = WorldCaptions(style="dense", split="test", size=4)
show([short[i] for i in range(4)], [short[i].turns[0].answer for i in range(4)])
for i in range(2):
    print(f"asked:  {short[i].turns[0].prompt}")
    for reference in short[i].turns[0].references:
        print(f"        {reference}")
    print(f"asked:  {dense[i].turns[0].prompt}\n        {dense[i].turns[0].answer}\n")

# %% [markdown]
# ## Seven kinds of questions
#
# In a benchmark a sample is one question, and the answer is drawn before the scene. `chance` is the accuracy of the
# best answer that never looks; scores are reported per kind beside it.

# %%
questions = WorldQuestions(split="test", size=1400, multi_turn=False)
samples = [questions[i] for i in range(len(questions))]
by_kind = defaultdict(list)
for sample in samples:
    by_kind[sample.turns[0].kind].append(sample)
firsts = [of_kind[0] for of_kind in by_kind.values()]
show(firsts, [f"{s.turns[0].kind}\n{s.turns[0].prompt}\n{s.turns[0].answer}" for s in firsts])

# %%
print(f"{'kind':12} {'chance':>7} {'commonest':>10}  answers")
for kind, of_kind in by_kind.items():
    answers = Counter(sample.turns[0].answer for sample in of_kind)
    chance = sum(sample.turns[0].chance for sample in of_kind) / len(of_kind)
    common = ", ".join(f"{answer} {count}" for answer, count in answers.most_common(6))
    print(f"{kind:12} {chance:7.3f} {answers.most_common(1)[0][1] / len(of_kind):10.3f}  {common}")

# %% [markdown]
# In training a sample is a conversation of six to eight questions about one image: one pass through the vision tower
# teaches many answers.

# %%
talk = WorldInstruct(split="train", size=1, caption_fraction=0.0)[0]
show([talk], [talk.id])
for turn in talk.turns:
    print(f"{turn.kind:12} {turn.prompt}  ->  {turn.answer}")

# %% [markdown]
# ## Other splits and domains
#
# `compositional` holds pairs of colour and shape that no training scene has. `domain="shifted"` has another palette,
# other textures and other words; it stands for a transfer. Interleaved samples have several images in one prompt.
# Loose shapes, of any size at any place, taught the vision tower what the grid does not.

# %%
held_out = WorldQuestions(split="compositional", size=2, multi_turn=False)
shifted = WorldQuestions(split="test", size=2, multi_turn=False, domain="shifted")
others = [held_out[0], held_out[1], shifted[0], shifted[1], LooseCaptions(split="val", size=1)[0]]
names = ["compositional", "compositional", "shifted", "shifted", "loose"]
asked = [f"{name}\n{s.turns[0].prompt}\n{s.turns[0].answer}" for name, s in zip(names, others, strict=True)]
show(others, [*asked[:-1], "loose"])
several = WorldInterleaved(split="test", size=1)[0]
show([several], [f"the answer: {several.turns[0].answer}"])
print(several.turns[0].prompt)

# %% [markdown]
# ## What the model will see
#
# The page of `vlmlab inspect`, which shows any data set, yours too, exactly as a stage's model gets it: every token
# coloured by role, what is learnt underlined. In a conversation these are the answers and their end tokens, and nothing
# else.

# %%
with initialize_config_dir(str(conf_folder()), version_base="1.3"):
    cfg = compose("train")
with TemporaryDirectory() as folder:
    page = write_page(inspect_stage(cfg, parse(cfg)[-1], n=1, check=1), Path(folder) / "page.html").read_text()
HTML(f'<iframe srcdoc="{escape(page)}" width="100%" height="600"></iframe>')
