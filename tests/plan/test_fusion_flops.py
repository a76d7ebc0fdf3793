"""What a plan counts for fusions, against formulas written down from the papers: 2 FLOPs per multiply-add.

Backward a product is done again for the gradient of its input and once more for that of its weights, as far as either
is wanted; an attention has five products instead of two, since fused kernels compute the scores again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.plan.test_plan import A100, batch, entered
from tests.test_conf import composed

from vlmlab.engine.weights import StagedModel
from vlmlab.plan.plan import Settings, Shape, plan
from vlmlab.plan.simulation import Simulator
from vlmlab.recipe.stage import parse

ASKED, ANSWERED = 20, 60
TEXT = ASKED + ANSWERED


@dataclass(frozen=True)
class Count:
    """FLOPs forward, and of the gradients of inputs and of weights."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights)

    def __mul__(self, times: int) -> Count:
        return Count(self.forward * times, self.inputs * times, self.weights * times)

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights

    @property
    def frozen(self) -> Count:
        """The weights do not train and something before them does."""
        return replace(self, weights=0.0)

    @property
    def first(self) -> Count:
        """The weights train and nothing before them does."""
        return replace(self, inputs=0.0)

    @property
    def still(self) -> Count:
        """Nothing trains here or before."""
        return Count(self.forward)


def matrix(rows: int, size: int) -> Count:
    """`rows` vectors through a matrix of so many numbers."""
    return Count(2 * rows * size, 2 * rows * size, 2 * rows * size)


def attention(queries: int, keys: int, width: int) -> Count:
    return Count(4 * queries * keys * width, 10 * queries * keys * width)


def transformer(tokens: int, layers: int, width: int, hidden: int) -> Count:
    """A plain tower: four projections, attention, two layers of an MLP."""
    return (matrix(tokens, 4 * width**2 + 2 * width * hidden) + attention(tokens, tokens, width)) * layers


@dataclass(frozen=True)
class Sizes:
    """What the formulas need of a composition; `n` visual tokens from as many patches."""

    n: int
    vision: Any
    vision_layers: int
    text: Any

    @classmethod
    def of(cls, model: Any) -> Sizes:
        tower = model.encoder.tower
        rows, columns = model.encoder.hw
        return cls(rows * columns, tower.config, len(tower.encoder.layers), model.lm.model.config)

    @property
    def d(self) -> int:
        return int(self.text.hidden_size)

    def encoder(self) -> Count:
        v = self.vision
        patches = matrix(self.n, 3 * v.patch_size**2 * v.hidden_size)
        return (patches + transformer(self.n, self.vision_layers, v.hidden_size, v.intermediate_size)).still

    def connector(self) -> Count:
        """Two layers, on features that do not train."""
        return matrix(self.n, self.vision.hidden_size * self.d).first + matrix(self.n, self.d**2)

    def layer(self, s: int) -> Count:
        t = self.text
        head = self.d // t.num_attention_heads
        projections = 2 * self.d * head * (t.num_attention_heads + t.num_key_value_heads)
        return matrix(s, projections + 3 * self.d * t.intermediate_size) + attention(s, s, self.d)

    def head(self) -> Count:
        return matrix(ANSWERED, self.d * self.text.vocab_size)


def lavi_once(z: Sizes, c: int) -> Count:
    """W_v, one for all norms."""
    return matrix(z.n, z.d * c)


def lavi_norm(z: Sizes, c: int, conditioner: str) -> Count:
    """arXiv 2506.16691 with our conditioners: W_in and W_out of text positions, and what makes u."""
    ends = matrix(TEXT, z.d * c) + matrix(TEXT, c * 2 * z.d)
    if conditioner == "attention":
        return ends + matrix(TEXT, 2 * c * c) + matrix(z.n, 2 * c * c) + attention(TEXT, z.n, c)
    by_text, by_image = matrix(TEXT, c * c), matrix(1, c * c)  # W_x x, and W_m v once an image
    if conditioner == "mlp":
        return ends + by_text + by_image + matrix(c, 2 * z.n * z.n) + matrix(z.n, 8 * c * c)
    return ends + by_text + by_image + matrix(z.n, 25 * c + c * c) * 2


