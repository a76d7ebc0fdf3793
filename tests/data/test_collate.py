"""The batch: padding, packing, where images are, and that packing changes no number."""

from __future__ import annotations

import io
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.fusion.test_fusions import stirred
from tests.tiny import (
    ADJACENT,
    ONE_TURN,
    SAMPLES,
    SECOND_TURN,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    chat,
    collator,
    picture,
    supervised,
    tokenizer,
    vlm,
    worst,
)
from torch import Tensor

from vlmlab.contracts.tensors import Batch, Kind, Layout
from vlmlab.data.collate import Collator, _first_fit, _room, pack
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM
from vlmlab.objective.lm import LanguageModelling

ORDER = (TWO_IMAGES, ONE_TURN, TEXT_ONLY, ADJACENT)


def own(pack_length: int | None = None) -> Collator:
    resize = lambda image: np.ascontiguousarray(image.transpose(2, 0, 1))  # noqa: E731
    return Collator(chat(), resize, tokenizer().pad_token_id, pack_length)


# -- where things are --------------------------------------------------------------------------------------------------


def test_right_and_left_padding() -> None:
    batch, asked = own()(SAMPLES), own().ask(SAMPLES)
    for row, sample in enumerate(SAMPLES):
        encoded, question = chat().train(sample), chat().ask(sample)
        n, m, width = len(encoded.ids), len(question.ids), asked.input_ids.shape[1]
        assert batch.input_ids[row, :n].tolist() == encoded.ids
        assert batch.labels[row, :n].tolist() == encoded.labels
        assert batch.layout.role[row, :n].tolist() == encoded.roles
        assert batch.layout.position[row, :n].tolist() == list(range(n))
        assert batch.layout.kind[row].ne(Kind.PAD).tolist() == [i < n for i in range(batch.input_ids.shape[1])]
        assert asked.input_ids[row, -m:].tolist() == question.ids
        assert asked.layout.position[row, -m:].tolist() == list(range(m))
        assert asked.layout.kind[row].ne(Kind.PAD).tolist() == [i >= width - m for i in range(width)]
        padding = batch.layout.kind[row].eq(Kind.PAD)
        assert batch.labels[row, padding].eq(-100).all() and batch.layout.segment[row, padding].eq(-1).all()
    assert not supervised(asked)[0] and asked.supervised == 0
    assert batch.supervised == sum(map(len, supervised(batch)))
    assert batch.sample_ids == [[s.id] for s in SAMPLES]


def test_pixels_are_in_the_order_of_the_rows() -> None:
    for pack_length in (None, 500):
        batch = own(pack_length)(ORDER)
        want = [(s.id, k) for s in ORDER for k in range(len(s.images))]
        assert batch.images.ids == [f"{name}#{k}" for name, k in want]
        images = {s.id: s.images for s in ORDER}
        for pixels, (name, k) in zip(batch.pixels, want, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), images[name][k])
    named = replace(TWO_IMAGES, image_ids=("a.png", "b.png"))
    assert own()([named]).images.ids == ["a.png", "b.png"]


def test_packing_out_of_order_keeps_images_with_their_samples() -> None:
    """A short sample goes with the first, since a long one is between them."""
    samples = [TWO_TURNS, TWO_IMAGES, ADJACENT]
    lengths = [len(chat().train(s).ids) for s in samples]
    assert lengths[2] < lengths[0] < lengths[1]
    batch = own(lengths[1] + lengths[2])(samples)
    assert batch.sample_ids == [["two", "adjacent"], ["images"]]
    assert batch.images.ids == ["two#0", "adjacent#0", "adjacent#1", "images#0", "images#1"]
    assert batch.images.row.tolist() == [0, 0, 0, 1, 1]
    first = batch.layout.image[0]
    assert [int(i) for i in first[first >= 0]] == [0] * 3 + [1] * 3 + [2] * 3
    assert batch.layout.segment[0, first >= 1].eq(1).all()


