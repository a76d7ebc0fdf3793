"""``dora``: LoRA on the direction of each weight column, its length learnt apart (arXiv 2402.09353), by peft."""

from __future__ import annotations

from vlmlab.adapter.lora import LoraAdapter


class DoraAdapter(LoraAdapter):
    """y = m (W + (alpha / r) B A) x / |W + (alpha / r) B A|, m = |W| at first; the norm is over each output's row.

    Takes the arguments of ``LoraAdapter``.
    """

    dora = True
