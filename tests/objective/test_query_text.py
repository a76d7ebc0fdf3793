"""BLIP-2's masks and losses: by definition, by loops, and against transformers' image-text retrieval model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.connector.features import visual
from tests.tiny import CONF, ONE_TURN, SECOND_TURN, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator, spread, vlm, worst
from torch import Tensor
from torch.nn import functional as F
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

from vlmlab.connector.mlp import MlpConnector
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.connector.query_transformer import sight_mask
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.engine.weights import StagedModel
from vlmlab.model.vlm import VLM
from vlmlab.objective.query_text import QueryTextAlignment
from vlmlab.recipe.stage import Stage

SIGHTS = ("apart", "together", "causal")
IDS = torch.tensor([[7, 8, 9, -1], [9, 8, 7, 6], [5, -1, -1, -1]])


def qformer() -> QFormerConnector:
    return spread(
        QFormerConnector(32, 32, queries=3, hidden=16, layers=3, heads=2, cross_every=2, text=True, vocab_size=400),
        seed=3,
        scale=0.3,
    )


def built(**factors: Any) -> tuple[VLM, QueryTextAlignment]:
    objective = QueryTextAlignment(**factors, width=8)
    model = vlm(connector=qformer())
    model.set_objectives({"objective": objective})
    spread(objective, seed=4, scale=0.3)
    if "itc" in objective.factors:
        objective.temperature.data.fill_(0.5)
    return model, objective


# -- the three masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_masks_are_the_papers(sight: str) -> None:
    valid = torch.tensor([[True, True, False], [True, True, True]])
    got = sight_mask(sight, 2, valid)
    for image in range(2):
        for i in range(5):
            for j in range(5):
                rule = {
                    "apart": (i < 2) == (j < 2),
                    "together": True,
                    "causal": j < 2 or (i >= 2 and j <= i),
                }[sight]
                assert bool(got[image, i, j]) == (rule and (j < 2 or bool(valid[image, j - 2])))


@pytest.mark.parametrize("sight", SIGHTS)
def test_what_each_mask_lets_through(sight: str) -> None:
    """By gradients through three layers: text never reaches queries but in ``together``, no word a former one."""
    ours = qformer()
    cut: list[Tensor] = []
    ours.words.register_forward_hook(lambda m, i, o: cut.append(o.detach().requires_grad_()) or cut[-1])
    first = torch.randn(16, generator=torch.Generator().manual_seed(0))
    seen = replace(visual(), grids=[visual().grids[0].requires_grad_()])
    queries, text = ours.joint(seen, IDS, first, sight)

    def reached(value: Tensor, leaf: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
        return torch.zeros_like(leaf) if grads[0] is None else grads[0].abs()

    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))  # a sum after a layer norm is constant
    to_queries = reached((queries @ weights).sum(), cut[0])
    assert (float(to_queries.max()) > 1e-6) == (sight == "together")
    second = reached((text[1, 2] @ weights).sum(), cut[0])[1].amax(-1)  # the state at the second word, of four
    assert second[1] > 1e-6 and bool((second[2:] > 1e-6).all()) == (sight != "causal")
    assert sight != "causal" or float(second[2:].max()) == 0
    from_image = reached((text[:, 0] @ weights).sum(), seen.grids[0])
    assert (float(from_image.max()) > 1e-6) == (sight != "apart")
    assert float(reached((text[0, :3] @ weights).sum(), cut[0])[0, 3].max()) == 0, "nothing sees padding"


@torch.no_grad()
def test_apart_is_two_separate_passes() -> None:
    ours = qformer()
    first = torch.randn(16, generator=torch.Generator().manual_seed(0))
    queries, text = ours.joint(visual(), IDS, first, "apart")
    assert worst(ours.out(queries), ours(visual())) < 1e-5
    words = torch.cat([first.expand(3, 1, -1), ours.words(IDS.clamp(min=0))], 1) + ours.places.weight[:5]
    valid = torch.cat([torch.ones(3, 1), IDS.ge(0).float()], 1)
    alone = ours.qformer(query_embeds=words, query_length=0, attention_mask=valid).last_hidden_state
    assert worst(text[valid.bool()], alone[valid.bool()]) < 1e-5


@torch.no_grad()
def test_scores_are_transformers_image_text_retrieval() -> None:
    """The contrast and the matching head of Blip2ForImageTextRetrieval with copied weights."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            cross_attention_frequency=2,
            encoder_hidden_size=20,
            vocab_size=30,
            max_position_embeddings=12,
            use_qformer_text_input=True,
        ).to_dict(),
        num_query_tokens=3,
        image_text_hidden_size=8,
    )
    theirs = spread(Blip2ForImageTextRetrieval(config), seed=6, scale=0.3)
    ours = QFormerConnector(
        20, 24, queries=3, hidden=16, layers=3, heads=2, text=True, vocab_size=30, max_words=12
    ).eval()
    ours.words.load_state_dict(theirs.embeddings.word_embeddings.state_dict())
    ours.places.load_state_dict(theirs.embeddings.position_embeddings.state_dict())
    ours.qformer.load_state_dict(theirs.qformer.state_dict())
    ours.queries.data = theirs.query_tokens.data
    ours.norm = torch.nn.Identity()  # theirs is in the encoder
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    seen = replace(visual(), grids=[theirs.vision_model(pixels).last_hidden_state])
    begin = 2  # any word as the text's first token
    both = torch.cat([torch.full((3, 1), begin), IDS], 1)
    text = {"input_ids": both.clamp(min=0), "attention_mask": both.ge(0).long()}
    first = ours.words.weight[begin]
    queries, words = ours.joint(seen, IDS, first, "apart")
    image, caption = theirs.vision_projection(queries), theirs.text_projection(words[:, 0])
    scores = torch.einsum("ime,je->ijm", F.normalize(image, dim=-1), F.normalize(caption, dim=-1)).amax(-1)
    want = theirs(pixel_values=pixels, **text, use_image_text_matching_head=False).logits_per_image
    assert worst(scores, want) < 1e-5 and want.std() > 1e-3
    together, _ = ours.joint(seen, IDS, first, "together")
    want = theirs(pixel_values=pixels, **text, use_image_text_matching_head=True).logits_per_image
    assert worst(theirs.itm_head(together).mean(1), want) < 1e-5


