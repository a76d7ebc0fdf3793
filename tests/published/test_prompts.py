"""The prompt that an exported processor writes is token by token the lab's, for the templates and tokenizers of LMs."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from tests import tiny
from tests.data.test_asking import FAMILIES
from transformers import LlavaProcessor, SiglipImageProcessorPil

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.chat import ChatEncoder
from vlmlab.published.prompts import conversation, with_parts

OTHERS = {"blank": (True, False), "blank, pieces": (True, False), "blank, trimmed": (False, False)}
"""Families whose first or later prompts are not the same, which the proof of an export finds: a blank that ends the
prompt joins the answer after it, and a tokenizer that begins every text by itself does so without its template."""

TURNS = ("what colour is it", "two green squares", "how many")


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_first_question_and_of_a_later_one(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.make()
    lab = ChatEncoder(tokenizer, "<|image|>", 4)
    size = {"height": 2 * tiny.PATCH, "width": 2 * tiny.PATCH}
    processor: Any = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=size),
        tokenizer=tokenizer,
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="full",
        image_token="<|image|>",
        chat_template=with_parts(tokenizer, "<|image|>"),
    )
    picture = tiny.picture(1)
    system = "be short" if family.system else ""
    same = []
    for words in (TURNS[:1], TURNS):
        turns = tuple(Turn(words[k], words[k + 1] if k + 1 < len(words) else "") for k in range(0, len(words), 2))
        want = lab.ask(Sample("x", (picture,), turns, system)).ids
        got = processor.apply_chat_template(
            conversation(Image.fromarray(picture), *words, system=system),
            add_generation_prompt=True, tokenize=True, return_dict=True,
        )["input_ids"][0]  # fmt: skip
        same.append(got == want)
    assert tuple(same) == OTHERS.get(name, (True, True))
