"""The plan against a count by hand, and against what an allocator sees when the same step is really done."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tests.test_conf import composed
from torch.profiler import ProfilerActivity, profile

from vlmlab.contracts.tensors import Batch
from vlmlab.engine.restore import module_class
from vlmlab.engine.weights import StagedModel
from vlmlab.plan.devices import DEVICES
from vlmlab.plan.op_cache import OpCache
from vlmlab.plan.plan import Cost, Settings, Shape, StagePlan, _shapes, as_json, plan, shaped_batch
from vlmlab.plan.simulation import Simulator
from vlmlab.recipe.stage import Stage, parse

A100 = DEVICES["a100"]


def entered(cfg: DictConfig, stage: Stage, device: str = "meta") -> StagedModel:
    with torch.device(device):
        staged = StagedModel(module_class(stage).build(cfg))
        staged.enter(stage)
    return staged


def batch(cfg: DictConfig, stage: Stage, staged: StagedModel, *shapes: Shape) -> Batch:
    kind: Any = module_class(stage)
    return shaped_batch(kind.collator(cfg, staged.model, stage.prompt), shapes)


# -- FLOPs by hand: 2 per multiply-add of every matrix product ---------------------------------------------------------


def layer(tokens: int, matrices: int, width: int) -> tuple[int, int]:
    """FLOPs of a layer's weight matrices (their total size is given), and of its attention."""
    return 2 * tokens * matrices, 4 * tokens * tokens * width


def by_hand(staged: StagedModel, asked: int, answered: int, train_lm: bool) -> tuple[int, int]:
    """Forward and training FLOPs of a sample with one image: frozen encoder, two-layer connector, LM frozen or not."""
    model: Any = staged.model
    vision, text = model.encoder.tower.config, model.lm.model.config
    wide, patch, layers = vision.hidden_size, vision.patch_size, len(model.encoder.tower.encoder.layers)
    n = model.encoder.hw[0] * model.encoder.hw[1]
    products, attention = layer(n, 4 * wide**2 + 2 * wide * vision.intermediate_size, wide)
    encoder = 2 * n * 3 * patch * patch * wide + layers * (products + attention)

    first = 2 * n * wide * text.hidden_size
    second = 2 * n * text.hidden_size**2
    s, head = n + asked + answered, text.hidden_size // text.num_attention_heads
    projections = 2 * text.hidden_size * head * (text.num_attention_heads + text.num_key_value_heads)
    products, attention = layer(s, projections + 3 * text.hidden_size * text.intermediate_size, text.hidden_size)
    linear, square = text.num_hidden_layers * products, text.num_hidden_layers * attention
    logits = 2 * answered * text.hidden_size * text.vocab_size
    forward = encoder + first + second + linear + square + logits
    # backward: the connector's first layer needs no gradient of its input; an attention has five products, not two
    backward = first + 2 * second + (linear + logits) * (2 if train_lm else 1) + square * 5 // 2
    return forward, forward + backward


@pytest.mark.parametrize(
    "overrides",
    [(), ("preset=improved_alignment_900m",), ("mask=causal", "collate.pack_length=null")],
    ids=["embedded", "900m", "causal"],
)
def test_flops_are_those_counted_by_hand(overrides: tuple[str, ...]) -> None:
    cfg = composed(*overrides)
    stages = parse(cfg)
    for stage, train_lm in ((stages[0], False), (stages[3], True)):
        staged = entered(cfg, stage)
        found = Simulator(staged, half=True)(batch(cfg, stage, staged, Shape(1, 20, 60)))
        forward, training = by_hand(staged, 20, 60, train_lm)
        print(stage.name, found.forward / forward, found.total / training)
        assert found.forward == pytest.approx(forward, rel=0.01) and found.total == pytest.approx(training, rel=0.01)


def test_checkpointing_computes_the_lm_twice_and_keeps_less() -> None:
    found = []
    for checkpointing in ("false", "true"):
        cfg = composed(f"lm.gradient_checkpointing={checkpointing}")
        stage = parse(cfg)[3]
        staged = entered(cfg, stage)
        found.append(Simulator(staged, half=False)(batch(cfg, stage, staged, *[Shape(1, 100, 60)] * 8)))
    (plain, less), model = found, staged.model
    assert plain.forward == less.forward and less.peak < 0.7 * plain.peak
    encoder_and_more = by_hand(staged, 100, 60, True)[0] * 8
    assert plain.total < less.total < plain.total + encoder_and_more and model is staged.model


