"""One optimizer step is the same sum, however it is cut into micro-batches and ranks."""

import pytest
import torch
from fake_lab import FakeLoss, config, run
from processes import run_ranks
from safetensors.torch import load_file

from vlmlab.contracts.errors import UserError
from vlmlab.engine.stage import check_objectives
from vlmlab.recipe.stage import parse

LOSSES = {
    "words": {"_target_": "fake_lab.FakeLoss"},
    "images": {"_target_": "fake_lab.FakeImageLoss", "weight": 0.5},
}


def three_steps(folder, ranks=1, **changes):
    """Weights after three steps of everything that has no running statistics."""
    cfg = config(
        fake__dropout=0.0, recipe__stages__tune__steps=3, recipe__stages__tune__objective=LOSSES,
        recipe__stages__align__steps=0, **changes,
    )  # fmt: skip
    if ranks == 1:
        run(cfg, folder)
    else:
        assert run_ranks(cfg, folder, ranks) == [0] * ranks
    return load_file(folder / "stages" / "1_tune" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return three_steps(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_changes_nothing(tmp_path, whole, accumulate):
    cut = three_steps(tmp_path, recipe__stages__tune__accumulate=accumulate)
    assert cut.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.parametrize("accumulate", [1, 4])  # with 4, ranks meet single rows of which a third have no image
def test_two_ranks_equal_one(tmp_path, whole, accumulate, strategy):
    changes = {"recipe__stages__tune__accumulate": accumulate, "trainer__strategy": strategy}
    cut = three_steps(tmp_path, ranks=2, **changes)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=0)


def test_the_test_can_fail(tmp_path, whole):
    other = three_steps(tmp_path, recipe__stages__tune__batch_size=4)
    assert any((other[name] - tensor).abs().max() > 1e-5 for name, tensor in whole.items())


def test_losses_are_means_over_the_whole_step(tmp_path):
    """Against the definition: one forward pass over all rows of the step, then sum over count."""
    from fake_lab import FakeImageLoss, FakeVLM, build, collate
    from hydra.utils import instantiate

    from vlmlab.data.sampler import Order
    from vlmlab.engine import rng
    from vlmlab.runs.folder import RunFolder

    changes = {"fake__dropout": 0.0, "recipe__stages__align__objective": LOSSES, "recipe__stages__align__accumulate": 4}
    cfg = config(**changes)
    rng.seed_all(cfg.seed)
    model: FakeVLM = build(cfg).eval()
    source = instantiate(cfg.data.train.short)
    batch = collate([source[i] for i in Order(50, 8, cfg.seed, "align").window(0)])
    outputs = model(batch)
    words, images = FakeLoss()(outputs, batch)["lm"], FakeImageLoss()(outputs, batch)["image"]
    expected = (words[0] / words[1]).item(), (images[0] / images[1]).item()

    run(cfg, tmp_path)
    row = RunFolder(tmp_path).metrics()[0]
    assert (row["loss/lm"], row["loss/image"]) == pytest.approx(expected, rel=1e-5)
    assert row["loss"] == pytest.approx(expected[0] + 0.5 * expected[1], rel=1e-5)
    assert row["lr/connector"] == 1e-2


def test_comparing_objectives_refuse_accumulation():
    stage = parse(config())[0]
    with pytest.raises(UserError, match=r"recipe\.stages\.align\.accumulate=2"):
        check_objectives(stage, {"siglip": FakeLoss(per_micro_batch=True)})


@pytest.mark.parametrize("ranks", [1, 2])
def test_comparing_objectives_count_after_the_forward_pass(tmp_path, whole, ranks):
    loss = {"_target_": "fake_lab.FakeLoss", "per_micro_batch": True}
    cut = three_steps(tmp_path, ranks, recipe__stages__tune__objective__words=loss)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=0)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(tmp_path, whole):
    cut = three_steps(tmp_path, precision__name="bf16", recipe__stages__tune__accumulate=2)
    assert {tensor.dtype for tensor in cut.values()} == {torch.float32}
    assert all((cut[name] - tensor).abs().max() < 1e-2 for name, tensor in whole.items())
    assert any(not torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_fp16_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        run(config(precision__name="fp16"), tmp_path)
