"""Every adapter of conf/adapter: saved, resumed, several on one tower, merged, leak-free, cached; and its formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny
from tests.lm.test_hf import asked, cache_free
from tests.mask.test_masks import leak
from tests.tiny import (
    ONE_TURN,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    choices,
    collator,
    gemma3,
    qwen2,
    seen,
    siglip,
    vlm,
    worst,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from vlmlab.adapter.base import load_adapter, select
from vlmlab.adapter.bottleneck import BottleneckAdapter
from vlmlab.adapter.comp_lora import CompLora, CompLoraAdapter
from vlmlab.adapter.ia3 import Ia3Adapter
from vlmlab.adapter.ln_tuning import LnTuningAdapter, norms
from vlmlab.adapter.lora import LoraAdapter
from vlmlab.adapter.mma import Mixture, MmaAdapter, MmaLayer
from vlmlab.adapter.share import share, training_bytes
from vlmlab.adapter.soft_prompt import SoftPromptAdapter
from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.contracts.parts import Fusion
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Layout
from vlmlab.encoder.embedded import EmbeddedEncoder
from vlmlab.encoder.hf import HfEncoder
from vlmlab.engine.stage import StageModule
from vlmlab.engine.weights import StagedModel
from vlmlab.lm.embedded import EmbeddedLanguageModel
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import Stage
from vlmlab.train.resume import content_of, load_last, save_last

KINDS = [path for path in choices("adapter") if path.stem != "none"]
LM_LOSS = {"_target_": "vlmlab.objective.lm.LanguageModelling", "weight": 1.0}
MERGE = {"lora", "dora", "ia3", "ln_tuning", "comp_lora"}
SAMPLES = [ONE_TURN, TWO_TURNS, TWO_IMAGES, TEXT_ONLY]
SMALL = {"r": 3, "k": 2, "alpha": 6, "width": 4, "length": 3, "gate": "zero"}
every_kind = pytest.mark.parametrize("path", KINDS, ids=lambda p: p.stem)


def configured(path: Path, **changes: Any) -> dict[str, Any]:
    """A kind's configuration at the size of the tiny towers, around both of them where it can."""
    config: dict[str, Any] = OmegaConf.to_container(tiny.loaded(path))
    towers = ["lm"] if path.stem in ("soft_prompt", "prefix_tuning") else ["lm", "encoder"]
    return config | {k: v for k, v in SMALL.items() if k in config} | {"parts": towers} | changes


def adapter(path: Path, **changes: Any) -> Any:
    return instantiate(configured(path, **changes))


@torch.no_grad()
def stir(model: VLM, seed: int = 3) -> None:
    """Random values in every tensor of the adapters that act."""
    generator = torch.Generator().manual_seed(seed)
    for part, named in model.parts().items():
        if f"{part}.base" in model.parts():
            for _, p in named:
                p += torch.randn(p.shape, generator=generator) * 0.2


def stage(adapter_config: dict[str, Any]) -> Stage:
    rates = dict.fromkeys(adapter_config["parts"], 1e-3)
    return Stage(
        index=0, name="s", module="x.X", train=rates, data="d", objective=LM_LOSS, steps=3, batch_size=1,
        adapter=adapter_config,
    )  # fmt: skip


@torch.no_grad()
def logits(model: VLM, samples: list[Sample] = SAMPLES) -> Tensor:
    return model.eval()(collator(model, pack_length=90)(samples)).logits


# -- the file, and going on -------------------------------------------------------------------------------------------


@every_kind
def test_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    config = configured(path)
    first = StagedModel(vlm())
    first.enter(stage(config))
    stir(first.model)
    first.save(tmp_path / "a.safetensors", stage(config), OmegaConf.create({}))
    optimizer = AdamW(first.trained().values())
    save_last(tmp_path / "last.ckpt", content_of(stage(config), 1, first, optimizer, {}, [], seen(first), set(), 0.0))
    want = logits(first.model)
    torch.manual_seed(11)  # another process starts its adapters otherwise
    for read in ("load", "load_last"):
        second = StagedModel(vlm())
        second.enter(stage(config))
        assert worst(logits(second.model), want) > 1e-3
        if read == "load":
            second.load(tmp_path / "a.safetensors")
        else:
            load_last(tmp_path / "last.ckpt", stage(config), second)
        assert torch.equal(logits(second.model), want)
    base = vlm().lm.state_dict()
    assert not set(first.kept()) & set(base), "the tower itself is not in the file"
    assert {n for part in config["parts"] for n, _ in first.model.parts()[part]} <= set(first.kept())


