"""The ports: in every family, beside every adapter, recomputed, compiled, cut, copied, and in generation."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from tests import tiny
from tests.tiny import choices, spread, worst
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from vlmlab.adapter.base import merge, switch
from vlmlab.adapter.ln_tuning import LnTuningAdapter
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Images, Layout, Memory
from vlmlab.lm.inside import FAMILIES, Inside, PortedLayer, generating_inside, has_ports, look, normalised, open_ports

D, DEPTH, WORDS, N = 16, 4, 50, 3
HEADS, DH = 2, 8
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": DEPTH, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": None}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, SLIDING),
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig, SLIDING),
}
families = pytest.mark.parametrize("family", MODELS)


def lm(family: str = "qwen2", **changes: Any) -> PreTrainedModel:
    """A random LM of four layers, the same weights every time."""
    model, config, own = MODELS[family]
    return spread(model(config(**{**SHAPE, **own, **changes})))  # type: ignore[return-value]


class Block(nn.Module):
    """Attends to the images with the first input and adds that to the last, at any port; counts its calls."""

    def __init__(self, width: int, out: int, seed: int) -> None:
        super().__init__()
        self.query, self.back = nn.Linear(width, HEADS * DH, bias=False), nn.Linear(HEADS * DH, out, bias=False)
        self.shapes: list[list[tuple[int, ...]]] = []
        spread(self, seed, 0.3)

    def forward(self, *given: Tensor, layout: Layout, memory: Memory) -> Tensor:
        if not torch.compiler.is_compiling():
            self.shapes.append([tuple(t.shape) for t in given])
        assert layout.kind.shape == given[0].shape[:2] == memory.sees.shape[:2]
        q = self.query(given[0]).unflatten(-1, (HEADS, DH))
        return given[-1] + self.back(look(q, memory.tensors["k"], memory.tensors["v"], memory))


def fitted(
    model: PreTrainedModel, where: list[str] | None = None, like: PreTrainedModel | None = None
) -> nn.ModuleDict:
    """A block at every port (or at some) of every layer, by `port/layer`, dots as dashes.

    Sizes are those of `like`, whose maps no adapter has wrapped.
    """
    blocks = nn.ModuleDict()
    for depth, (ports, bare) in enumerate(zip(open_ports(model), open_ports(like or model), strict=True)):
        for port in where if where is not None else ["before", "after", *ports.paths]:
            size = (D, D)
            if port.startswith("linear"):
                module: Any = bare.layer.get_submodule(bare.paths[port])
                size = (module.in_features, module.out_features)
            block = Block(*size, seed=100 + len(blocks))
            ports.put(port, block, "a")
            blocks[f"{port.replace('.', '-')}/{depth}"] = block
    return blocks


def layout_of(lengths: list[int], size: int, left: bool = False) -> Layout:
    """One sample of plain text a row."""
    at = torch.arange(size)
    valid = torch.stack([at >= size - n if left else at < n for n in lengths])
    none = torch.full_like(valid, -1, dtype=torch.long)
    position = (valid.cumsum(1) - 1).clamp(min=0)
    return Layout(valid.long(), none, none, torch.where(valid, 0, -1), torch.ones_like(none), position)


def inside_of(layout: Layout, rows: list[int], keys: tuple[str, ...] = ("a",), seed: int = 0) -> Inside:
    """Images (one an entry of `rows`) that every position of their rows sees from the third on."""
    make = torch.Generator().manual_seed(seed)
    row = torch.tensor(rows, dtype=torch.long)
    images = replace(Images.none(), row=row, ids=[str(i) for i in rows])
    tensors = {name: torch.randn(len(rows), N, HEADS, DH, generator=make) for name in ("k", "v")}
    own = torch.arange(len(layout.kind))[:, None, None] == row  # (B, 1, I)
    sees = own & layout.valid[..., None] & (layout.position >= 2)[..., None]
    memory = Memory(tensors, sees, images.slots(len(layout.kind)))
    return Inside(layout, dict.fromkeys(keys, memory), own.any(-1) & layout.valid)


LENGTHS = [9, 7, 8]


def batch(rows: list[int] | None = None, seed: int = 0) -> tuple[dict[str, Any], Inside]:
    """What a model is called with: three rows of which the second has no image."""
    make = torch.Generator().manual_seed(seed)
    layout = layout_of(LENGTHS, 9)
    ids = torch.randint(1, WORDS, (3, 9), generator=make)
    arguments = {"input_ids": ids, "attention_mask": layout.valid.long(), "use_cache": False}
    return arguments, inside_of(layout, [0, 2, 2] if rows is None else rows, seed=seed)


def states(model: PreTrainedModel, arguments: dict[str, Any], inside: Inside | None) -> Tensor:
    given = {} if inside is None else {"inside": inside}
    found: Tensor = model.base_model(**arguments, **given).last_hidden_state
    return found


# -- what the ports are ------------------------------------------------------------------------------------------------


def test_every_family_is_tested() -> None:
    assert set(MODELS) == set(FAMILIES)


@families
@torch.no_grad()
def test_without_blocks_or_memory_the_layers_are_transformers_own(family: str) -> None:
    plain, model = lm(family), lm(family)
    arguments, inside = batch()
    want = states(plain, arguments, None)
    opened = open_ports(model)
    assert has_ports(model) and not has_ports(plain) and opened == open_ports(model)
    assert torch.equal(states(model, arguments, None), want)
    assert torch.equal(states(model, arguments, inside), want)
    blocks = fitted(model)
    assert open_ports(model) == opened
    assert torch.equal(states(model, arguments, None), want)
    assert torch.equal(states(model, arguments, replace(inside, memories={})), want)
    others = inside_of(inside.layout, [0], keys=("b",))
    assert torch.equal(states(model, arguments, others), want)
    assert all(block.shapes == [] for block in blocks.values())
    assert worst(states(model, arguments, inside), want) > 1e-2
    assert torch.equal(states(model, arguments, None), want)
    assert model.state_dict().keys() == plain.state_dict().keys()


@families
@torch.no_grad()
def test_every_port_is_called_once_a_layer(family: str) -> None:
    model = lm(family)
    blocks = fitted(model)
    arguments, inside = batch()
    states(model, arguments, inside)
    assert len(blocks) == DEPTH * (2 + len(FAMILIES[family]))
    for name, block in blocks.items():
        port, depth = name.split("/")
        layer: Any = model.base_model.layers[int(depth)]
        module: Any = layer.get_submodule(FAMILIES[family].get(port.replace("-", "."), ""))
        linear = [(3, 9, getattr(module, "in_features", 0)), (3, 9, getattr(module, "out_features", 0))]
        want = {"before": 1, "after": 1, "mlp": 2}.get(port, 3) * [(3, 9, D)]
        assert block.shapes == [linear if port.startswith("linear") else want], name


@families
@torch.no_grad()
def test_each_port_acts_alone(family: str) -> None:
    """None of them is a place that nothing comes from."""
    arguments, inside = batch()
    want = states(lm(family), arguments, None)
    for port in ("before", "after", *FAMILIES[family]):
        model = lm(family)
        fitted(model, [port])
        got = states(model, arguments, inside)
        assert worst(got[0, 2:], want[0, 2:]) > 1e-3, port
        assert torch.equal(got[1], want[1]), "a row without an image"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_before_after_norm_and_linear_by_hand(family: str) -> None:
    """What each block is given, against the same layer taken apart."""
    model, seen = lm(family), {}

    class Watch(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, *given: Tensor, layout: Layout, memory: Memory) -> Tensor:
            seen[self.name] = given
            return given[-1] + 1.0

    layer: Any = model.base_model.layers[0]
    (ports, *_) = open_ports(model)
    for name in ("before", "norm.attention", "linear.o", "norm.mlp", "after"):
        ports.put(name, Watch(name), "a")
    arguments, inside = batch()
    outs: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, out: outs.extend((args[0], out)))
    states(model, arguments, inside)
    (entered,), (left,) = seen["before"], seen["after"]
    assert torch.equal(entered, outs[0]) and torch.equal(left + 1, outs[1])
    x, normed, out = seen["norm.attention"]
    assert torch.equal(x, entered + 1)
    weight, plus = layer.input_layernorm.weight, 1.0 if family == "gemma3_text" else 0.0
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert worst(normed, by_hand) < 1e-6 and worst(out, by_hand * (weight + plus)) < 1e-6
    x, y = seen["linear.o"]
    assert worst(y, x @ layer.self_attn.o_proj.weight.T) < 1e-6
    attended = y + 1 if family == "llama" else layer.post_attention_layernorm(y + 1)
    assert worst(seen["norm.mlp"][0], entered + 1 + attended) < 1e-6
    after = layer.mlp(seen["norm.mlp"][2] + 1)
    after = after if family == "llama" else layer.post_feedforward_layernorm(after)
    assert worst(left, entered + 1 + attended + after) < 1e-5


def test_normalised_is_the_norm_without_scale_and_shift() -> None:
    x = torch.randn(2, 3, D)
    layer, rms = nn.LayerNorm(D, eps=0.1), nn.RMSNorm(D, eps=0.1)
    assert worst(normalised(layer, x), layer(x)) < 1e-6 and worst(normalised(rms, x), rms(x)) < 1e-6
    half = x.bfloat16()
    gemma: Any = lm("gemma").bfloat16().base_model.layers[0].input_layernorm
    gemma.weight.data.zero_()
    assert normalised(gemma, half).dtype is torch.bfloat16
    assert torch.equal(normalised(gemma, half), gemma(half))


@torch.no_grad()
def test_blocks_at_one_port_act_in_their_order() -> None:
    model = lm()
    order: list[str] = []

    def block(name: str) -> Callable[..., Tensor]:
        def act(*given: Tensor, layout: Layout, memory: Memory) -> Tensor:
            order.append(name)
            return given[-1] * 2 if name == "first" else given[-1] + 1

        return act

    (ports, *_) = open_ports(model)
    for port in ("norm.mlp", "linear.q"):
        ports.put(port, block("first"), "a")
        ports.put(port, block("second"), "a")
    outs: list[tuple[Tensor, Tensor]] = []
    layer: Any = model.base_model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: outs.append((args[0], out)))
    states(model, *batch())
    assert order == ["first", "second"] * 2
    x, got = outs[0]
    q = layer.self_attn.q_proj
    assert worst(got, 2 * nn.functional.linear(x, q.weight, q.bias) + 1) < 1e-6


def test_what_is_not_there_is_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="layers of the family gpt2; known are llama, qwen2"):
        open_ports(other)
    assert not has_ports(other)
    with pytest.raises(UserError, match=r"no port linear.q; choose from before, after, attention, norm.attention"):
        open_ports(lm("phi3"))[0].put("linear.q", nn.Identity(), "a")
    odd = lm()
    del odd.base_model.layers[2].self_attn.o_proj
    with pytest.raises(UserError, match="a layer of this qwen2 is not built as that family's"):
        open_ports(odd)


# -- beside adapters ---------------------------------------------------------------------------------------------------

ADAPTERS = [path for path in choices("adapter") if path.stem not in ("none", "soft_prompt")]


def adapter(path: Any) -> Any:
    cfg = tiny.loaded(path)
    for key, value in {"r": 3, "k": 2, "width": 4, "dropout": 0.0}.items():
        if key in cfg:
            cfg[key] = value
    return instantiate(cfg, parts=["lm"])


@pytest.mark.parametrize("first", ["ports", "adapter", "ports, adapter, blocks"])
@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: p.stem)
def test_adapters_before_and_after_the_ports(path: Any, first: str) -> None:
    """Put in either order, the model with an adapter that does nothing yet equals the one without; blocks learn."""
    arguments, inside = batch()
    want_model = lm()
    fitted(want_model)
    want = states(want_model, arguments, inside)
    model = lm()
    if first == "ports":
        blocks = fitted(model)
        adapter(path).wrap(model)
    else:
        if first != "adapter":
            open_ports(model)
        adapter(path).wrap(model)
        blocks = fitted(model, like=want_model)
    switch(model, "default")
    got = states(model.train(), arguments, inside)
    assert worst(got, want) < 1e-6
    assert all(len(block.shapes) == 1 for block in blocks.values())
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in blocks.parameters())
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "layers.0" in n]
    assert any(p.grad is not None and p.grad.any() for p in trained)
    switch(model, None)
    assert worst(states(model, arguments, inside), want) < 1e-6


@torch.no_grad()
def test_merged_adapters_leave_the_blocks() -> None:
    arguments, inside = batch()
    model = lm()
    blocks = fitted(model, ["norm.mlp", "linear.v"])
    want = states(model, arguments, inside)
    LnTuningAdapter(parts=["lm"]).wrap(model)
    LnTuningAdapter(parts=["lm"], name="other").wrap(model)
    switch(model, "other")
    assert torch.equal(states(model, arguments, inside), want)
    assert torch.equal(states(merge(model), arguments, inside), want)
    assert all(len(block.shapes) == 3 for block in blocks.values())


# -- training's ways ---------------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel, blocks: nn.Module) -> list[Tensor]:
    """Of three forward passes over different batches before the one backward pass: of all weights, and of memories."""
    total, leaves = torch.zeros(()), []
    for rows, seed in (([0, 2, 2], 0), ([], 1), ([1], 2)):
        arguments, inside = batch(rows, seed)
        memory = inside.memories["a"]
        tensors = {name: t.requires_grad_() for name, t in memory.tensors.items()}
        leaves += tensors.values()
        out = states(model, arguments, inside)
        total = total + (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))).sum()
    total.backward()
    weights = [p for _, p in (*model.base_model.named_parameters(), *blocks.named_parameters())]
    return [p.grad for p in (*weights, *leaves) if p.grad is not None]


@families
def test_recomputed_layers_read_their_own_batch(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = lm(family).train()
        blocks = fitted(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, blocks))
        calls = {len(block.shapes) for block in blocks.values()}
        assert calls == {3} if not checkpointing else max(calls) == 6
        assert all(ports.now is None for ports in open_ports(model))
    assert len(found[0]) == len(found[1]) > 50
    assert max(worst(a, b) for a, b in zip(*found, strict=True) if a.numel()) == 0.0


def test_nothing_is_kept_from_one_pass_to_the_next() -> None:
    """Neither after a pass, nor after a backward pass that recomputes, nor after an error."""
    model = lm().train()
    fitted(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    arguments, inside = batch()
    out = states(model, arguments, inside)
    out.sum().backward()
    watched = weakref.ref(inside.memories["a"])

    def fail(*given: Tensor, layout: Layout, memory: Memory) -> Tensor:
        raise RuntimeError("out of memory")

    open_ports(model)[1].put("linear.down", fail, "a")
    with pytest.raises(RuntimeError, match="out of memory"):
        states(model, arguments, inside)
    del inside, out
    gc.collect()
    assert watched() is None and all(ports.now is None for ports in open_ports(model))


def test_compiled_layers_have_no_more_graphs_than_plain_ones() -> None:
    """No graph break (`fullgraph`), and one graph for all layers, as the plain ones have."""
    counted = []
    for where in ([], ["before", "norm.mlp", "linear.down"]):
        torch.compiler.reset()
        model = lm()
        blocks = fitted(model, where)
        arguments, inside = batch()
        want = states(model, arguments, inside)
        want.sum().backward()
        plain = [p.grad.clone() for p in model.base_model.parameters() if p.grad is not None]
        model.zero_grad()
        counter = CompileCounter()
        for layer in model.base_model.layers:
            place = "compute" if isinstance(layer, PortedLayer) else "forward"
            setattr(layer, place, torch.compile(getattr(layer, place), dynamic=True, backend=counter, fullgraph=True))
        got = states(model, arguments, inside)
        got.sum().backward()
        assert worst(got, want) < 1e-5
        compiled = [p.grad for p in model.base_model.parameters() if p.grad is not None]
        assert max(worst(a, b) for a, b in zip(compiled, plain, strict=True)) < 1e-4
        assert all(len(block.shapes) == 1 for block in blocks.values()), "called by the plain pass alone"
        counted.append(counter.frame_count)
    assert counted == [1, 1]


def test_a_copy_has_blocks_of_its_own() -> None:
    model = lm()
    both = nn.ModuleDict({"lm": model, "fusion": fitted(model)})
    arguments, inside = batch()
    twin = copy.deepcopy(both)
    want = states(model, arguments, inside)
    assert torch.equal(states(twin["lm"], arguments, inside), want)
    with torch.no_grad():
        for parameter in twin["fusion"].parameters():
            parameter.zero_()
    assert torch.equal(states(model, arguments, inside), want)
    assert torch.equal(states(twin["lm"], arguments, inside), states(lm(), arguments, None))
    ours, theirs = open_ports(model), open_ports(twin["lm"])
    assert not {id(ports) for ports in ours} & {id(ports) for ports in theirs}
    assert [ports.layer for ports in theirs] == list(twin["lm"].base_model.layers)


def test_names_and_files_are_those_of_the_plain_model(tmp_path: Any) -> None:
    model = lm()
    fitted(model)
    model.save_pretrained(tmp_path)
    again, report = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    arguments, _ = batch()
    assert torch.equal(states(again.eval(), arguments, None), states(lm(), arguments, None))


@pytest.mark.parametrize("cut_first", [False, True])
def test_layers_with_ports_are_cut_into_shards(cut_first: bool, tmp_path: Any) -> None:
    """FSDP2 gives a layer a class as the ports do; either order, with recomputation."""
    whole = lm().train()
    want = gradients(whole, fitted(whole))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = lm().train()
        mesh = init_device_mesh("cpu", (1,))
        plain = lm()
        if not cut_first:
            blocks = fitted(model)
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.base_model, mesh=mesh)
        if cut_first:
            blocks = fitted(model, like=plain)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert all(isinstance(ports.layer, FSDPModule) for ports in open_ports(model))
        got = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(model, blocks)]
        assert max(worst(a, b) for a, b in zip(got, want, strict=True) if a.numel()) < 1e-5
        assert all(block.shapes for block in blocks.values())
    finally:
        dist.destroy_process_group()


# -- generation --------------------------------------------------------------------------------------------------------


def prompts() -> tuple[Tensor, Layout, Inside]:
    layout = layout_of([4, 7, 6], 7, left=True)
    ids = torch.randint(1, WORDS, (3, 7), generator=torch.Generator().manual_seed(5))
    return ids, layout, inside_of(layout, [0, 2, 2])


def full_forwards(model: PreTrainedModel, ids: Tensor, inside: Inside, steps: int) -> Tensor:
    """Greedy ids (B, steps) without a cache and without generate()."""
    for _ in range(steps):
        size = ids.shape[1]
        now = inside.at(torch.arange(size))
        arguments = {"input_ids": ids, "attention_mask": now.layout.valid.long(), "use_cache": False}
        arguments["position_ids"] = now.layout.position
        logits = model.get_output_embeddings()(states(model, arguments, now)[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, -steps:]


@families
@pytest.mark.parametrize("form", ["dynamic", "static", "none"])
@torch.no_grad()
def test_generation_equals_full_forwards(family: str, form: str) -> None:
    model = lm(family)
    ids, layout, inside = prompts()
    plain = model.generate(ids, attention_mask=layout.valid.long(), do_sample=False, max_new_tokens=6)[:, 7:]
    fitted(model)
    want = full_forwards(model, ids, inside, 6)
    options = {"dynamic": {}, "none": {"use_cache": False}}.get(
        form, {"cache_implementation": "static", "disable_compile": True}
    )
    embeds = model.get_input_embeddings()(ids)
    with generating_inside(model, inside):
        got = model.generate(
            inputs_embeds=embeds, attention_mask=layout.valid.long(), do_sample=False, max_new_tokens=6, **options
        )
    assert got.tolist() == want.tolist() and not torch.equal(got[[0, 2]], plain[[0, 2]])
    after = model.generate(ids, attention_mask=layout.valid.long(), do_sample=False, max_new_tokens=6)[:, 7:]
    assert torch.equal(after, plain), "nothing of the context is left"


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
@torch.no_grad()
def test_beams_of_a_batch_are_those_of_each_row_alone(family: str) -> None:
    model = lm(family)
    fitted(model)
    ids, layout, inside = prompts()
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with generating_inside(model, inside):
        together = model.generate(ids, attention_mask=layout.valid.long(), **options)[:, 7:]
    for row, own in ((0, [0]), (1, []), (2, [1, 2])):
        mine = inside.memories["a"]
        slots = torch.tensor([list(range(len(own)))], dtype=torch.long)
        memory = Memory({n: t[own] for n, t in mine.tensors.items()}, mine.sees[[row]][..., own], slots)
        alone = Inside(layout.select(torch.tensor([row])), {"a": memory}, inside.with_image[[row]])
        with generating_inside(model, alone):
            got = model.generate(ids[[row]], attention_mask=layout.valid[[row]].long(), **options)[:, 7:]
        assert got.tolist() == together[2 * row : 2 * row + 2].tolist()


def test_positions_of_a_step() -> None:
    layout = layout_of([2, 3], 3, left=True)
    inside = inside_of(layout, [1, 0])
    step = inside.at(torch.tensor([2, 3, 4]))
    assert step.layout.position.tolist() == [[1, 2, 3], [2, 3, 4]] and step.layout.segment.tolist() == [[0] * 3] * 2
    assert torch.equal(step.memories["a"].sees, inside.memories["a"].sees[:, [2, 2, 2]])
    assert step.with_image.all()
    twice = step.repeated(2)
    assert twice.memories["a"].slots.tolist() == [[1], [1], [0], [0]] and twice.layout.position[1].tolist() == [1, 2, 3]
    assert twice.memories["a"].tensors is inside.memories["a"].tensors, "images are never repeated"


# -- looking -----------------------------------------------------------------------------------------------------------


def looked(rows: list[int], sees: Tensor, q: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(len(rows), N, HEADS, DH, generator=make).requires_grad_() for _ in range(2))
    images = replace(Images.none(), row=torch.tensor(rows, dtype=torch.long), ids=[""] * len(rows))
    return look(q, k, v, Memory({}, sees, images.slots(len(q)))), k, v


def test_look_is_attention_over_what_is_seen() -> None:
    torch.manual_seed(1)
    rows = [1, 0, 1, 3, 1]
    q = torch.randn(4, 5, HEADS, DH)
    sees = (torch.tensor(rows) == torch.arange(4)[:, None, None]) & (torch.rand(4, 5, 5) > 0.4)
    got, k, v = looked(rows, sees, q)
    for b in range(4):
        for s in range(5):
            seen = sees[b, s].nonzero()[:, 0]
            for h in range(HEADS):
                want = torch.zeros(DH)
                if len(seen):
                    keys, values = k[seen, :, h].flatten(0, 1), v[seen, :, h].flatten(0, 1)
                    want = (keys @ q[b, s, h] / DH**0.5).softmax(0) @ values
                here = got[b, s, h * DH : (h + 1) * DH]
                assert worst(here, want) < 1e-6 if len(seen) else not here.any()


def test_an_unseen_image_changes_no_bit_and_has_no_gradient() -> None:
    rows = [0, 0, 1, 1]
    sees = torch.zeros(2, 6, 4, dtype=torch.bool)
    sees[0, 2:, 0] = sees[0, 4:, 1] = sees[1, 3:, 3] = True
    q = torch.randn(2, 6, HEADS, DH)
    got, k, v = looked(rows, sees, q)
    got[0, :4].sum().backward()
    for leaf in (k, v):
        assert leaf.grad is not None and leaf.grad[0].any() and not leaf.grad[1:].any()
    with torch.no_grad():
        images = Images.slots(replace(Images.none(), row=torch.tensor(rows), ids=[""] * 4), 2)
        k, v = k.clone(), v.clone()
        k[1:], v[1:] = 30.0, -40.0
        other = look(q, k, v, Memory({}, sees, images))
        assert torch.equal(other[0, :4], got[0, :4]) and not torch.equal(other[0, 4:], got[0, 4:])
        assert torch.equal(other[1, :3], torch.zeros(3, HEADS * DH))


def test_no_image_is_zero_and_has_gradients_of_zeros() -> None:
    for rows, count in (([], 0), ([1], 1)):  # none at all; one, and nobody sees it
        q = torch.randn(2, 3, HEADS, DH, requires_grad=True)
        got, k, v = looked(rows, torch.zeros(2, 3, count, dtype=torch.bool), q)
        assert got.shape == (2, 3, HEADS * DH) and not got.any()
        got.sum().backward()
        for leaf in (q, k, v):
            assert leaf.grad is not None and not leaf.grad.any()


def test_the_scale_can_be_given() -> None:
    sees, q = torch.ones(1, 2, 1, dtype=torch.bool), torch.randn(1, 2, HEADS, DH)
    _, k, v = looked([0], sees, q)
    memory = Memory({}, sees, torch.zeros(1, 1, dtype=torch.long))
    assert worst(look(q, k, v, memory, scale=1.0), look(q * DH**0.5, k, v, memory)) < 1e-6
