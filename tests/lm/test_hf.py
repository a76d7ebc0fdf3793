"""The LM under our masks: a dense fp64 reference, windows, cached decoding against full forwards, errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny import (
    ADJACENT,
    ONE_TURN,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    batches,
    collator,
    gemma3,
    qwen2,
    root,
    save_lm,
    sliding_qwen2,
    text_config,
    tokenizer,
    vlm,
    worst,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Mask
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Batch, Kind, Layout, Role
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.lm.masking import within
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM

MASKS = [Causal(), Bidirectional()]


# -- an own forward of Qwen2: fp64, one head at a time -----------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary embedding of (S, d): the pair (i, i + d/2) turns by position / base^(2i/d)."""
    half = x.shape[-1] // 2
    angle = position[:, None].double() / base ** (torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def dense_qwen2(model: Qwen2ForCausalLM, embeds: Tensor, allowed: list[Tensor], position: Tensor) -> Tensor:
    """(B, S, D) -> (B, S, D); one (B, S, S) mask per layer."""
    config, weights = model.config, {k: v.double() for k, v in model.model.state_dict().items()}
    heads, shared = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    d, base = config.hidden_size // heads, config.rope_parameters["rope_theta"]
    out = []
    for b in range(embeds.shape[0]):
        x = embeds[b].double()
        for n in range(config.num_hidden_layers):

            def linear(name: str, y: Tensor, n: int = n) -> Tensor:
                bias = weights.get(f"layers.{n}.{name}.bias")
                return y @ weights[f"layers.{n}.{name}.weight"].T + (0 if bias is None else bias)

            y = rms(x, weights[f"layers.{n}.input_layernorm.weight"], config.rms_norm_eps)
            q, k, v = (linear(f"self_attn.{name}_proj", y) for name in "qkv")
            rows = []
            for h in range(heads):
                mine, theirs = slice(h * d, (h + 1) * d), slice(h // shared * d, (h // shared + 1) * d)
                scores = rotate(q[:, mine], position[b], base) @ rotate(k[:, theirs], position[b], base).T
                scores = (scores / math.sqrt(d)).masked_fill(~allowed[n][b], -math.inf)
                rows.append(scores.softmax(-1) @ v[:, theirs])
            x = x + linear("self_attn.o_proj", torch.cat(rows, -1))
            y = rms(x, weights[f"layers.{n}.post_attention_layernorm.weight"], config.rms_norm_eps)
            gate = linear("mlp.gate_proj", y)
            x = x + linear("mlp.down_proj", gate * gate.sigmoid() * linear("mlp.up_proj", y))
        out.append(rms(x, weights["norm.weight"], config.rms_norm_eps))
    return torch.stack(out)


def check_dense(lm: HfLanguageModel, batch: Batch, mask: object, window: int | None) -> float:
    layout, embeds = batch.layout, lm.embed(batch.input_ids)
    q = torch.arange(embeds.shape[1])
    allowed = mask(layout, q)
    near = allowed if window is None else allowed & (q[:, None] - q[None, :] < window)
    kinds = lm.model.config.layer_types
    want = dense_qwen2(
        lm.model, embeds, [near if kind == "sliding_attention" else allowed for kind in kinds], layout.position
    )
    got = lm.states(embeds, layout, mask)
    return worst(got[layout.valid].double(), want[layout.valid])


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("where", ["one turn", "packed", "right padding", "left padding"])
@torch.no_grad()
def test_states_equal_the_dense_reference(where: str, mask: object) -> None:
    lm = HfLanguageModel(str(qwen2())).eval()
    assert check_dense(lm, batches()[where], mask, None) <= 1e-5


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("where", ["image in each turn", "packed", "left padding"])
@torch.no_grad()
def test_a_sliding_family_sees_policy_and_window(where: str, mask: object) -> None:
    lm = HfLanguageModel(str(sliding_qwen2())).eval()
    assert lm.model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert check_dense(lm, batches()[where], mask, window=5) <= 1e-5
    assert check_dense(lm, batches()[where], mask, window=None) > 1e-3, "the window must matter here"


def mistral() -> Path:
    """A family whose layers all slide and whose config has no list of layer types."""
    folder = root() / "mistral"
    if not folder.exists():
        save_lm(MistralForCausalLM(MistralConfig(**text_config(sliding_window=5, head_dim=8))), "mistral")
    return folder


@torch.no_grad()
def test_a_window_without_layer_types_is_kept() -> None:
    lm = HfLanguageModel(str(mistral())).eval()
    batch = batches()["one turn"]
    lm.model.set_attn_implementation("sdpa")
    want = lm.model.model(input_ids=batch.input_ids).last_hidden_state
    assert worst(lm.states(lm.embed(batch.input_ids), batch.layout, Causal()), want) <= 1e-6


def llama() -> Path:
    """A family without kinds of layers, whose masks are 4-D tensors or none."""
    folder = root() / "llama"
    if not folder.exists():
        save_lm(LlamaForCausalLM(LlamaConfig(**text_config())), "llama")
    return folder


def far_mistral() -> Path:
    """A window that no batch here reaches."""
    folder = root() / "far_mistral"
    if not folder.exists():
        save_lm(MistralForCausalLM(MistralConfig(**text_config(sliding_window=64, head_dim=8))), "far_mistral")
    return folder


# -- plain causal attention is asked for without a mask ----------------------------------------------------------------


class FirstHidden:
    """Planted: causal, but for the row's first token, which the last ones do not see."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        late = (torch.arange(layout.kind.shape[1]) == 0)[None, None, :] & (q > 15)[None, :, None]
        return Causal()(layout, q) & ~late


def text_only() -> Batch:
    return collator(vlm())([TEXT_ONLY, Sample("short", (), (Turn("how many", "two"),))])


def shown(lm: HfLanguageModel, batch: Batch, mask: Mask) -> set[bool]:
    """Whether the attention of its layers is given a mask."""
    found: set[bool] = set()

    def look(module: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        found.add(kwargs["attention_mask"] is not None)

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in lm.model.model.layers]
    lm.states(lm.embed(batch.input_ids), batch.layout, mask)
    for hook in hooks:
        hook.remove()
    return found


def learnt(lm: HfLanguageModel, batch: Batch, states: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """States of all real tokens, and the gradients of a loss on the supervised ones."""
    lm.model.zero_grad()
    embeds = lm.embed(batch.input_ids).detach().requires_grad_()
    found = states(embeds)
    chosen = batch.labels[:, 1:] != -100
    F.cross_entropy(lm.logits(found[:, :-1][chosen]), batch.labels[:, 1:][chosen]).backward()
    gradients = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    assert embeds.grad is not None
    return {"states": found[batch.layout.valid].detach(), "embeds": embeds.grad, **gradients}


PLAIN = [
    *((Causal(), where) for where in ("one turn", "two turns", "image in each turn", "right padding")),
    (Bidirectional(), "text only"),
]


@pytest.mark.parametrize("tower", [qwen2, llama, far_mistral], ids=lambda t: t.__name__)
@pytest.mark.parametrize(("mask", "where"), PLAIN, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_plain_causal_attention_needs_no_mask(tower: Callable[[], Path], mask: Mask, where: str) -> None:
    """The same states and gradients as under the mask that is left out."""
    lm = HfLanguageModel(str(tower()))
    batch = {**batches(), "text only": text_only()}[where]
    assert shown(lm, batch, mask) == {False}
    allowed = mask(batch.layout, torch.arange(batch.layout.kind.shape[1]))

    def dense(embeds: Tensor) -> Tensor:
        every = {"attention_mask": allowed[:, None], "position_ids": batch.layout.position, "use_cache": False}
        return lm.model.model(inputs_embeds=embeds, **every).last_hidden_state

    want = learnt(lm, batch, dense)
    got = learnt(lm, batch, lambda embeds: lm.states(embeds, batch.layout, mask))
    assert got.keys() == want.keys() and len(got) > 30
    for name, value in want.items():
        assert worst(got[name], value) <= 2e-6 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize(
    ("tower", "mask", "where"),
    [
        (qwen2, Causal(), "packed"),
        (qwen2, Causal(), "left padding"),
        (qwen2, Bidirectional(), "one turn"),
        (qwen2, FirstHidden(), "one turn"),
        (llama, Causal(), "packed"),
        (sliding_qwen2, Causal(), "one turn"),
        (gemma3, Causal(), "one turn"),
        (mistral, Causal(), "right padding"),
    ],
)
def test_anything_else_is_shown_its_mask(tower: Callable[[], Path], mask: Mask, where: str) -> None:
    assert shown(HfLanguageModel(str(tower())), batches()[where], mask) == {True}


def test_within() -> None:
    allowed, layout = torch.ones(1, 3, 5, dtype=torch.bool), Layout.of_text(torch.ones(1, 5, dtype=torch.bool))
    near = within(allowed, layout, torch.tensor([2, 3, 4]), 2)[0]
    assert near.int().tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert within(allowed, layout, torch.arange(3), None) is allowed


# -- cached decoding equals full forwards ------------------------------------------------------------------------------


def grown(layout: Layout) -> Layout:
    """One answer token more."""

    def add(name: str, value: Tensor | int) -> Tensor:
        field = getattr(layout, name)
        new = value if isinstance(value, Tensor) else torch.full((len(field), 1), value)
        return torch.cat([field, new], 1)

    return Layout(
        kind=add("kind", int(Kind.TEXT)),
        image=add("image", -1),
        tile=add("tile", -1),
        segment=add("segment", 0),
        role=add("role", int(Role.ANSWER)),
        position=add("position", layout.position[:, -1:] + 1),
    )


@torch.no_grad()
def cache_free(model: VLM, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy ids (B, steps) by a full forward per token, ignoring end tokens, and the smallest lead of the winner."""
    seen = model.see(batch)
    embeds, inside = model.embed(batch, seen), model.inside(batch, seen)
    layout, ids, lead = batch.layout, [], []
    for _ in range(steps):
        here = None if inside is None else inside.at(torch.arange(embeds.shape[1]))
        logits = model.lm.logits(model.lm.states(embeds, layout, model.mask, here)[:, -1])
        best = logits.topk(2).values
        lead.append((best[:, 0] - best[:, 1]).min())
        ids.append(logits.argmax(-1))
        embeds = torch.cat([embeds, model.lm.embed(ids[-1][:, None])], 1)
        layout = grown(layout)
    return torch.stack(ids, 1), torch.stack(lead).min()


def asked(model: VLM) -> Batch:
    """Prompts of different lengths: one image, two turns, two images in two turns, two adjacent images."""
    return collator(model).ask([ONE_TURN, TWO_TURNS, TWO_IMAGES, ADJACENT])


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("tower", [qwen2, sliding_qwen2, gemma3, mistral], ids=lambda t: t.__name__)
def test_cached_decoding_equals_full_forwards(tower: object, mask: object) -> None:
    model = vlm(mask=mask, lm=HfLanguageModel(str(tower())))
    batch = asked(model)
    assert batch.layout.kind[:, 0].eq(Kind.PAD).any()
    embeds = model.embed(batch)
    want, lead = cache_free(model, batch, 12)
    assert lead > 1e-5, "a tie would make the comparison empty"
    assert len(want.unique()) > 3
    got = model.lm.generate(embeds, batch.layout, mask, 12, eos_token_id=-1)
    assert got.tolist() == want.tolist()


def test_generation_stops_at_the_end_token() -> None:
    model = vlm()
    batch = asked(model)
    ids, _ = cache_free(model, batch, 12)
    stop = int(ids[0, 3])
    first = ids[0].tolist().index(stop)
    embeds = model.embed(batch)
    got = model.lm.generate(embeds, batch.layout, model.mask, 12, eos_token_id=stop)[0].tolist()
    assert got[: first + 1] == ids[0, : first + 1].tolist() and set(got[first + 1 :]) <= {tokenizer().pad_token_id}


def test_the_mask_matters_in_decoding() -> None:
    model = vlm()
    batch = asked(model)
    embeds = model.embed(batch)
    bidir, causal = (model.lm.generate(embeds, batch.layout, mask, 12, eos_token_id=-1) for mask in MASKS[::-1])
    assert bidir.tolist() != causal.tolist()


def test_beams_and_return_sequences() -> None:
    model = vlm()
    batch = asked(model)
    texts = model.generate(batch, 5, num_beams=3, num_return_sequences=2)
    assert len(texts) == 2 * len(batch.input_ids)
    torch.manual_seed(0)
    assert len(model.generate(batch, 5, do_sample=True, num_return_sequences=3)) == 3 * len(batch.input_ids)
    # the best of one beam is greedy decoding
    embeds = model.embed(batch)
    one = model.lm.generate(embeds, batch.layout, model.mask, 6, num_beams=1, eos_token_id=-1)
    assert one.tolist() == cache_free(model, batch, 6)[0].tolist()


@torch.no_grad()
def test_beams_score_what_full_forwards_score() -> None:
    model = vlm()
    batch = collator(model).ask([ONE_TURN, TWO_IMAGES])
    embeds = model.embed(batch)
    out = model.lm.generate(
        embeds,
        batch.layout,
        model.mask,
        4,
        num_beams=3,
        eos_token_id=-1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    layout, score = batch.layout, torch.zeros(2)
    for t in range(4):
        logits = model.lm.logits(model.lm.states(embeds, layout, model.mask)[:, -1])
        score += logits.log_softmax(-1).gather(1, out.sequences[:, t, None])[:, 0]
        embeds, layout = torch.cat([embeds, model.lm.embed(out.sequences[:, t, None])], 1), grown(layout)
    assert worst(out.sequences_scores, score / 4) < 1e-5


def copied(name: str, **generation: object) -> Path:
    folder = root() / name
    shutil.copytree(qwen2(), folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_greedy_is_greedy_whatever_the_checkpoint_says() -> None:
    """Instruction-tuned checkpoints come with sampling and penalties of their own."""
    folder = copied("penalised", repetition_penalty=9.0, no_repeat_ngram_size=1, do_sample=True, temperature=5.0)
    model = vlm(lm=HfLanguageModel(str(folder)))
    batch = asked(model)
    embeds = model.embed(batch)
    got = model.lm.generate(embeds, batch.layout, model.mask, 12, eos_token_id=-1)
    assert got.tolist() == cache_free(model, batch, 12)[0].tolist()


def test_generation_ends_where_answers_do_whatever_the_checkpoint_says() -> None:
    """A control token that its settings name ends an answer too, a word does not."""
    plain = vlm()
    batch = asked(plain)
    ids, _ = cache_free(plain, batch, 8)
    word, pad, end = int(ids[0, 2]), tokenizer().pad_token_id, tokenizer().eos_token_id
    model = vlm(lm=HfLanguageModel(str(copied("stops", eos_token_id=[word, pad]))))
    assert model.lm.stop_ids == sorted([pad, end]) and word not in (pad, end)
    embeds = model.embed(batch)
    got = model.lm.generate(embeds, batch.layout, model.mask, 8)[0].tolist()
    assert got[:3] == ids[0, :3].tolist() and word in got[:-1]
    assert model.lm.model.generation_config.eos_token_id == [word, pad], "its own settings are what they were"
    told = model.lm.texts(torch.tensor([[word, end, word], [word, word, pad]]), model.lm.stop_ids)
    assert told == [tokenizer().decode([word]).strip(), tokenizer().decode([word, word]).strip()]


def test_settings_in_the_configuration_of_the_weights_do_not_stop_generation() -> None:
    folder = copied("configured")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 0.3, "num_beams": 4, "max_length": 9}))
    model = vlm(lm=HfLanguageModel(str(folder)))
    batch = asked(model)
    got = model.lm.generate(model.embed(batch), batch.layout, model.mask, 12, eos_token_id=-1)
    assert got.tolist() == cache_free(model, batch, 12)[0].tolist()


def test_right_padded_prompts_are_refused() -> None:
    model = vlm()
    batch = collator(model)([ONE_TURN, TWO_IMAGES])
    with pytest.raises(ValueError, match="left"):
        model.generate(batch, 2)


# -- construction ------------------------------------------------------------------------------------------------------


def test_the_placeholder_is_added_behind_the_vocabulary() -> None:
    lm = HfLanguageModel(str(qwen2()), image_token="<picture>")
    assert lm.image_id == len(tokenizer()) and len(lm.tokenizer) == lm.image_id + 1
    assert lm.model.get_input_embeddings().num_embeddings == lm.image_id + 1
    assert lm.tokenizer("<picture>")["input_ids"] == [lm.image_id]
    assert "<|im_start|>" in lm.tokenizer.all_special_tokens, "the special tokens that were there stay"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm\.path=.*neither a local folder nor a hub id"):
        HfLanguageModel(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json"):
        HfLanguageModel(str(tmp_path))
    shutil.copytree(qwen2(), tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        HfLanguageModel(str(tmp_path / "silent"))
    shutil.copytree(qwen2(), tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    (tmp_path / "scaled" / "config.json").write_text(json.dumps({**config, "logit_scale": 0.5}))
    with pytest.raises(UserError, match="logit_scale"):
        HfLanguageModel(str(tmp_path / "scaled"))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = vlm(lm=HfLanguageModel(str(qwen2()), gradient_checkpointing=checkpointing)).train()
        batch = collator(model)([ONE_TURN, TWO_IMAGES])
        model(batch).logits.logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.lm.parameters()] + [p.grad for p in model.connector.parameters()])
    assert all(worst(a, b) == 0 for a, b in zip(*gradients, strict=True))