def test_pissa_is_saved_and_loaded(tmp_path: Path) -> None:
    config = configured(KINDS[0].with_name("lora.yaml"), pissa=True)
    first = StagedModel(vlm())
    before = logits(first.model)
    first.enter(stage(config))
    assert worst(logits(first.model), before) < 1e-5
    stir(first.model)
    first.save(tmp_path / "a.safetensors", stage(config), OmegaConf.create({}))
    second = StagedModel(vlm())
    second.enter(stage(config))
    second.load(tmp_path / "a.safetensors")
    assert worst(logits(second.model), logits(first.model)) < 1e-6
    with pytest.raises(UserError, match="cannot be switched off"):
        second.model.switch(None)
    with pytest.raises(UserError, match="no second adapter"):
        second.model.set_adapter(LoraAdapter(name="b"))


# -- several on one tower ---------------------------------------------------------------------------------------------


@every_kind
def test_several_share_one_tower(path: Path, tmp_path: Path) -> None:
    staged = StagedModel(vlm())
    model: VLM = staged.model
    plain, size = logits(model), sum(p.numel() for p in model.parameters())
    staged.enter(stage(configured(path, name="one")))
    stir(model)
    a = logits(model)
    staged.enter(stage(configured(path, name="two")))
    parts = model.parts()
    first, second = ([f"{n}." for n, _ in parts[part]] for part in ("lm.one", "lm"))
    assert first and [n.replace(".one.", ".two.") for n in first] == second
    assert not any(p.requires_grad for n in ("lm.one", "lm.base") for _, p in parts[n])
    if path.stem != "soft_prompt":
        assert torch.equal(logits(model), plain), "a second adapter starts from the tower, not from the first"
    stir(model, seed=4)
    b = logits(model)
    assert min(worst(a, plain), worst(b, plain), worst(a, b)) > 1e-3
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, want in (("one", a), ("two", b), (None, plain), ("one", a)):
        model.switch(name)
        assert torch.equal(logits(model), want)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    own = sum(p.numel() for n, p in model.named_parameters() if n in model.adapter_tensors("one"))
    assert sum(p.numel() for p in model.parameters()) == size + 2 * own, "one tower"
    staged.save(tmp_path / "both.safetensors", stage(configured(path)), OmegaConf.create({}))
    other = vlm()
    load_adapter(other, adapter(path, name="two"), tmp_path / "both.safetensors")
    load_adapter(other, adapter(path, name="one"), tmp_path / "both.safetensors")
    assert torch.equal(logits(other), a)
    with pytest.raises(CheckpointError, match="no fitting"):
        load_adapter(other, adapter(path, name="three"), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="no adapter z"):
        model.switch("z")


def test_one_kind_on_a_tower() -> None:
    model = vlm()
    model.set_adapter(LoraAdapter(r=2))
    with pytest.raises(UserError, match="one kind of adapter"):
        model.set_adapter(LnTuningAdapter())
    for name in ("base", "a.b", "", "keys"):
        with pytest.raises(UserError, match="cannot name weights"):
            LoraAdapter(name=name)


