"""Every fusion keeps its word and its place: one set of tests over all of ``conf/fusion`` and several LM families."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.test_conf import composed
from tests.tiny import ADJACENT, ONE_TURN, SAMPLES, SECOND_TURN, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator, picture
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.cache.disk import DiskCache
from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch, Layout, Role, Seen
from vlmlab.contracts.watch import Watch
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.none import NoFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.lm.inside import PortedLayer
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.vlm import VLM

NAMES = [path.stem for path in tiny.choices("fusion")]
SETTINGS = ["flamingo", "idefics", "mllama", "nvlm_x"]
"""Settings of ``gated_xattn``, whose way it is with all else; what they say of themselves is held to."""
SEEING = [name for name in NAMES if name not in ("none", *SETTINGS)]
FAMILIES: dict[str, Callable[[], Path]] = {"qwen2": tiny.qwen2, "llama": tiny.llama, "gemma3": tiny.gemma3}
EVERY = [(name, family) for name in SEEING for family in FAMILIES]


@cache
def described(name: str) -> Any:
    return composed(f"fusion={name}").fusion


def built(name: str, family: str = "qwen2", **lm: Any) -> VLM:
    """The fusion among tiny towers that have a text half, as it is before its first update."""
    torch.manual_seed(0)
    fusion = instantiate(described(name))
    return compose(fusion, HfLanguageModel(str(FAMILIES[family]()), **lm))


def compose(fusion: Any, lm: HfLanguageModel) -> VLM:
    if fusion.reads == "nothing":
        return VLM(None, None, fusion, lm, Bidirectional()).eval()
    encoder = HfEncoder(str(tiny.two_towers()), layers=[-2])
    connector = tiny.spread(tiny.MlpConnector(encoder.width, lm.width), seed=1)
    text = encoder.text_tower() if fusion.reads_text else None
    return VLM(encoder, connector, fusion, lm, Bidirectional(), text).eval()


def stirred(name: str, family: str = "qwen2", **lm: Any) -> VLM:
    """The same with weights as after training: nothing of the fusion is zero any more."""
    model = built(name, family, **lm)
    tiny.spread(model.fusion, seed=3, scale=0.2)
    return model


def loss(model: VLM, batch: Batch) -> Tensor:
    outputs = model(batch)
    return torch.nn.functional.cross_entropy(outputs.logits, outputs.targets)


def equal(model: VLM, a: Tensor, b: Tensor) -> bool:
    """Bit for bit, or up to rounding where the fusion says so."""
    return tiny.worst(a, b) < 1e-5 if model.fusion.regroups else torch.equal(a, b)


def answers(batch: Batch, row: int, segment: int = 0) -> list[int]:
    """Places in ``Outputs.logits`` of the supervised tokens of one packed sample."""
    told = batch.labels[:, 1:] != -100
    rows, at = told.nonzero(as_tuple=True)
    own = (rows == row) & (batch.layout.segment[rows, at + 1] == segment)
    return own.nonzero()[:, 0].tolist()


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_declarations(name: str) -> None:
    model = built(name)
    fusion = model.fusion
    assert fusion.reads in ("tokens", "nothing") and isinstance(fusion.in_sequence, bool)
    assert fusion.starts_as in ("text_only", "concat", "nothing")
    batch = collator(model)(SAMPLES)
    assert bool(batch.layout.visual.any()) == fusion.in_sequence == (model.tokens_per_image > 0)
    assert len(batch.images) == (0 if fusion.reads == "nothing" else 7)
    names = {name for name, _ in model.lm.named_parameters()}
    assert names == {name for name, _ in HfLanguageModel(str(tiny.qwen2())).named_parameters()}
    assert fusion.has_weights == bool(list(fusion.parameters()))
    assert {id(p) for p in fusion.undecayed()} <= {id(p) for p in fusion.parameters()}


@pytest.mark.parametrize(("name", "family"), [*EVERY, *((name, "qwen2") for name in ("none", *SETTINGS))])
@torch.no_grad()
def test_it_starts_as_it_says(name: str, family: str) -> None:
    model = built(name, family)
    if model.fusion.starts_as == "nothing":
        assert "nothing" in (type(model.fusion).__doc__ or ""), "the docstring gives the reason"
        return
    other = ConcatFusion() if model.fusion.starts_as == "concat" else NoFusion()
    twin = compose(other, HfLanguageModel(str(FAMILIES[family]())))
    for pack in (None, 1000):
        ours, theirs = (collator(m, pack_length=pack)(SAMPLES) for m in (model, twin))
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert equal(model, model(ours).logits, twin(theirs).logits)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_with_no_image_it_starts_as_the_language_model(name: str) -> None:
    model = built(name)
    batch = collator(model)([TEXT_ONLY])
    lm = HfLanguageModel(str(tiny.qwen2())).eval()
    want = lm.model(input_ids=batch.input_ids, attention_mask=batch.layout.valid.long()).logits
    assert equal(model, model(batch).logits, want[:, :-1][batch.labels[:, 1:] != -100])


# -- what learns -------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_one_fusion() -> None:
    assert {described(name)._target_ for name in SETTINGS} == {described("gated_xattn")._target_}


@pytest.mark.parametrize("name", [*SEEING, *SETTINGS])
def test_the_weights_with_a_gradient_are_those_it_lists(name: str) -> None:
    model = built(name)
    batch = collator(model)(SAMPLES)
    optimizer = torch.optim.SGD(model.fusion.parameters(), lr=0.5) if list(model.fusion.parameters()) else None
    for step in (0, 1):
        model.zero_grad()
        loss(model, batch).backward()
        least = 1e-7 if model.fusion.regroups else 0.0  # rounding
        still = {n for n, p in model.fusion.named_parameters() if p.grad is None or p.grad.abs().max() <= least}
        if model.fusion.has_experts:  # one that no token has chosen
            still = {n for n in still if ".experts." not in n}
        waiting = {n for n, _ in model.fusion.named_parameters() if model.fusion.waits(n)}
        assert still == (waiting if step == 0 else set()), f"step {step}"
        if optimizer is not None:
            optimizer.step()


@pytest.mark.parametrize("name", SEEING)
def test_the_image_changes_the_answer_after_one_update(name: str) -> None:
    model = built(name)
    batch = collator(model)([ONE_TURN, TWO_TURNS])
    optimizer = torch.optim.SGD([*model.fusion.parameters(), *model.connector.parameters()], lr=0.5)
    loss(model, batch).backward()
    optimizer.step()
    with torch.no_grad():
        other = replace(batch, pixels=batch.pixels.flip(0))
        assert tiny.worst(model(batch).logits, model(other).logits) > 1e-5


# -- what must not reach what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), EVERY)
@pytest.mark.parametrize("pack", [None, 1000])
def test_no_answer_knows_a_later_answer(name: str, family: str, pack: int | None) -> None:
    """Zero gradient from an answer's logit to the embedding of that answer token and all later ones, four layers."""
    model = stirred(name, family)
    batch = collator(model, pack_length=pack)([TWO_TURNS, SECOND_TURN, TWO_IMAGES])
    answer = batch.layout.role.eq(Role.ANSWER) & batch.layout.valid
    with words(model) as found:
        logits = model.lm.logits(model(batch).states)  # (B, S, V)
    for row, at in answer.nonzero().tolist():
        (gradient,) = torch.autograd.grad(logits[row, at - 1].sum(), found[-1], retain_graph=True)
        gradient = gradient.abs().amax(-1)  # (B, S)
        later = answer.clone()
        later[row, :at] = False
        other = batch.layout.segment != batch.layout.segment[row, at]
        other[torch.arange(len(other)) != row] = True
        assert float(gradient[later | other].max()) == 0.0 < float(gradient.max())


