"""How much visual tokens differ between images, as a stage says before its first step."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from tests import tiny

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample
from vlmlab.data.asking import APART
from vlmlab.data.sampler import Order
from vlmlab.engine.finite import as_evaluated
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.model.build import build_collator
from vlmlab.train.start_checks import IMAGES, TokenVariance, check_prompts, differing_share


def test_shares_by_hand() -> None:
    places, images = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 6.0])
    same = places[None, :, None].expand(2, 2, 1)  # every image alike
    assert differing_share(same) == 0.0
    flat = images[:, None, None].expand(2, 2, 1)  # every place alike
    assert differing_share(flat) == 1.0
    both = same + flat  # variance over images 9, over places 1
    assert abs(differing_share(both) - 0.9) < 1e-6
    assert differing_share(torch.zeros(3, 2, 1)) == 0.0


def test_nothing_of_the_model_changes() -> None:
    model = tiny.vlm().train()
    model.lm.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    with as_evaluated(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()


def test_bad_rows_and_rows_without_images_are_passed_over() -> None:
    model = tiny.vlm()
    cfg = OmegaConf.create({"collate": {"max_length": 512, "pack_length": None}})
    collate = build_collator(cfg, model, "chat")
    looks = TokenVariance(tiny.SAMPLES, Order(len(tiny.SAMPLES), 8, 0, "s"), collate, print)
    counts = [len(batch.pixels) for batch in looks._batches()]
    assert sum(counts) >= 1 and sum(counts[:-1]) < IMAGES


# -- what generation is asked ------------------------------------------------------------------------------------------


class Broken:
    """A row that cannot be loaded before the others."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        if index == 0:
            raise DataError("Sample 0 is broken.")
        return tiny.ONE_TURN


def proved_lines(
    template: str | None, prompt: str = "chat", benchmarks: bool = True, source: object = None
) -> list[str]:
    model = tiny.vlm(lm=HfLanguageModel(str(tiny.qwen2()), chat_template=template))
    cfg = OmegaConf.create({"collate": {"max_length": 512, "pack_length": None}, "data": {"benchmarks": {}}})
    if benchmarks:
        cfg.data.benchmarks = {"some": {}}
    collate = build_collator(cfg, model, prompt)
    return check_prompts(cfg, model, collate, source or tiny.SAMPLES, Order(4, 4, 0, "s"))


BLANK = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else ' A: ') }}{% endfor %}"


def test_where_generation_stops_is_said_and_what_is_worth_a_note() -> None:
    assert proved_lines(None) == ["generation stops at <|im_end|> (2)"]
    assert proved_lines(None, source=Broken()) == ["generation stops at <|im_end|> (2)"]
    assert proved_lines(BLANK) == ["generation stops at <|im_end|> (2)", f"note: {APART}"]


def test_a_stage_of_plain_prompts_is_held_to_what_benchmarks_ask() -> None:
    never_ends = BLANK.replace("eos_token", "'.'")
    with pytest.raises(UserError, match="puts no end token after an answer"):
        proved_lines(never_ends, prompt="plain")
    assert proved_lines(never_ends, prompt="plain", benchmarks=False) == []
    assert proved_lines(BLANK, prompt="plain") == ["generation stops at <|im_end|> (2)", f"note: {APART}"]