def test_two_tasks_one_tower() -> None:
    """Trained apart, switched per request: each task has its accuracy, and the other's answers are not given."""
    model = vlm().requires_grad_(False)
    names = {"a": "red", "b": "two green squares"}
    tasks = {n: Sample("t", ONE_TURN.images, (Turn("what colour is it", answer),)) for n, answer in names.items()}
    for name, sample in tasks.items():
        torch.manual_seed(0)
        model.set_adapter(LoraAdapter(r=4, name=name))
        parameters = [p.requires_grad_() for _, p in model.parts()["lm"]]
        optimizer, batch = AdamW(parameters, lr=1e-2), collator(model)([sample])
        for _ in range(30):
            outputs = model(batch)
            F.cross_entropy(outputs.logits, outputs.targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.requires_grad_(False)
    said = {}
    for name in ("a", "b", "a", None):
        model.switch(name)
        said[name] = model.eval().generate(collator(model).ask([ONE_TURN]), 8)[0]
    assert {n: said[n] for n in names} == names and said[None] not in names.values()
    for name, answer in names.items():
        merged = copy.deepcopy(model)
        merged.switch(name)
        merged.merge()
        assert merged.generate(collator(merged).ask([ONE_TURN]), 8) == [answer]


# -- merging ----------------------------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_merged_equals_unmerged(path: Path) -> None:
    model = vlm()
    names = set(model.state_dict())
    model.set_adapter(adapter(path))
    stir(model)
    want = logits(model)
    if path.stem not in MERGE:
        with pytest.raises(UserError, match="cannot be merged"):
            model.merge()
        return
    model.merge()
    assert set(model.state_dict()) == names and set(model.parts()) == set(vlm().parts())
    assert worst(logits(model), want) < 1e-5 * max(1, float(want.abs().max()))


# -- inside the LM ----------------------------------------------------------------------------------------------------


@every_kind
def test_no_answer_logit_depends_on_later_answers(path: Path) -> None:
    model = vlm()
    model.set_adapter(adapter(path))
    stir(model)
    model.eval().requires_grad_(False)
    assert leak(model.lm, Bidirectional(), collator(model, pack_length=200)(SAMPLES)) == 0.0


@pytest.mark.parametrize("tower", [qwen2, gemma3], ids=lambda t: t.__name__)
@every_kind
def test_cached_decoding_equals_full_forwards(path: Path, tower: Any) -> None:
    model = vlm(lm=HfLanguageModel(str(tower())))
    plain = cache_free(model, asked(model), 8)[0]
    model.set_adapter(adapter(path))
    stir(model)
    batch = asked(model.eval())
    want, lead = cache_free(model, batch, 8)
    assert lead > 1e-5 and want.tolist() != plain.tolist()
    seen = model.see(batch)
    arguments = (model.embed(batch, seen), batch.layout, model.mask, 8, model.inside(batch, seen))
    assert model.lm.generate(*arguments, eos_token_id=-1).tolist() == want.tolist()


@every_kind
def test_gradients_reach_every_tensor_and_survive_checkpointing(path: Path) -> None:
    found = []
    vlm(lm=HfLanguageModel(str(qwen2())))  # makes their files, for which it draws random numbers
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = vlm(lm=HfLanguageModel(str(qwen2()), gradient_checkpointing=checkpointing)).requires_grad_(False)
        model.set_adapter(adapter(path, **({"dropout": 0.0} if path.stem in ("mma", "lora") else {})))
        stir(model)
        trained = [(n, p.requires_grad_()) for part in ("lm", "encoder") for n, p in model.parts()[part]]
        trained = [(n, p) for n, p in trained if n in model.adapter_tensors("default")]
        outputs = model.train()(collator(model)(SAMPLES))
        model.lm.logits(model.lm.states(model.lm.embed(torch.zeros(1, 1).long()), one(), model.mask))  # another reading
        F.cross_entropy(outputs.logits, outputs.targets).backward()
        assert [n for n, p in trained if p.grad is None or not p.grad.abs().sum()] == []
        found.append([p.grad for _, p in trained])
    assert max(worst(a, b) for a, b in zip(*found, strict=True)) < 1e-5


def one() -> Layout:
    """A layout of one word."""
    none, first = torch.tensor([[-1]]), torch.tensor([[0]])
    return Layout(kind=first + 1, image=none, tile=none, segment=first, role=first + 1, position=first)


def test_lora_plus_has_a_rate_of_its_own_for_b() -> None:
    model = vlm().requires_grad_(False)
    model.set_adapter(LoraAdapter(r=2, lr_ratio=8.0))
    module = StageModule(model, stage({"parts": ["lm"]}), {}, {"lm": 1e-3})
    groups = module.configure_optimizers().param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {g["ratio"]: {"lora_B" in names[id(p)] for p in g["params"]} for g in groups} == {1.0: {False}, 8.0: {True}}
    model = vlm()
    model.set_adapter(LoraAdapter(r=2))
    assert model.ratios() == {}


# -- formulas ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bottleneck_by_hand() -> None:
    model = vlm()
    plain = copy.deepcopy(model)
    model.set_adapter(BottleneckAdapter(width=4, targets=["down_proj"], activation="relu"))
    stir(model)
    sites = [(n, m) for n, m in model.lm.model.named_modules() if n.endswith("down_proj")]
    assert len(sites) == 4
    x = torch.randn(2, 5, 48)
    for name, module in sites:
        branch = module.adapters["default"]
        y = plain.lm.model.get_submodule(name)(x)
        centred = y - y.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * branch.norm.weight
        inner = ((normed + branch.norm.bias) @ branch.down.weight.T + branch.down.bias).clamp(min=0)
        assert worst(module(x), y + inner @ branch.up.weight.T + branch.up.bias) < 1e-5
        assert sum(p.numel() for p in branch.parameters()) == 2 * 32 * 4 + 4 + 32 + 2 * 32
    outside = [n for n, _ in model.lm.model.named_modules() if n.endswith("o_proj.adapters")]
    assert not outside, "Pfeiffer's adapter is after the FFN alone"


@torch.no_grad()
def test_comp_lora_stays_in_the_complement() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 12)
    update = CompLora(weight, r=4, k=5, scale=2.0, dropout=0.0)
    assert worst(update(torch.randn(3, 12)), torch.zeros(3, 20)) == 0
    nn.init.normal_(update.b.weight)
    u, _, vh = torch.linalg.svd(weight)
    left, right = torch.eye(20), torch.eye(12)
    for i in range(5):
        left -= u[:, i, None] @ u[None, :, i]
        right -= vh[i, :, None] @ vh[i, None]
    by_hand = 2.0 * left @ update.b.weight @ update.a.weight @ right
    assert worst(update.weight(), by_hand) < 1e-5
    x = torch.randn(3, 12)
    assert worst(update(x), x @ by_hand.T) < 1e-5
    assert (u[:, :5].T @ update.weight()).abs().max() < 1e-5 and (update.weight() @ vh[:5].T).abs().max() < 1e-5
    assert (u[:, :5].T @ update.b.weight).abs().max() > 0.1, "the test sees unprotected directions"