def gated_block(z: Sizes, inner: int, mlp: str) -> Count:
    """arXiv 2204.14198, section 2.2: queries and outputs of text, keys and values once an image, 4 d inside."""
    asks = matrix(TEXT, 2 * z.d * inner) + matrix(z.n, 2 * z.d * inner) + attention(TEXT, z.n, inner)
    return asks + matrix(TEXT, (3 if mlp == "swiglu" else 2) * z.d * 4 * z.d)


def vlora(z: Sizes, g: int, layers: int, depth: int, rank: int) -> Count:
    """arXiv 2405.20339: the image's projection, a generator per type, then x A and B of text in every layer."""
    t = z.text
    kv = z.d // t.num_attention_heads * t.num_key_value_heads
    decoder = matrix(layers, (4 + 2 + 8) * g * g) + matrix(z.n, 2 * g * g)
    decoder = decoder + attention(layers, layers, g) + attention(layers, z.n, g)
    made = decoder * depth + matrix(layers, g * z.d * rank)
    used = sum((matrix(TEXT, (z.d + out) * rank) for out in (z.d, kv, kv, z.d, z.d)), Count())
    return matrix(z.n, z.d * g) + made * 5 + used * layers


def emma(z: Sizes, text: Any) -> tuple[Count, Count]:
    """arXiv 2410.02080: the text tower, W_p on all its positions, A of every channel; the tower is frozen."""
    c = text.tower.config
    read = transformer(text.context, c.num_hidden_layers, c.hidden_size, c.intermediate_size).still
    mixed = matrix(text.context, c.hidden_size * z.vision.hidden_size).first
    return read, mixed + matrix(z.vision.hidden_size, z.n * (z.n + text.context))


def found_and_model(index: int, *overrides: str) -> tuple[Any, StagedModel]:
    cfg = composed(*overrides)
    stage = parse(cfg)[index]
    staged = entered(cfg, stage)
    return Simulator(staged, half=True)(batch(cfg, stage, staged, Shape(1, ASKED, ANSWERED))), staged


def agree(found: Any, wanted: Count) -> None:
    print(found.forward / wanted.forward, found.total / wanted.total)
    assert found.forward == pytest.approx(wanted.forward, rel=0.01)
    assert found.total == pytest.approx(wanted.total, rel=0.01)


