"""``PairModule``: the gradient cache gives the gradients of the whole batch; adapters and freezing of either tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tests.test_conf import composed
from tests.tiny import worst
from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Pairing
from vlmlab.data.module import Window
from vlmlab.engine.pair import PairModule
from vlmlab.engine.stage import check_objectives
from vlmlab.engine.weights import StagedModel
from vlmlab.model.pair import PairedTowers
from vlmlab.objective.clip import Clip
from vlmlab.recipe.stage import parse

SMALL = (
    "recipe=contrastive",
    "encoder.num_hidden_layers=1",
    "encoder.hidden_size=16",
    "encoder.intermediate_size=16",
    "text_tower.num_hidden_layers=1",
    "text_tower.hidden_size=16",
    "text_tower.intermediate_size=16",
    "text_tower.projection_size=16",
    "text_tower.tokenizer_samples=40",
)


class Settings:
    """What a stage asks of Lightning's trainer."""

    strategy = object()
    precision_plugin = object()


def stage_of(*overrides: str) -> tuple[DictConfig, PairModule, PairedTowers]:
    cfg = composed(*SMALL, *overrides)
    torch.manual_seed(0)
    model = PairModule.build(cfg)
    assert isinstance(model, PairedTowers)
    staged, stage = StagedModel(model), parse(cfg)[0]
    staged.enter(stage)
    module = PairModule(model, stage, staged.objectives, staged.rates)
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, assignment]
    module.kept_settings = Settings()  # type: ignore[assignment]
    module.trainer = module.kept_settings  # type: ignore[assignment]
    return cfg, module, model


def samples(cfg: DictConfig, count: int) -> list[Sample]:
    source = instantiate(cfg.data.train.short)
    return [source[index] for index in range(count)]


def gradients(accumulate: int, *overrides: str) -> tuple[dict[str, Tensor], float]:
    cfg, module, model = stage_of(f"recipe.stages.contrast.accumulate={accumulate}", *overrides)
    rows, collate = samples(cfg, 8), PairModule.collator(cfg, model, "plain")
    size = len(rows) // accumulate
    window = Window(0, [collate(rows[start : start + size]) for start in range(0, len(rows), size)])
    module._counts = {"rows": 8, "tokens": 0, "supervised": 0}
    module._backward(window)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, module.report.loss


@pytest.mark.parametrize("objective", ["siglip", "clip"])
def test_cached_gradients_are_those_of_the_whole_batch(objective: str) -> None:
    whole, loss = gradients(1, f"objective={objective}")
    for accumulate in (2, 8):
        cached, again = gradients(accumulate, f"objective={objective}")
        assert cached.keys() == whole.keys() and again == pytest.approx(loss, abs=1e-5)
        assert max(worst(cached[name], whole[name]) for name in whole) < 2e-5
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-2


def test_a_frozen_tower_has_no_gradient_with_or_without_cache() -> None:
    for accumulate in (1, 4):
        found, _ = gradients(accumulate, "recipe.stages.contrast.train.encoder=null")
        assert found and not any(name.startswith("encoder") for name in found)


class Noisy(nn.Module):
    """A text tower with dropout after it."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower, self.seen = tower, []
        self.pad, self.tokenise, self.head, self.source = tower.pad, tower.tokenise, None, None

    def forward(self, ids: Tensor) -> Any:
        read = self.tower(ids)
        pooled = torch.nn.functional.dropout(read.pooled, 0.5)
        self.seen.append(pooled.detach())
        return type(read)(read.states, pooled, read.valid)


def test_both_passes_drop_the_same() -> None:
    cfg, module, model = stage_of("recipe.stages.contrast.accumulate=2")
    model.lm = Noisy(model.lm)  # type: ignore[assignment]
    collate, rows = PairModule.collator(cfg, model, "plain"), samples(cfg, 4)
    module._counts = {"rows": 4, "tokens": 0, "supervised": 0}
    module._backward(Window(0, [collate(rows[:2]), collate(rows[2:])]))
    first, second = model.lm.seen[:2], model.lm.seen[2:]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not torch.equal(first[0], first[1])


def test_only_what_reads_embeddings_alone_can_be_cached() -> None:
    stage = parse(composed(*SMALL, "recipe.stages.contrast.accumulate=2"))[0]
    check_objectives(stage, {"objective": Clip()})

    class Reads(Clip):
        of_embeddings = False

    with pytest.raises(UserError, match=r"contrast\.accumulate=2"):
        check_objectives(stage, {"objective": Reads()})


def test_both_towers_take_an_adapter() -> None:
    cfg, module, model = stage_of("adapter=lora", "adapter.parts=[lm,encoder]")
    names = [name for name, _, _ in module.trained()]
    assert any(".lora_" in n and n.startswith("lm") for n in names)
    assert any(".lora_" in n and n.startswith("encoder") for n in names)
    assert all(".lora_" in n or n.startswith("pair") for n in names)
    batch = PairModule.collator(cfg, model, "plain")(samples(cfg, 4))
    module._loss(batch)[0].backward()
    assert all(p.grad is not None for _, _, p in module.trained())  # also before SigLIP's attention pooling
    assert isinstance(model.pair.compared(torch.eye(2), torch.eye(2)), Pairing)