@torch.no_grad()
def test_comp_lora_after_merging_keeps_the_protected_directions() -> None:
    model = vlm()
    before = {n: m.weight.clone() for n, m in model.lm.model.named_modules() if isinstance(m, nn.Linear)}
    model.set_adapter(CompLoraAdapter(r=3, k=2))
    stir(model)
    model.merge()
    for name, module in model.lm.model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            u, _, vh = torch.linalg.svd(before[name])
            change = module.weight - before[name]
            assert change.abs().max() > 1e-2
            assert max((u[:, :2].T @ change).abs().max(), (change @ vh[:2].T).abs().max()) < 2e-6
    narrow = vlm()
    narrow.set_adapter(CompLoraAdapter(k=16))  # keys and values are 16 wide here
    assert not any("k_proj" in n for n, _ in narrow.parts()["lm"]) and narrow.parts()["lm"]
    with pytest.raises(UserError, match="fits no layer"):
        vlm().set_adapter(CompLoraAdapter(k=200))


@torch.no_grad()
def test_mma_by_hand() -> None:
    torch.manual_seed(0)
    modality = nn.Embedding(2, 6)
    mixture = Mixture(modality, width=4, temperature=10.0, scale=0.5, dropout=0.1).eval()
    x, which = torch.randn(2, 3, 6), torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert not mixture(x, which).any()
    for p in mixture.parameters():
        p.normal_()
    want = torch.zeros_like(x)
    for b in range(2):
        for s in range(3):
            router = mixture.router.weight @ modality.weight[which[b, s]] + mixture.router.bias
            shares = torch.exp(router / 10) / torch.exp(router / 10).sum()
            inner = mixture.down.weight @ x[b, s] + mixture.down.bias
            for share_of, branch in zip(shares, mixture.up, strict=True):
                for g in range(2):  # each half of the output reads its half of the bottleneck
                    rows = slice(3 * g, 3 * g + 3)
                    out = branch.weight[rows, :, 0] @ inner[2 * g : 2 * g + 2] + branch.bias[rows]
                    want[b, s, rows] += 0.5 * share_of * out
    assert worst(mixture(x, which), want) < 1e-5