def test_checkpointing_of_an_encoder_that_trains_keeps_less() -> None:
    peaks = []
    for checkpointing in ("false", "true"):
        cfg = composed("recipe=full", f"encoder.gradient_checkpointing={checkpointing}")
        stage = parse(cfg)[-1]
        staged = entered(cfg, stage)
        assert any(name.startswith("encoder.") for name in staged.trained())
        simulate = Simulator(staged, half=False)
        one, three = (simulate(batch(cfg, stage, staged, *[Shape(1, 5, 5)] * n)).peak for n in (8, 24))
        peaks.append(three - one)
    assert peaks[1] < 0.85 * peaks[0]


def test_shares_of_a_stage() -> None:
    """Four devices have a quarter each of what is kept, and whole what is outside the layers and two layers."""
    cfg = composed("recipe=joint", "precision=fp32", "collate.pack_length=null")
    lengths = {"joint": [80, 20]}
    alone, shared = (plan(cfg, Settings(A100, 4, sharded=cut, lengths=lengths))[0] for cut in (False, True))
    model: Any = entered(cfg, parse(cfg)[0]).model
    sizes = {part: sum(p.numel() for _, p in named) for part, named in model.parts().items()}
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.lm.model.model.layers]
    seen = [sum(p.numel() for p in layer.parameters()) for layer in model.encoder.tower.encoder.layers]
    outside = sizes["lm"] + sizes["encoder"] - sum(layers) - sum(seen)
    towers, largest = sizes["lm"] + sizes["encoder"], max(layers + seen)
    buffers = alone.weights - 4 * sum(sizes.values())
    assert shared.weights == 4 * (towers // 4 + sizes["connector"] + outside + 2 * largest) + buffers
    assert shared.optimizer == 8 * (sizes["lm"] // 4 + sizes["connector"])
    assert shared.buckets == 4 * sizes["connector"] and shared.activations == alone.activations


# -- memory: the CPU's allocator, as torch's profiler writes down every allocation and every release -------------------


def really(staged: StagedModel, data: Batch, half: bool) -> int:
    """Most bytes at once of one forward and backward, above weights and gradients."""
    for parameter in staged.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            total: Any = 0.0
            outputs = staged.model(data)
            for objective in staged.objectives.values():
                for value, _ in objective(outputs, data).values():
                    total = total + objective.weight * value / data.supervised
            with torch.autocast("cpu", enabled=False):
                total.backward()
        del outputs, total, value
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("mask", ["bidir", "causal"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", [0, 3])
def test_activations_are_those_of_the_allocator(index: int, half: bool, mask: str) -> None:
    cfg = composed("collate.pack_length=null", f"mask={mask}")
    stage = parse(cfg)[index]
    planned, staged = entered(cfg, stage), entered(cfg, stage, "cpu")
    shapes = [Shape(1, 90, 60)] * 8
    measured = really(staged, batch(cfg, stage, staged, *shapes), half)
    found = Simulator(planned, half)(batch(cfg, stage, planned, *shapes)).peak
    print(stage.name, half, found, measured, found / measured)
    assert found == pytest.approx(measured, rel=0.15)


def test_questions_are_planned_as_they_are_read() -> None:
    """A sample is as many rows as it has questions, or a tree with all of their answers."""
    found = {}
    for questions in ("conversation", "rows", "tree"):
        cfg = composed(f"collate.questions={questions}", "data.train.instruct.caption_fraction=0")
        stage = parse(cfg)[3]
        kind: Any = module_class(stage)
        collate = kind.collator(cfg, entered(cfg, stage).model, stage.prompt or kind.prompt)
        found[questions] = _shapes(cfg, stage, collate, Settings(A100, sample=3))
    (rows, each, _), (trees, whole, _), (_, one, _) = (found[name] for name in ("rows", "tree", "conversation"))
    assert one == whole == 1 and 6 <= each <= 8 and len(rows) == 3 * each
    assert sum(shape.answered for shape in trees) == sum(shape.answered for shape in rows)
    assert sum(shape.asked for shape in trees) < sum(shape.asked for shape in rows)
    assert [shape.images for shape in trees] == [1] * 3
    cost = Cost(2.0, 6.0, 1.0, 4.0).times(2.5)
    assert (cost.forward, cost.training, cost.base, cost.slope) == (5.0, 15.0, 1.0, 10.0)


# -- the whole plan ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> list[StagePlan]:
    cfg = composed("data.train.short.size=100", "trainer.devices=2", "collate.pack_length=null")
    lengths, samples = {"instruction_tune": [80, 20]}, {"deep_align": 999}
    return plan(cfg, Settings(A100, devices=2, sample=4, lengths=lengths, samples=samples))


def optimizer_state(cfg: DictConfig, stage: Stage) -> tuple[StagedModel, int]:
    """The model of a stage with its weights, and the bytes its optimizer keeps after a real step."""
    staged = entered(cfg, stage, "cpu")
    module = module_class(stage)(staged.model, stage, staged.objectives, staged.rates)
    optimizer = module.configure_optimizers()
    for parameter in staged.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return staged, sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("index", [1, 3])
def test_bytes_of_weights_gradients_and_optimizer_are_exact(planned: list[StagePlan], index: int) -> None:
    cfg = composed()
    staged, state = optimizer_state(cfg, parse(cfg)[index])
    model: Any = staged.model
    numbers = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("connector", "lm")}
    trained = 4 * (numbers["connector"] + (numbers["lm"] if index == 3 else 0))
    found = planned[index]
    assert found.weights == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert (found.gradients, found.buckets, found.file) == (trained, trained, trained)
    assert found.optimizer == state and found.checkpoint == trained + state
    assert found.parameters["connector"] == (numbers["connector"], numbers["connector"])


def test_samples_lengths_and_hours(planned: list[StagePlan]) -> None:
    batch_sizes = [stage.batch_size for stage in parse(composed())]
    assert planned[1].steps == -(-999 // batch_sizes[1]) and planned[1].samples == planned[1].steps * batch_sizes[1]
    last = planned[3]
    assert (last.measured, last.longest, last.length, last.supervised) == ("stated", 116, 116.0, 20.0)
    assert last.hours == pytest.approx(last.samples * last.training / (2 * 0.4 * 312e12) / 3600)
    assert planned[0].measured == "4 of 100 samples of data.train.short"
    assert last.micro_batch == batch_sizes[3] // 2 and last.peak > last.weights + last.gradients + last.optimizer


def test_the_largest_micro_batch_fits_and_the_next_does_not(planned: list[StagePlan]) -> None:
    for stage in planned:
        held = stage.weights + stage.gradients + stage.optimizer + stage.buckets + stage.activations_base
        room = A100.memory * 0.92
        assert held + stage.fits * stage.activations_sample <= room * 1.001
        assert held + (stage.fits + 1) * (stage.activations_sample + 1) >= room * 0.999
    text = json.dumps(as_json(planned, Settings(A100)))
    assert json.loads(text)["stages"][3]["name"] == "instruction_tune"


@pytest.mark.slow
def test_the_plan_of_the_paper() -> None:
    """558k + 118k + 790k samples on eight A100, every number from the papers' sizes alone: 20 + 200 tokens of text."""
    samples = {"coarse_align": 558_000, "deep_align": 118_000, "caption_pretrain": 676_000, "instruction_tune": 790_000}
    cfg = composed("preset=improved_alignment_900m", "trainer.devices=8")
    found = plan(cfg, Settings(A100, devices=8, lengths={key: [20, 200] for key in samples}, samples=samples))

    wide, text = 4 * 1152**2 + 2 * 1152 * 4304, 2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864  # a layer's matrices
    so400m = 14 * 14 * 3 * 1152 + 1152 + 729 * 1152 + 26 * (wide + 4 * 1152 + 4304 + 1152 + 4 * 1152)
    connector = 1152 * 896 + 896 + 896 * 896 + 896
    qwen2 = 151_936 * 896 + 24 * (text + 896 + 2 * 128 + 2 * 896) + 896
    assert so400m + connector + qwen2 == 893_615_008

    s = 729 + 220
    encoder = 2 * 729 * 14 * 14 * 3 * 1152 + 26 * (2 * 729 * wide + 4 * 729 * 729 * 1152)
    first, second = 2 * 729 * 1152 * 896, 2 * 729 * 896 * 896
    linear, square, logits = 24 * 2 * s * text, 24 * 4 * s * s * 896, 2 * 200 * 896 * 151_936
    forward = encoder + first + second + linear + square + logits
    for stage, times in zip(found, (1, 1, 2, 2), strict=True):
        trained = connector + (qwen2 if times == 2 else 0)
        assert stage.parameters["encoder"] == (so400m, 0) and stage.parameters["connector"] == (connector, connector)
        assert stage.parameters["lm"] == (qwen2, trained - connector)
        assert (stage.gradients, stage.optimizer, stage.buckets) == (4 * trained, 8 * trained, 4 * trained)
        assert (stage.file, stage.checkpoint) == (4 * trained, 12 * trained)
        assert 0 <= stage.weights - 4 * (so400m + connector + qwen2) < 10_000  # buffers
        training = forward + first + 2 * second + times * (linear + logits) + square * 5 // 2
        assert stage.forward == pytest.approx(forward, rel=0.01)
        assert stage.training == pytest.approx(training, rel=0.01)
        hours = samples[stage.name] * training / (8 * 0.4 * 312e12) / 3600
        assert stage.hours == pytest.approx(hours, rel=0.01)


def test_a_small_device_asks_for_more_accumulation() -> None:
    from dataclasses import replace

    from vlmlab.cli.plan import lines

    cfg = composed("collate.pack_length=null")
    stated = {stage.name: [80, 20] for stage in parse(cfg)}
    settings = Settings(replace(A100, memory=60e6), lengths=stated)
    found = plan(cfg, settings)
    stage = found[3]
    assert 0 < stage.fits < stage.micro_batch and stage.accumulate > 1
    assert parse(cfg)[3].batch_size // stage.accumulate <= stage.fits
    said = "\n".join(lines(found, settings))
    assert f"recipe.stages.instruction_tune.accumulate={stage.accumulate} fits" in said
    assert "fits too" not in said
    assert all(len(line) < 240 for line in said.splitlines()) and re.search(r"1 x NVIDIA A100 80GB \(0\.1 GB", said)


def test_a_large_device_asks_for_less_accumulation() -> None:
    from vlmlab.cli.plan import lines

    cfg = composed("collate.pack_length=null", "recipe=joint", "+recipe.stages.joint.accumulate=8")
    settings = Settings(A100, lengths={"joint": [80, 20]})
    found = plan(cfg, settings)
    assert (found[0].micro_batch, found[0].accumulate) == (4, 1)
    said = "note: recipe.stages.joint.accumulate=1 fits too: micro-batches of 32 instead of 4"
    assert said in lines(found, settings)


@pytest.mark.parametrize(
    "override",
    ["adapter=lora", "connector=qformer", "connector=token_merge", "fusion=none", "adapter=soft_prompt", "lm=scratch"],
)
def test_other_compositions_can_be_planned(override: str) -> None:
    cfg = composed(override, "recipe=joint")
    found = plan(cfg, Settings(A100, lengths={parse(cfg)[0].name: [30, 10]}))
    assert found[0].training > found[0].forward > 0 and found[0].activations > 0


def test_the_keys_name_every_device() -> None:
    conf = Path(__file__).parents[2] / "conf"
    named = (conf / "plan.yaml").read_text().split("device: a100 #")[1].split("(")[0]
    assert set(DEVICES) == set(re.findall(r"\w+", named))


def test_a_cpu_computes_in_32_bit_and_each_stage_is_told() -> None:
    cfg = composed("recipe=two_stage")
    said: list[str] = []
    lengths = {stage.name: [20, 10] for stage in parse(cfg)}
    cpu = plan(cfg, Settings(DEVICES["cpu"], lengths=lengths), told=said.append)
    gpu = plan(cfg, Settings(replace(DEVICES["cpu"], half=True), lengths=lengths), only=[cpu[0].name])
    assert said == [f"stage {k} of 2: {stage.name}" for k, stage in enumerate(parse(cfg), 1)]
    assert cpu[0].training == gpu[0].training and cpu[0].temporaries < gpu[0].temporaries


@pytest.mark.parametrize("half", [True, False])
def test_what_is_recalled_is_what_torch_says(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs and bytes with every operation asked anew, and with each kind of it once."""
    cfg = composed("recipe=joint", "connector=qformer")
    (stage,) = parse(cfg)
    staged = entered(cfg, stage)
    rows = batch(cfg, stage, staged, Shape(1, 20, 10), Shape(1, 20, 10))
    quick = Simulator(staged, half)(rows)
    monkeypatch.setattr(OpCache, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert Simulator(staged, half)(rows) == quick