@pytest.mark.parametrize("conditioner", ["attention", "mlp", "conv"])
@pytest.mark.parametrize("every", [1, 4])
def test_lavi(conditioner: str, every: int) -> None:
    found, staged = found_and_model(3, "fusion=lavi", f"fusion.conditioner={conditioner}", f"fusion.every={every}")
    z, norms = Sizes.of(staged.model), 2 * (staged.model.lm.model.config.num_hidden_layers // every)  # type: ignore[union-attr]
    blocks = lavi_norm(z, z.d // 2, conditioner) * norms
    lm = z.layer(TEXT) * z.text.num_hidden_layers + z.head()
    agree(found, z.encoder() + z.connector() + lavi_once(z, z.d // 2) + blocks + lm)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("every", [1, 4])
def test_gated_cross_attention(mlp: str, every: int) -> None:
    found, staged = found_and_model(3, "fusion=gated_xattn", f"fusion.mlp={mlp}", f"fusion.every={every}")
    z, layers = Sizes.of(staged.model), staged.model.lm.model.config.num_hidden_layers  # type: ignore[union-attr]
    lm = z.layer(TEXT) * layers + z.head()
    agree(found, z.encoder() + z.connector() + gated_block(z, z.d, mlp) * (layers // every) + lm)


@pytest.mark.parametrize("sublayers", ["both", "attention", "mlp"])
def test_visual_experts_compute_what_the_lm_did(sublayers: str) -> None:
    """With copies of all of them a position goes through as many linear maps as before."""
    found, staged = found_and_model(3, "fusion=visual_expert", f"fusion.sublayers={sublayers}")
    z = Sizes.of(staged.model)
    agree(found, z.encoder() + z.connector() + z.layer(z.n + TEXT) * z.text.num_hidden_layers + z.head())


def skipping(z: Sizes, rest: int) -> Count:
    """A layer whose visual positions have no query; `rest` positions go through the output and the MLP."""
    t = z.text
    head = z.d // t.num_attention_heads
    asked, known = z.d * t.num_attention_heads * head, 2 * z.d * t.num_key_value_heads * head
    behind = matrix(rest, asked + 3 * z.d * t.intermediate_size)
    return matrix(TEXT, asked) + matrix(z.n + TEXT, known) + attention(TEXT, z.n + TEXT, z.d) + behind


def test_composite_saves_what_the_queries_of_images_cost() -> None:
    """arXiv 2408.11795 as we read it: 2 V d^2 + 4 V (T + V) d a layer, with grouped heads too."""
    found, staged = found_and_model(3, "fusion=composite")
    dense, _ = found_and_model(3, "fusion=concat", "mask=visual_self_only")
    z, layers = Sizes.of(staged.model), staged.model.lm.model.config.num_hidden_layers  # type: ignore[union-attr]
    agree(found, z.encoder() + z.connector() + skipping(z, z.n + TEXT) * layers + z.head())
    saved = layers * (2 * z.n * z.d**2 + 4 * z.n * (TEXT + z.n) * z.d)
    assert dense.forward - found.forward == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("every", [1, 5])
def test_saisa(every: int) -> None:
    found, staged = found_and_model(3, "fusion=saisa", f"fusion.every={every}")
    z, layers = Sizes.of(staged.model), staged.model.lm.model.config.num_hidden_layers  # type: ignore[union-attr]
    projections = matrix(z.n, 2 * z.d**2) * (layers if every == 1 else 2)  # one, in the sequence and for the others
    agree(found, z.encoder() + z.connector() + projections + skipping(z, TEXT) * layers + z.head())


def test_deepstack() -> None:
    """A merge for each layer of the encoder but the last, on features that do not train."""
    found, staged = found_and_model(3, "fusion=deepstack", "encoder.layers=[1,2,3]")
    z = Sizes.of(staged.model)
    v = z.vision.hidden_size
    merges = (matrix(z.n, v * v) + matrix(z.n, v * z.d)) * 2  # the norm before them has weights
    agree(found, z.encoder() + z.connector() + merges + z.layer(z.n + TEXT) * z.text.num_hidden_layers + z.head())


def test_a_frozen_lm_is_gone_back_through_from_the_first_block_on() -> None:
    """Below the block of the fourth layer nothing wants a gradient."""
    found, staged = found_and_model(0, "fusion=gated_xattn", "fusion.every=4")
    z, layers = Sizes.of(staged.model), staged.model.lm.model.config.num_hidden_layers  # type: ignore[union-attr]
    assert layers == 5
    lm = z.layer(TEXT).still * 3 + z.layer(TEXT).frozen * 2 + z.head().frozen
    agree(found, z.encoder() + z.connector() + gated_block(z, z.d, "gelu") + lm)  # its first norm has weights


def test_perceptual_weights() -> None:
    found, staged = found_and_model(3, "fusion=vlora", "fusion.rank=32")
    z = Sizes.of(staged.model)
    layers = z.text.num_hidden_layers
    lm = z.layer(TEXT) * layers + z.head()
    agree(found, z.encoder() + z.connector() + vlora(z, z.d // 2, layers, 2, 32) + lm)


def test_experts() -> None:
    """arXiv 2401.15947: in every second layer two networks a token, and the router."""
    found, staged = found_and_model(3, "fusion=moe")
    z = Sizes.of(staged.model)
    s = z.n + TEXT
    more = matrix(s, 3 * z.d * z.text.intermediate_size) + matrix(s, z.d * 4)
    lm = z.layer(s) * z.text.num_hidden_layers + more * (z.text.num_hidden_layers // 2) + z.head()
    agree(found, z.encoder() + z.connector() + lm)


@pytest.mark.parametrize("name", ["prefix", "moda", "mixture_of_transformers"])
def test_fusions_around_and_beside_the_attention(name: str) -> None:
    """A prefix's keys and their softmax; G q, of two products, and changed scores; copies cost what they replace."""
    found, staged = found_and_model(3, f"fusion={name}")
    z = Sizes.of(staged.model)
    s, layers = z.n + TEXT, z.text.num_hidden_layers
    head = z.d // z.text.num_attention_heads
    if name == "prefix":
        lm = z.layer(TEXT) + matrix(z.n, 2 * z.d * head * z.text.num_key_value_heads) + attention(TEXT, z.n, z.d)
        agree(found, z.encoder() + z.connector() + lm * layers + z.head())
        return
    lm = z.layer(s)
    if name == "moda":  # two products of two changing operands, and W_1 and W_2 of either kind of query
        lm = lm + Count(6 * s * s * z.d, 12 * s * s * z.d) + matrix(s, 4 * z.d * head)
        lm = lm + Count(2 * s * s * z.text.num_attention_heads, 2 * s * s * z.text.num_attention_heads)
        assert found.forward == pytest.approx((z.encoder() + z.connector() + lm * layers + z.head()).forward, rel=0.01)
        return
    assert found.forward == pytest.approx((z.encoder() + z.connector() + lm * layers + z.head()).forward, rel=0.01)


def test_emma_with_its_text_tower() -> None:
    found, staged = found_and_model(3, "fusion=emma")
    model: Any = staged.model
    z = Sizes.of(model)
    read, mixed = emma(z, model.text)
    connector = matrix(z.n, z.vision.hidden_size * z.d) + matrix(z.n, z.d**2)  # features train now
    lm = z.layer(z.n + TEXT) * z.text.num_hidden_layers + z.head()
    agree(found, z.encoder() + read + mixed + connector + lm)


def stated(index: int, *overrides: str) -> Any:
    cfg = composed("collate.pack_length=null", *overrides)
    name = parse(cfg)[index].name
    return plan(cfg, Settings(A100, lengths={name: [ASKED, ANSWERED]}), only=[name])[0]


def test_the_parts_of_a_plan() -> None:
    """What a fusion adds is counted under its own part; the text tower is frozen like the encoder."""
    found = {name: stated(0, f"fusion={name}") for name in ("concat", "lavi", "gated_xattn", "emma")}
    shown = {name: f.visual_tokens for name, f in found.items()}
    assert shown == {"concat": 16, "lavi": 0, "gated_xattn": 0, "emma": 16}
    assert found["emma"].length == found["concat"].length == found["lavi"].length + 16
    for name, f in found.items():
        assert ("fusion" in f.parameters, "text" in f.parameters) == (name != "concat", name == "emma")
        trained = sum(trained for _, trained in f.parameters.values())
        assert f.file == 4 * trained and f.gradients == 4 * trained
    assert found["emma"].parameters["text"][1] == 0 < found["emma"].parameters["text"][0]


@pytest.mark.slow
def test_real_size() -> None:
    """Qwen2-0.5B and SigLIP-So400m: what a fusion costs more than the same text without any image."""
    real, c = ("lm=qwen2_0_5b", "encoder=siglip_so400m_384", "collate.pack_length=null"), 448
    blind, _ = found_and_model(3, "fusion=none", *real)
    for name in ("lavi", "gated_xattn"):
        found, staged = found_and_model(3, f"fusion={name}", "fusion.every=4", *real)
        model: Any = staged.model
        z, size = Sizes.of(model), sum(p.numel() for p in model.fusion.parameters())
        assert (z.n, z.d, z.text.num_hidden_layers) == (729, 896, 24)
        if name == "lavi":
            blocks = lavi_once(z, c) + lavi_norm(z, c, "attention") * 12
            assert size == 12 * 2_009_280 + 896 * 448 + 448  # the connector's tokens have the LM's width
        else:
            blocks = gated_block(z, 896, "gelu") * 6
        wanted = z.encoder() + z.connector() + blocks
        print(name, size, blind.forward / 1e9, found.forward / 1e9, wanted.forward / 1e9)
        assert found.forward - blind.forward == pytest.approx(wanted.forward, rel=0.01)
        assert found.total - blind.total == pytest.approx(wanted.total, rel=0.02)


@pytest.mark.parametrize("index", [0, 1])
def test_asvr_goes_through_the_lm_once(index: int) -> None:
    """The text's loss and the codes' read the same states; the head and the nearest codes are little."""
    found, staged = found_and_model(index, "preset=asvr")
    z = Sizes.of(staged.model)
    lm = z.layer(z.n + TEXT) * z.text.num_hidden_layers + z.head()
    once = z.encoder() + z.connector() + (lm if index else lm.frozen)
    codes = matrix(z.n, z.d**2 + z.d * 64) + matrix(64, z.n * z.vision.hidden_size).still
    assert once.forward < found.forward < 1.02 * once.forward
    agree(found, once + codes)


def test_asvr_can_be_planned() -> None:
    cfg = composed("preset=asvr")
    found = plan(cfg, Settings(A100, lengths={stage.name: [ASKED, ANSWERED] for stage in parse(cfg)}))
    assert [stage.name for stage in found] == ["align", "instruct"]
    assert all(stage.training > stage.forward > 0 and stage.parameters["objective"][1] > 0 for stage in found)