def test_mma_has_as_many_weights_as_lavin() -> None:
    """7B: 32 layers of 4096 in the LM and 24 of 1024 in CLIP, with the visual neck 3.8M."""

    def size(features: int, depth: int) -> int:
        mixture = Mixture(nn.Embedding(2, features), width=8, temperature=10.0, scale=1.0, dropout=0.1)
        own = sum(p.numel() for p in mixture.parameters()) - 2 * features
        assert own == features * 8 + 8 + features * 8 + 2 * features + 2 * features + 2
        return depth * own

    neck = 1024 * 128 + 128 + 128 * 4096 + 4096
    assert size(4096, 32) + size(1024, 24) + neck + 2 * 4096 == 3_781_296


@torch.no_grad()
def test_mma_reads_the_modality_of_each_packed_sample() -> None:
    model = vlm()
    model.set_adapter(MmaAdapter())
    stir(model)
    alone = [logits(model, [sample]) for sample in (TEXT_ONLY, ONE_TURN)]
    packed = logits(model, [TEXT_ONLY, ONE_TURN])
    assert worst(packed, torch.cat(alone)) < 1e-5
    mixture = next(m for m in model.modules() if isinstance(m, Mixture))
    assert worst(*mixture.weights()) > 1e-3, "text and images are routed differently"
    make = collator(model)
    read = modalities(model, lambda: model(collator(model, pack_length=400)([TEXT_ONLY, ONE_TURN])))
    segment = collator(model, pack_length=400)([TEXT_ONLY, ONE_TURN]).layout.segment
    assert len(read) == 4 and all(torch.equal(each, segment.eq(1).long()) for each in read)
    read = modalities(model, lambda: model.generate(make.ask([ONE_TURN, TEXT_ONLY]), 4, num_beams=2))
    assert [row[-1] for each in read for row in each.tolist()] == [1, 1, 0, 0] * len(read) and len(read) > 4
    read = modalities(model, lambda: model.lm.model(torch.zeros(1, 2).long()))
    assert not torch.cat(read).any(), "an LM that is used by itself reads text"


def modalities(model: Any, act: Any) -> list[Tensor]:
    """What the LM's attention modules take for the modality of their positions while `act()` runs."""
    read: list[Tensor] = []
    layers = [m for m in model.lm.modules() if isinstance(m, MmaLayer)]
    hooks = [m.adapters["default"].register_forward_pre_hook(lambda _, args: read.append(args[1])) for m in layers]
    act()
    for hook in hooks:
        hook.remove()
    return read


@torch.no_grad()
def test_mma_sees_an_image_that_takes_no_position() -> None:
    encoder = HfEncoder(str(siglip()), layers=[-2])
    model = vlm(encoder=encoder, fusion=Aside())
    model.set_adapter(MmaAdapter())
    batch = collator(model)([ONE_TURN, TEXT_ONLY])
    assert not batch.layout.visual.any() and len(batch.images) == 1
    for each in modalities(model, lambda: model(batch)):
        assert torch.equal(each, (batch.layout.valid & torch.tensor([[True], [False]])).long())


class Aside(Fusion):
    """Looks at images and does nothing with them."""

    reads, in_sequence, starts_as = "tokens", False, "text_only"


def test_mma_refuses_a_family_whose_layers_are_unknown() -> None:
    tower = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    before = [name for name, _ in tower.named_modules()]
    with pytest.raises(UserError, match="layers of the family gpt2"):
        MmaAdapter(targets=["attn"]).wrap(tower)
    assert [name for name, _ in tower.named_modules()] == before