@contextmanager
def words(model: VLM) -> Iterator[list[Tensor]]:
    """What the LM's table gives, as leaves whose gradients can be asked for."""
    found: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        found.append(out.detach().requires_grad_())
        return found[-1]

    handle = model.lm.model.get_input_embeddings().register_forward_hook(leaf)
    yield found
    handle.remove()


@pytest.mark.parametrize(("name", "family"), EVERY)
@torch.no_grad()
def test_another_image_in_one_packed_sample_changes_no_bit_of_another(name: str, family: str) -> None:
    model = stirred(name, family)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ONE_TURN, ADJACENT, TEXT_ONLY, SECOND_TURN])
    assert len(batch.input_ids) == 1
    before = model(batch).logits
    for first, count, segment in ((0, 2, 0), (2, 1, 1), (3, 2, 2), (5, 1, 4)):
        pixels = batch.pixels.clone()
        pixels[first : first + count] = torch.from_numpy(picture(70)).permute(2, 0, 1)
        after = model(replace(batch, pixels=pixels)).logits
        own = answers(batch, 0, segment)
        others = [i for i in range(len(before)) if i not in own]
        assert equal(model, before[others], after[others])
        assert tiny.worst(before[own], after[own]) > 1e-4


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_images_of_later_turns_do_not_reach_earlier_answers(name: str) -> None:
    model = stirred(name)
    for sample in (SECOND_TURN, TWO_IMAGES):
        batch = collator(model)([sample])
        pixels = batch.pixels.clone()
        pixels[-1] = torch.from_numpy(picture(71)).permute(2, 0, 1)
        before, after = model(batch).logits, model(replace(batch, pixels=pixels)).logits
        told = int(batch.labels[0, 1:].ne(-100).nonzero()[0]) + 1
        end = told + int(batch.labels[0, told:].eq(-100).nonzero()[0]) - told
        assert equal(model, before[:end], after[:end]) and tiny.worst(before[end:], after[end:]) > 1e-4


