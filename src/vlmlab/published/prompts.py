"""The lab's prompts from a published processor: its chat template for lists of images and words, and what proves it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmlab.data.chat import FIXED_DAY

FLAT = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- set flat.text = message['content'] -%}
    {%- if message['content'] is not string -%}
        {%- set flat.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set flat.text = flat.text + IMAGE -%}
            {%- elif part['type'] == 'text' -%}
                {%- set flat.text = flat.text + part['text'] -%}
            {%- else -%}
                {{- raise_exception('a message has a part of type ' + part['type'] + '; give image and text') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}{{ '' }}"""
"""Put before a template of plain texts; makes texts of its messages' lists; the last value keeps a newline."""


def with_parts(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """The tokenizer's chat template for messages of texts and of lists; an image is one placeholder at its place.

    Words are those of training: nothing is put between an image and what follows, and the day is the fixed one.
    """
    own = tokenizer.get_chat_template()
    already = FIXED_DAY if own.startswith(FIXED_DAY) else ""
    return FLAT.replace("IMAGE", repr(image_token)) + FIXED_DAY + own.removeprefix(already)


def conversation(image: Any, *turns: str, system: str = "") -> list[dict[str, Any]]:
    """Messages as processors take them: the image, then the first question, an answer, a question, and so on."""
    found: list[dict[str, Any]] = [{"role": "system", "content": [_words(system)]}] if system else []
    for k, words in enumerate(turns):
        parts = [_words(words)]
        if k == 0 and image is not None:
            parts.insert(0, {"type": "image", "image": image})
        found.append({"role": "assistant" if k % 2 else "user", "content": parts})
    return found


def _words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