def test_positions_restart_and_labels_do_not_cross() -> None:
    batch = own(500)(ORDER)
    assert batch.input_ids.shape[0] == 1
    start = 0
    for segment, sample in enumerate(ORDER):
        n = len(chat().train(sample).ids)
        here = slice(start, start + n)
        assert batch.layout.segment[0, here].eq(segment).all()
        assert batch.layout.position[0, here].tolist() == list(range(n))
        assert batch.labels[0, start] == -100, "the end of one sample never predicts the next"
        start += n
    assert start == batch.input_ids.shape[1]


def test_pack() -> None:
    assert pack([5, 3, 2, 9, 1], None) == [[0], [1], [2], [3], [4]]
    assert pack([6, 1, 4, 3], 7) == [[0, 1], [2, 3]], "full rows"
    assert pack([5, 3, 5, 3], 8) == [[0, 1], [2, 3]]
    assert pack([140, 139, 138], 280) == [[0], [1], [2]], "two in a row of 279 would leave half of the other empty"
    assert pack([61, 51, 32], 93) == [[0], [1, 2]], "the first that fits would take rows of 93"
    assert pack([4, 4], 8) == [[0], [1]], "as full, and attention costs less"
    assert pack([5, 3, 2, 9, 1], 8) == [[0, 1, 4], [2], [3]], "one that is longer widens the others' rows as well"


def test_packing_takes_no_more_room_than_the_first_fit() -> None:
    draw = random.Random(0)
    for _ in range(100):
        lengths = [draw.randint(10, 200) for _ in range(draw.randint(1, 40))]
        rows = pack(lengths, 256)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert _room(lengths, rows) <= _room(lengths, _first_fit(lengths, 256))


def test_a_sample_longer_than_a_row_gets_its_own() -> None:
    batch = own(10)([ONE_TURN, TEXT_ONLY])
    assert batch.sample_ids == [["one"], ["text"]]


def test_prompts_are_never_packed() -> None:
    assert own(500).ask(ORDER).input_ids.shape[0] == len(ORDER)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        own()([])


def test_no_tower_no_pixels() -> None:
    batch = Collator(chat(0), None, 0)(SAMPLES)
    assert batch.pixels.shape[0] == 0 and batch.images.ids == [] and not batch.layout.visual.any()


# -- packing changes no number -----------------------------------------------------------------------------------------