@pytest.mark.parametrize(("name", "family"), EVERY)
@torch.no_grad()
def test_text_after_images_equals_a_fresh_model(name: str, family: str) -> None:
    model = stirred(name, family)
    make = collator(model)
    fresh = stirred(name, family)(make([TEXT_ONLY])).logits
    model(make(SAMPLES))
    model.generate(make.ask([ONE_TURN]), 2)
    assert torch.equal(model(make([TEXT_ONLY])).logits, fresh)


# -- padding, packing, decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), EVERY)
@torch.no_grad()
def test_padding_and_packing_change_no_number(name: str, family: str) -> None:
    model = stirred(name, family)
    make = collator(model)
    encoded = [make.encoder.train(s) for s in SAMPLES]
    alone = torch.cat([model(make([sample])).logits for sample in SAMPLES])
    for left in (False, True):
        together = make._batch(SAMPLES, encoded, [[i] for i in range(len(SAMPLES))], left=left)
        assert tiny.worst(model(together).logits, alone) < 1e-4
    assert tiny.worst(model(collator(model, pack_length=1000)(SAMPLES)).logits, alone) < 1e-4


def questions(model: VLM) -> Batch:
    return collator(model).ask([ONE_TURN, TWO_TURNS, TWO_IMAGES, ADJACENT, TEXT_ONLY])


def grown(sample: Sample, answer: str) -> Sample:
    return replace(sample, turns=(*sample.turns[:-1], replace(sample.turns[-1], answer=answer)))


@torch.no_grad()
def cache_free(model: VLM, batch: Batch, steps: int) -> Tensor:
    """Greedy ids (B, steps) by a full forward pass a token."""
    found: list[Tensor] = []
    for _ in range(steps):
        best = model(batch).states[:, -1]
        found.append(model.lm.logits(best).argmax(-1))
        batch = longer(batch, found[-1])
    return torch.stack(found, 1)


def longer(batch: Batch, ids: Tensor) -> Batch:
    """The batch with one generated token (B,) after every row."""
    layout: Layout = batch.layout.extended(batch.input_ids.shape[1] + 1)
    none = torch.full_like(ids, -100)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, ids[:, None]], 1),
        labels=torch.cat([batch.labels, none[:, None]], 1),
        layout=layout,
    )


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_cached_decoding_equals_full_forwards(name: str, family: str) -> None:
    model = stirred(name, family)
    batch = questions(model)
    want = cache_free(model, batch, 8)
    seen = model.see(batch)
    arguments = (model.embed(batch, seen), batch.layout, model.mask, 8, model.inside(batch, seen))
    assert model.lm.generate(*arguments, eos_token_id=-1).tolist() == want.tolist()
    static = model.lm.generate(*arguments, eos_token_id=-1, cache_implementation="static", disable_compile=True)
    assert static.tolist() == want.tolist()
    assert len(want.unique()) > 3


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_beams_of_a_batch_are_those_of_each_alone(name: str) -> None:
    model = stirred(name)
    make = collator(model)
    asked = [ONE_TURN, TWO_IMAGES, ADJACENT, TEXT_ONLY]
    together = model.generate(make.ask(asked), 6, num_beams=3)
    assert together == [model.generate(make.ask([sample]), 6, num_beams=3)[0] for sample in asked]
    sampled = model.generate(make.ask(asked), 6, num_beams=3, num_return_sequences=2)
    assert sampled[::2] == together


# -- training's ways ---------------------------------------------------------------------------------------------------


def gradients(model: VLM, batches: list[Batch]) -> dict[str, Tensor]:
    """Of several forward passes before the one backward pass."""
    model.zero_grad()
    sum(loss(model, batch) for batch in batches).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_recomputed_activations_give_the_same_gradients(name: str, family: str) -> None:
    plain, saving = stirred(name, family), stirred(name, family, gradient_checkpointing=True)
    make = collator(plain, pack_length=300)
    batches = [make([ONE_TURN, TWO_IMAGES]), make([TEXT_ONLY]), make([ADJACENT, SECOND_TURN])]
    want, got = gradients(plain.train(), batches), gradients(saving.train(), batches)
    assert want.keys() == got.keys() and len(want) > 50
    assert max(tiny.worst(want[n], got[n]) for n in want) == 0.0