# -- the losses --------------------------------------------------------------------------------------------------------


def batch_and_outputs(model: VLM) -> tuple[Batch, Outputs]:
    batch = collator(model, "plain")([ONE_TURN, TWO_TURNS, SECOND_TURN_ONE])
    return batch, model(batch)


SECOND_TURN_ONE = replace(SECOND_TURN, id="third", turns=SECOND_TURN.turns[:1])


def smoothed(row: list[float], target: int, smoothing: float) -> float:
    norm = math.log(sum(math.exp(v) for v in row))
    return sum(((1 - smoothing) * (j == target) + smoothing / len(row)) * (norm - v) for j, v in enumerate(row))


def test_itc_is_the_double_loop() -> None:
    model, objective = built(itm=0, itg=0)
    batch, outputs = batch_and_outputs(model)
    total, count = objective(outputs, batch)["itc"]
    queries, words = model.connector.joint(outputs.seen.visual, batch.captions(), objective.begin, "apart")
    table = [[0.0] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(3):
            text = objective.text(words[j, 0])
            table[i][j] = max(
                float(F.cosine_similarity(objective.image(queries[i, k]), text, dim=0).detach()) / 0.5 for k in range(3)
            )
    want = sum(smoothed(table[i], i, 0.1) + smoothed([table[j][i] for j in range(3)], i, 0.1) for i in range(3)) / 2
    assert abs(float(total.detach()) - want) < 1e-4 and int(count) == 3


def test_itm_is_the_mean_over_queries_on_drawn_negatives() -> None:
    model, objective = built(itg=0)
    batch, outputs = batch_and_outputs(model)
    torch.manual_seed(0)
    total, count = objective(outputs, batch)["itm"]
    _, scores = objective._contrast(outputs, batch.captions())
    torch.manual_seed(0)
    likeness = scores.softmax(-1) * (1 - torch.eye(3))
    texts = torch.multinomial(likeness, 1)[:, 0].tolist()
    images = torch.multinomial(likeness.T, 1)[:, 0].tolist()
    pairs = [(i, i, 1) for i in range(3)] + [(i, texts[i], 0) for i in range(3)] + [(images[j], j, 0) for j in range(3)]
    assert all(i != j for i, j, own in pairs if not own)
    want = 0.0
    for i, j, own in pairs:
        one = replace(outputs.seen.visual, grids=[outputs.seen.visual.grids[0][i, None]], hw=outputs.seen.visual.hw[:1])
        queries, _ = model.connector.joint(one, batch.captions()[j, None], objective.begin, "together")
        logits = sum(objective.match(queries[0, k]) for k in range(3)) / 3
        want += smoothed(logits.tolist(), own, 0.0)
    assert abs(float(total.detach()) - want) < 1e-4 and int(count) == 9


def test_itg_predicts_every_word_from_those_before() -> None:
    model, objective = built(itc=0, itm=0)
    batch, outputs = batch_and_outputs(model)
    total, count = objective(outputs, batch)["itg"]
    ids = batch.captions()
    want, words = 0.0, 0
    for image in range(3):
        told = [i for i in ids[image].tolist() if i >= 0]
        one = replace(
            outputs.seen.visual, grids=[outputs.seen.visual.grids[0][image, None]], hw=outputs.seen.visual.hw[:1]
        )
        for at, word in enumerate(told):  # a pass per word, which has only read the words before it
            before = torch.tensor([told[:at]], dtype=torch.long)
            _, states = model.connector.joint(one, before, objective.decode, "causal")
            state = objective.transform(states[0, at])
            logits = model.connector.words.weight @ state + objective.word_bias
            want += smoothed(logits.tolist(), word, 0.0)
            words += 1
    assert abs(float(total.detach()) - want) < 1e-3 and int(count) == words == int((batch.labels != -100).sum())


def test_negatives_never_show_the_same_image() -> None:
    _, objective = built(itg=0)
    batch, _ = batch_and_outputs(vlm())
    twins = replace(batch, images=replace(batch.images, ids=["a", "a", "b"]))
    likeness = objective._likeness(torch.randn(3, 3), twins, 3)
    assert likeness.eq(0).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_hard_negatives_follow_the_scores() -> None:
    _, objective = built(itg=0)
    batch, _ = batch_and_outputs(vlm())
    likeness = objective._likeness(torch.tensor([[5.0, 4.0, 0.0]] * 3), batch, 3)
    assert likeness[0, 1] > 20 * likeness[0, 2] and likeness[0, 0] == 0


def test_one_image_has_no_negative() -> None:
    model, objective = built()
    batch = collator(model, "plain")([ONE_TURN])
    terms = objective(model(batch), batch)
    assert int(terms["itm"][1]) == 1 and all(torch.isfinite(total) for total, _ in terms.values())


@pytest.mark.parametrize("name", ["itc", "itm", "itg", "blip2"])
def test_every_weight_has_a_gradient(name: str) -> None:
    """Of the objective and of its connector, in a stage without any other loss."""
    objective = instantiate(tiny.loaded(CONF / "objective" / f"{name}.yaml"))
    model = vlm(connector=qformer())
    model.set_objectives({"objective": objective})
    batch, outputs = batch_and_outputs(model)
    sum(total for total, _ in objective(outputs, batch).values()).backward()
    missing = [n for part in ("connector", "objective") for n, p in model.parts()[part] if p.grad is None]
    assert missing == []
    assert not any(n.startswith("objectives.") and "connector" in n for n in model.state_dict())


def test_dropped_when_the_next_stage_begins() -> None:
    model, _ = built()
    assert "objective" in model.parts() and any(n.startswith("objectives.") for n in model.state_dict())
    model.set_objectives({})
    assert "objective" not in model.parts() and not any(n.startswith("objectives.") for n in model.state_dict())


def test_what_does_not_fit_is_refused() -> None:
    for connector in (spread(MlpConnector(32, 32)), QFormerConnector(32, 32, layers=1, heads=2)):
        with pytest.raises(UserError, match=r"connector\.text=true"):
            vlm(connector=connector).set_objectives({"objective": QueryTextAlignment()})
    with pytest.raises(UserError, match="all 0"):
        QueryTextAlignment(itc=0, itm=0, itg=0)
    model, objective = built()
    batch = collator(model)([TWO_IMAGES])
    with pytest.raises(UserError, match="one image with its caption"):
        objective(model(batch), batch)
    batch = collator(model)([TEXT_ONLY])
    terms = objective(model(batch), batch)
    assert all(float(total.detach()) == 0 and int(count) == 0 for total, count in terms.values())


def test_a_stage_trains_them_or_is_refused() -> None:
    """The part is the model's for one stage; what it trained is kept in that stage's file only."""
    own = {"_target_": "vlmlab.objective.query_text.QueryTextAlignment", "width": 8}
    stage = Stage(0, "align", "", {"connector": 1e-3}, "", own, steps=1, batch_size=2)
    staged = StagedModel(vlm(connector=qformer()))
    with pytest.raises(UserError, match=r"add train\.objective"):
        staged.enter(stage)
    staged.enter(replace(stage, train={"connector": 1e-3, "objective": 1e-3}))
    assert "objectives.objective.begin" in staged.trained() and "objectives.objective.begin" in staged.kept()
    staged.enter(replace(stage, objective={"_target_": "vlmlab.objective.lm.LanguageModelling"}))
    assert not any(name.startswith("objectives.") for name in [*staged.trained(), *staged.kept()])