def gradients(model: VLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total, count = LanguageModelling()(model(batch), batch)["lm"]
    (total / count).backward()
    return total.detach() / count, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mask", [Causal(), Bidirectional()], ids=lambda m: type(m).__name__)
def test_packed_equals_unpacked(mask: object) -> None:
    model = vlm(mask=mask).double()
    alone, packed = collator(model)(ORDER), collator(model, pack_length=200)(ORDER)
    assert len(packed.input_ids) < len(alone.input_ids)
    assert packed.supervised == alone.supervised
    loss, grads = gradients(model, alone)
    packed_loss, packed_grads = gradients(model, packed)
    assert abs(float(loss - packed_loss)) < 1e-6
    assert grads.keys() == packed_grads.keys() and len(grads) > 50
    for name, gradient in grads.items():
        assert worst(gradient, packed_grads[name]) <= 1e-6 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("mask", [Causal(), Bidirectional()], ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_the_first_sample_of_a_row_cannot_reach_the_second(mask: object) -> None:
    model = vlm(mask=mask)
    batch = collator(model, pack_length=400)([TWO_IMAGES, ADJACENT, SECOND_TURN])
    assert batch.sample_ids == [["images", "adjacent", "second"]]
    first = batch.layout.segment[0].eq(0)
    ids = torch.where(first & ~batch.layout.visual[0], (batch.input_ids + 1) % 200, batch.input_ids)
    pixels = batch.pixels.clone()
    pixels[:2] = torch.from_numpy(np.stack([picture(90), picture(91)])).permute(0, 3, 1, 2)
    changed = replace(batch, input_ids=ids, pixels=pixels)
    before, after = (model.lm.logits(model.lm.states(model.embed(b), b.layout, mask)) for b in (batch, changed))
    assert torch.equal(before[0, ~first], after[0, ~first])
    assert worst(before[0, first], after[0, first]) > 1e-2


@torch.no_grad()
def test_padding_changes_no_number() -> None:
    """A sample beside longer ones, padded left or right, gives the logits it gives alone."""
    model = vlm()
    make = collator(model)
    encoded = [make.encoder.train(s) for s in SAMPLES]
    for left in (False, True):
        together = make._batch(SAMPLES, encoded, [[i] for i in range(len(SAMPLES))], left=left)
        states = model.lm.states(model.embed(together), together.layout, model.mask)
        for row, sample in enumerate(SAMPLES):
            alone = make([sample])
            want = model.lm.states(model.embed(alone), alone.layout, model.mask)[0]
            assert worst(states[row, together.layout.valid[row]], want) < 1e-5


def test_layout_moves_and_selects() -> None:
    layout = own()(SAMPLES).layout
    chosen = layout.select(torch.tensor([2, 2, 0]))
    assert torch.equal(chosen.kind, layout.kind[[2, 2, 0]])
    assert isinstance(layout.to("cpu"), Layout) and layout.extended(3) is layout
    asked = own().ask(SAMPLES).layout
    longer = asked.extended(asked.kind.shape[1] + 2)
    assert longer.position[:, -2:].tolist() == [[int(p) + 1, int(p) + 2] for p in asked.position[:, -1]]
    assert longer.role[:, -2:].eq(2).all() and longer.kind[:, -2:].eq(Kind.TEXT).all()


# -- the table of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("pack_length", [None, 500])
def test_the_table_says_where_every_image_belongs(tokens: int, pack_length: int | None) -> None:
    make = replace(own(pack_length), encoder=chat(tokens))
    batch = make(ORDER)
    table, seen = batch.images, 0
    for row, names in enumerate(batch.sample_ids):
        for segment, name in enumerate(names):
            sample = next(s for s in ORDER if s.id == name)
            start = int(batch.layout.segment[row].eq(segment).nonzero()[0])
            encoded = chat(tokens).train(sample)
            for k, image in enumerate(sample.images):
                assert (int(table.row[seen]), int(table.segment[seen])) == (row, segment)
                assert int(table.place[seen]) == start + encoded.places[k]
                assert int(table.turn[seen]) == encoded.turns[k] and table.ids[seen] == f"{name}#{k}"
                assert int(table.tokens[seen]) == tokens and table.hw[seen].tolist() == list(image.shape[:2])
                seen += 1
    assert seen == len(table) == len(batch.pixels)
    asked = make.ask([TWO_TURNS, ONE_TURN])
    assert asked.images.place.tolist() == [
        int(asked.layout.valid[r].nonzero()[0]) + chat(tokens).ask(s).places[0]
        for r, s in enumerate((TWO_TURNS, ONE_TURN))
    ]


def test_what_the_user_says_goes_to_the_text_tower() -> None:
    told: list[str] = []

    def text(texts: object) -> torch.Tensor:
        told.extend(texts)  # type: ignore[arg-type]
        return torch.zeros(len(told), 4, dtype=torch.long)

    batch = replace(own(500), text=text)([TWO_IMAGES, TEXT_ONLY, SECOND_TURN])
    assert told == ["see what", "and how", "what"] and batch.text_ids is not None and batch.text_ids.shape == (3, 4)
    assert replace(own(), text=text)([TEXT_ONLY]).text_ids is None


@pytest.mark.parametrize("fusion", ["concat", "lavi", "emma"])
def test_processes_that_read_data_take_no_model_along(fusion: str) -> None:
    """Where they are started afresh, as on macOS, a collator travels to them by pickle."""

    class Strict(pickle.Pickler):
        def persistent_id(self, item: object) -> None:
            assert not isinstance(item, (torch.nn.Module, torch.Tensor)), type(item)

    model = stirred(fusion)
    make = collator(model)
    stream = io.BytesIO()
    Strict(stream).dump(make)
    ours, theirs = make([TWO_IMAGES]), pickle.loads(stream.getvalue())([TWO_IMAGES])
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.images.place, theirs.images.place)
    assert (ours.text_ids is None) == (fusion != "emma") and (
        ours.text_ids is None or torch.equal(ours.text_ids, theirs.text_ids)
    )