@pytest.mark.parametrize("name", SEEING)
def test_lora_beside_it(name: str) -> None:
    plain, adapted = stirred(name), stirred(name)
    adapted.set_adapter(LoraAdapter(parts=["lm"], r=2))
    batch = collator(plain)(SAMPLES)
    assert torch.equal(plain(batch).logits, adapted.eval()(batch).logits)
    loss(adapted, batch).backward()
    assert all(p.grad is not None and p.grad.any() for _, p in adapted.parts().get("fusion", []))


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_a_copy_stands_alone(name: str) -> None:
    model = stirred(name)
    batch = collator(model)(SAMPLES)
    before, twin = model(batch).logits, copy.deepcopy(model)
    assert torch.equal(twin(batch).logits, before)
    for parameter in twin.fusion.parameters():
        parameter.zero_()
    assert torch.equal(model(batch).logits, before)
    if list(twin.fusion.parameters()):
        assert not torch.equal(twin(batch).logits, before)


@pytest.mark.parametrize("name", [n if n == "lavi" else pytest.param(n, marks=pytest.mark.slow) for n in SEEING])
def test_its_layers_compile_as_the_plain_ones_do(name: str) -> None:
    """No graph break, and a graph for each kind of layer; what is routed by values has breaks and gives the same."""
    model, plain = stirred(name), stirred("concat")
    routed, counts = model.fusion.regroups, []
    for each in (model, plain):
        batch = collator(each)([ONE_TURN, TWO_IMAGES])
        want = each(batch).logits.detach()
        torch._dynamo.reset()
        counter = CompileCounter()
        for layer in each.lm.model.base_model.layers:
            place = "compute" if isinstance(layer, PortedLayer) else "forward"
            setattr(
                layer, place, torch.compile(getattr(layer, place), dynamic=True, backend=counter, fullgraph=not routed)
            )
        got = each(batch).logits
        got.sum().backward()
        assert tiny.worst(got, want) < 1e-4
        counts.append(counter.frame_count)
    assert routed or counts == [len(kinds(model)), 1], "one graph for all layers that have blocks at the same ports"


def kinds(model: VLM) -> set[frozenset[str]]:
    """Of its layers, by the ports where something is attached."""
    layers = [layer for layer in model.lm.model.base_model.layers if isinstance(layer, PortedLayer)]
    used = [{w for w, site in layer.ports.sites.items() if site.blocks or site.taken_by} for layer in layers]
    return {frozenset(ports) for ports in used} or {frozenset()}


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_kept_features_give_the_same_answers(name: str, tmp_path: Path) -> None:
    model = stirred(name)
    model.encoder.requires_grad_(False)
    batch = collator(model, pack_length=1000)(SAMPLES)
    want, counts = model(batch).logits, []
    for _ in range(2):
        with DiskCache(str(tmp_path)).serving(model, lambda _: None) as used:
            assert tiny.worst(model(batch).logits, want) < 1e-4
        counts.append((used["cache"]["hits"], used["cache"]["misses"]))
    assert counts == [(0, 7), (7, 0)]


# -- concat ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_concat_puts_every_token_in_its_place() -> None:
    model = tiny.vlm()
    for pack_length in (None, 400):
        batch = collator(model, pack_length=pack_length)([TWO_IMAGES, ONE_TURN, ADJACENT])
        seen = model.see(batch)
        embeds, tokens = model.embed(batch, seen), seen.tokens
        plain = model.lm.embed(batch.input_ids)
        start = 0
        for row in range(len(batch.input_ids)):
            here = batch.images.row.eq(row).nonzero()[:, 0]
            for image, index in enumerate(here.tolist()):
                at = batch.layout.image[row].eq(image)
                assert int(at.sum()) == 16 and torch.equal(embeds[row, at], tokens[index])
                start += 1
            rest = ~batch.layout.visual[row]
            assert torch.equal(embeds[row, rest], plain[row, rest])
        assert start == len(batch.pixels) == 5


def test_too_few_positions_are_refused_with_the_samples() -> None:
    model = tiny.vlm()
    batch = collator(model)([ONE_TURN, TWO_IMAGES])
    seen = Seen(tokens=torch.zeros(3, 12, 32))
    with pytest.raises(DataError, match=r"one.*images.*48 image positions for 36"):
        model.fusion.embed(seen, model.lm.embed(batch.input_ids), batch)


# -- what it looks at --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_its_attention_can_be_kept_and_changes_no_bit(name: str) -> None:
    model = stirred(name)
    batch = collator(model)([ONE_TURN])
    watch = Watch((batch.labels[0, 1:] != -100).nonzero()[:, 0])
    assert torch.equal(model(batch).logits, model(batch, watch=watch).logits)
    assert len(watch.own) == model.lm.model.config.num_hidden_layers
    length, tokens = batch.input_ids.shape[1], model.connector.tokens_per_image(model.encoder.hw)
    for own in watch.own:
        assert own.shape[1:] == (len(watch.queries), length)
        assert own[:, 0, watch.queries[0] + 1 :].abs().max() == 0  # bidir opens nothing to words
    for images in watch.images:
        assert images.shape[1:] == (len(watch.queries), tokens)
        torch.testing.assert_close(images.sum(-1), torch.ones(images.shape[:2]))