@torch.no_grad()
def test_soft_prompts_stand_before_every_sample() -> None:
    model = vlm()
    plain = collator(model, pack_length=200)([ONE_TURN, TWO_TURNS])
    model.set_adapter(SoftPromptAdapter(length=3))
    make = collator(model, pack_length=200)
    batch = make([ONE_TURN, TWO_TURNS])
    prompt = batch.input_ids < 0
    assert batch.input_ids[prompt].tolist() == [-1, -2, -3] * 2
    assert batch.layout.position[prompt].tolist() == [0, 1, 2] * 2
    assert not batch.layout.role[prompt].any() and not batch.layout.visual[prompt].any()
    assert batch.layout.segment[prompt].tolist() == [0] * 3 + [1] * 3
    assert torch.equal(batch.input_ids[~prompt], plain.input_ids[0]) and torch.equal(
        batch.labels[~prompt], plain.labels[0]
    )
    weight = model.lm.model.get_input_embeddings().adapters["default"].weight
    assert torch.equal(model.lm.embed(batch.input_ids)[prompt], weight.repeat(2, 1))
    table = model.lm.model.get_output_embeddings().weight  # the untied head does not know the prompt
    assert len(table) == len(vlm().lm.model.get_output_embeddings().weight)
    model.switch(None)
    assert model.prompt_tokens == 0
    with pytest.raises(ValueError, match="make it again"):
        model(batch)


def test_norms_are_found_by_their_shape() -> None:
    assert len(norms(vlm().lm.model)) == 4 * 2 + 1
    assert len(norms(HfLanguageModel(str(gemma3())).model)) == 4 * 6 + 1
    model = vlm()
    found = norms(model.encoder.tower)
    assert found and all("norm" in name for name in found)
    model.set_adapter(LnTuningAdapter(["lm", "encoder"]))
    assert norms(model.encoder.tower) == found


def test_targets_that_are_not_there_are_refused() -> None:
    for wrong in (
        LoraAdapter(targets=["nothing"]),
        Ia3Adapter(targets=["nothing"], feedforward=[]),
        LnTuningAdapter(targets=["nothing"]),
        BottleneckAdapter(targets=["nothing"]),
        MmaAdapter(targets=["nothing"]),
    ):
        with pytest.raises(UserError, match="nothing fits no layer"):
            vlm().set_adapter(wrong)
    with pytest.raises(UserError, match="linear layers"):
        vlm().set_adapter(BottleneckAdapter(targets=["self_attn"]))


def test_the_pooling_head_is_left_alone() -> None:
    """Its attention uses the weights of its projection without calling it."""
    tower = HfEncoder(str(siglip()), pooled=True).tower
    assert any("out_proj" in n for n, _ in select(tower, ["out_proj"]))
    assert not any("head" in n for n, _ in select(tower, ["out_proj"]))


def test_shares_and_bytes() -> None:
    model = vlm()
    model.set_adapter(LoraAdapter(r=1))
    found = share(model, ("lm",))
    adapted = sum(p.numel() for _, p in model.parts()["lm"])
    total = sum(p.numel() for p in model.parameters())
    assert found == {"trainable": adapted, "params": total, "share": adapted / total}
    parameters = [p for _, p in model.parts()["lm"]]
    optimizer = AdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    weights = sum(p.nbytes for p in model.parameters())
    assert training_bytes(model, ("lm",)) == weights + sum(p.grad.nbytes for p in parameters) + held


@every_kind
def test_an_adapter_trains_less_than_five_percent(path: Path) -> None:
    """Of the embedded composition with its connector; at rank 4 where there is one, since the LM is only 128 wide."""
    config = OmegaConf.to_container(tiny.loaded(path))
    lm = EmbeddedLanguageModel()
    encoder = EmbeddedEncoder()
    model = vlm(lm=lm, encoder=encoder, connector=MlpConnector(encoder.width, lm.width))
    model.set_adapter(instantiate(config | ({"r": 4} if "r" in config else {})))
    train = ("connector", "lm")
    assert 0 < share(model, train)["share"] < 0.05
    assert training_bytes(model, train) < 0.5 * training_bytes(model, (*train, "lm.base"))
