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
# # Masks, and what a trained model attends to
#
# A mask is a function `(Layout, q) -> (B, Q, S) bool`: who may look at whom. Below, every choice of `conf/mask` on
# one conversation, three pictures in its first turn and one in its second; then the attention of a trained run on its
# picture.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.patches import Rectangle

import vlmlab
from vlmlab.cli.conf import conf_folder
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Kind, Layout, Role
from vlmlab.data.world.sources import WorldInterleaved, WorldQuestions
from vlmlab.model.build import build_collator, build_model

RUN = Path("../outputs/demo")  # python train.py name=demo

# %% [markdown]
# ## The masks
#
# Rows look at columns. Along both axes: visual tokens violet, the user's words blue, answers green, the rest grey.
# Red frames: what a mask opens beyond causal. The leak rule allows that only where no answer token lies between the
# two, since in generation such a token would not be there yet; `visual_rows_open` breaks it on purpose and is refused
# for training.

# %%
with initialize_config_dir(str(conf_folder()), version_base="1.3"):
    cfg = compose("train", ["connector=pool", "connector.side=2"])  # four tokens a picture: a mask one can read
    masks = {path.stem: instantiate(compose("train", [f"mask={path.stem}"]).mask)
             for path in sorted((conf_folder() / "mask").glob("*.yaml"))}  # fmt: skip
model = build_model(cfg).eval()
pair, one = WorldInterleaved(split="test", size=1)[0], WorldQuestions(split="test", size=1, multi_turn=False)[0]
turns = (pair.turns[0], Turn(f"<image> {one.turns[0].prompt}", one.turns[0].answer))
batch = build_collator(cfg, model, "chat")([Sample("two turns", pair.images + one.images, turns)])
layout = batch.layout
q = torch.arange(layout.kind.shape[1])
causal = q[:, None] >= q


def colours(layout: Layout) -> list[str]:
    """One colour a position: what stands there."""
    kinds, roles = layout.kind[0].tolist(), layout.role[0].tolist()
    by_role = {Role.SYSTEM: "#bbbbbb", Role.USER: "#1f6fb4", Role.ANSWER: "#1a7f37"}
    return ["#8250df" if kind == Kind.VISUAL else by_role[Role(role)] for kind, role in zip(kinds, roles, strict=True)]


figure, axes = plt.subplots(2, 4, figsize=(13, 7), layout="constrained")
for axis, (name, mask) in zip(axes.flat, masks.items(), strict=True):
    allowed = mask(layout, q)[0]  # (S, S)
    axis.imshow(~allowed, cmap="gray", vmin=0, vmax=1.6, interpolation="nearest")
    for row, column in (allowed & ~causal).nonzero().tolist():
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d1495b", linewidth=0.6))
    for place, colour in enumerate(colours(layout)):
        axis.add_patch(Rectangle((place - 0.5, -4), 1, 2.5, color=colour, clip_on=False))
        axis.add_patch(Rectangle((-4, place - 0.5), 2.5, 1, color=colour, clip_on=False))
    opened, closed = int((allowed & ~causal).sum()), int((causal & ~allowed).sum())
    axis.set_title(f"{name}\nopens {opened}, closes {closed}", fontsize=9, pad=18)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## What the answer attends to
#
# Attention weights of a trained run, from the position that predicts the first word of the answer. Weights are not
# explanations: much of the mass goes to positions that every token attends to (sinks), and what a visual token
# carries has already been mixed by the tower. What stands below is where the model *may* have got its answer from.

# %%
run = vlmlab.load(RUN)
lm, collate = run.model.lm, build_collator(run.config, run.model, "chat")
questions = WorldQuestions(split="test", size=700, multi_turn=False, kinds=["position", "attribute"])
asked = [questions[i] for i in range(4)]


@torch.no_grad()
def attention(sample: Sample) -> tuple[torch.Tensor, Layout]:
    """(layers, heads, S): weights of the last position of the prompt, under the run's own mask."""
    batch = collate.ask([sample])
    embeds = run.model.embed(batch)
    places = torch.arange(embeds.shape[1])
    allowed = run.model.mask(batch.layout, places)
    closed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    used = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")  # the fused kernels do not return weights
    out = lm.model.base_model(
        inputs_embeds=embeds,
        attention_mask=closed[:, None],
        position_ids=batch.layout.position,
        output_attentions=True,
        use_cache=False,
    )
    lm.model.set_attn_implementation(used)
    return torch.stack(out.attentions)[:, 0, :, -1], batch.layout


weights, layout = attention(asked[0])
assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)

# %%
figure, axes = plt.subplots(len(asked), len(weights) + 1, figsize=(2.1 * (len(weights) + 1), 2.5 * len(asked)))
for row, sample in zip(axes, asked, strict=True):
    weights, layout = attention(sample)
    seen = weights[:, :, layout.visual[0]].mean(1)  # (layers, M), mean over heads
    side = round(seen.shape[1] ** 0.5)
    assert side * side == seen.shape[1], "this connector's tokens are no grid; show seen as bars instead"
    turn = sample.turns[0]
    row[0].imshow(sample.images[0], interpolation="nearest")
    row[0].set_title(f"{turn.prompt}\n{run.generate(sample.images[0], turn.prompt)} (right: {turn.answer})", fontsize=7)
    for layer, (axis, grid) in enumerate(zip(row[1:], seen.reshape(-1, side, side), strict=True)):
        axis.imshow(sample.images[0], interpolation="nearest", extent=(0, 1, 1, 0))
        axis.imshow(grid, cmap="inferno", alpha=0.65, extent=(0, 1, 1, 0), vmin=0)
        axis.set_title(f"layer {layer}: {seen[layer].sum():.2f} on the image", fontsize=7)
    for axis in row:
        axis.set_axis_off()
plt.tight_layout()
plt.show()

# %% [markdown]
# The share of the weight that falls on the image, by layer and head: a head near zero everywhere never looks.

# %%
shares = torch.stack([(w := attention(s))[0][:, :, w[1].visual[0]].sum(-1) for s in asked]).mean(0)  # (layers, heads)
plt.figure(figsize=(4, 3.2))
plt.imshow(shares, cmap="viridis", vmin=0)
plt.xlabel("head")
plt.ylabel("layer")
plt.colorbar(label="weight on the image")
plt.show()
