"""A mask as code outside the lab: a few lines of torch in a model's card, which are proved to be the mask.

A mask that is causal needs nothing. One that changes only what the prompt's positions see can be had by anybody: the
prompt goes through the model once under a mask that is handed on, its keys and values are kept, and ``generate`` goes
on from there. Whether a mask is one of these is found by asking it on small prompts; its name says nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Mask
from vlmlab.contracts.tensors import Layout, Role
from vlmlab.mask.base import not_later
from vlmlab.mask.leak import written

PROMPTS = ("su00uuau", "u0011uau", "su00u11uaau22uuau", "00aau11uaaau", "suuaauuau", "uu00uu11u")
"""Prompts, a digit twice being one image of two tokens (``vlmlab.mask.leak``)."""

QUESTIONS = ("su00uu", "u0011u", "su00u11uu", "suuu")
"""Prompts without an earlier answer."""

TOKENS = 2

SEES = '''\
def sees(ids, answer, image_token={token}, tokens={tokens}):
    """(B, S, S) bool: the keys k that a position q of the prompt sees; `answer` marks earlier answers."""
    visual = ids == image_token
    image = (visual.cumsum(1) - 1).div(tokens, rounding_mode="floor")
    era = answer.cumsum(1) - answer.long()
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    (q_place, k_place), (q_visual, k_visual), (q_image, k_image), (q_era, k_era), (q_answer, k_answer) = (
        (x[:, :, None], x[:, None, :]) for x in (place, visual, image, era, answer)
    )
    earlier, same = k_place <= q_place, k_place == q_place
    return ({rule}).expand(len(ids), -1, -1)
'''
"""The mask of a prompt without padding; ids and marks are (B, S)."""


def is_causal(mask: Mask) -> bool:
    """Whether under a mask every token sees exactly those up to its own."""
    layouts = [_layout(prompt + "aa") for prompt in PROMPTS]
    return all(torch.equal(mask(layout, q), not_later(layout, q)) for layout in layouts for q in [_q(layout)])


def is_of_prefixes(mask: Mask) -> bool:
    """Whether all of one question's prompt see each other, and tokens behind it those up to their own (PaliGemma)."""
    for prompt in QUESTIONS:
        layout = _layout(prompt + "aaa")
        q = _q(layout)
        within = q < len(prompt)
        if not torch.equal(mask(layout, q), not_later(layout, q) | (within[:, None] & within[None])):
            return False
    return True


def is_of_prompts(mask: Mask) -> bool:
    """Whether a token that is generated sees all before it, and changes nothing of what the prompt sees.

    The last token of the prompt is read again after the others, so that it sees all of them, too.
    """
    for prompt in PROMPTS:
        size = len(prompt)
        layout, alone = _layout(prompt + "aaa"), _layout(prompt)
        q = _q(layout)
        allowed = mask(layout, q)
        after = torch.equal(allowed[:, size - 1 :], not_later(layout, q)[:, size - 1 :])
        unchanged = torch.equal(allowed[:, : size - 1, :size], mask(alone, _q(alone))[:, : size - 1])
        if not (after and unchanged and not allowed[:, :size, size:].any()):
            return False
    return True


def code(mask: Mask, image_token: int, tokens: int) -> str:
    """The function ``sees`` of a card.

    Raises:
        UserError: the mask does not say its rule, or the rule is not what it does.
    """
    kind = type(mask)
    name = f"mask={kind.__module__}.{kind.__qualname__}"
    rule = getattr(mask, "rule", None)
    if rule is None:
        raise UserError(f"{name} declares no `rule`, by which it could be given to others; declare one in its class.")
    if not is_of_prompts(mask):
        raise UserError(
            f"{name} is more than what a prompt sees, so that no other library's `generate` follows it; export it by "
            "form=run, for vlmlab.load."
        )
    for prompt in PROMPTS:
        layout = _layout(prompt)
        ids, answer = layout.visual.long(), layout.role == Role.ANSWER
        if not torch.equal(sees(rule, ids, answer), mask(layout, _q(layout))):
            raise UserError(f"{name}: its `rule` ({rule}) is not what it does; correct it.")
    return SEES.format(token=image_token, tokens=tokens, rule=rule)


def needs_answers(mask: Mask) -> bool:
    """Whether a prompt with earlier answers is seen otherwise than without knowing where those are."""
    layouts = [_layout(prompt) for prompt in PROMPTS]
    rule = getattr(mask, "rule", "earlier")
    known = [sees(rule, x.visual.long(), x.role == Role.ANSWER) for x in layouts]
    unknown = [sees(rule, x.visual.long(), torch.zeros_like(x.visual)) for x in layouts]
    return not all(torch.equal(a, b) for a, b in zip(known, unknown, strict=True))


def sees(rule: str, ids: Tensor, answer: Tensor) -> Tensor:
    """What the card's function gives, where the image token is 1 and an image has two."""
    names: dict[str, Any] = {"torch": torch}
    exec(SEES.format(token=1, tokens=TOKENS, rule=rule), names)  # the text of a class of ours, as the card has it
    found: Tensor = names["sees"](ids, answer)
    return found


def _layout(text: str) -> Layout:
    return written((text,), left=False).layout


def _q(layout: Layout) -> Tensor:
    return torch.arange(layout.kind.shape[1])
