"""A transformers causal LM with masks of ours: what the plug-ins of this folder share."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Mask
from vlmlab.contracts.tensors import Kind, Layout
from vlmlab.contracts.values import Architecture
from vlmlab.contracts.watch import Watch
from vlmlab.data.chat import ChatEncoder, token_id
from vlmlab.lm.inside import Inside, generating_inside
from vlmlab.lm.masking import IMPLEMENTATION, generating, plainly_causal, within
from vlmlab.towers.blueprint import (
    SAFE,
    open_config,
    open_tokenizer,
    read_config,
    read_tokenizer,
    readable,
    weightless,
)
from vlmlab.towers.source import quiet, resolve, tower_hash

LOGIT_RULES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config keys by which a family changes its logits after the head; only those a test has covered may be used."""


class CausalLanguageModel(nn.Module):
    """A causal LM and its tokenizer, with an image placeholder token and masks of ours.

    Args:
        model: the LM.
        tokenizer: with a chat template and an end token.
        image_token: the placeholder; added after the vocabulary where the tokenizer lacks it.
        source: hash of the weights that were loaded, None where there are none.
        own_tokenizer: whether `tokenizer` is this LM's; on the meta device it may be the embedded one.
        gradient_checkpointing: recompute activations in the backward pass.

    Attributes:
        plain_tokenizer: the tokenizer that is saved beside the model.

    Raises:
        UserError: the tokenizer has no chat template or end token, or the family changes its logits in a way this
            class does not reproduce.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str = "<|image|>",
        source: str | None = None,
        own_tokenizer: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _refuse_unknown_heads(model)
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise UserError(f"lm: the tokenizer of {tokenizer.name_or_path} needs a chat template and an end token.")
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        if len(tokenizer) > _embeddings(model).num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.set_attn_implementation(IMPLEMENTATION)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.source = source
        self.own_tokenizer = own_tokenizer
        self.model = model
        self.tokenizer = self.plain_tokenizer = tokenizer
        self.image_token = image_token
        self.image_id = token_id(tokenizer, image_token)
        self.width = _embeddings(model).embedding_dim

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return self.model.get_input_embeddings()(input_ids)

    def states(
        self,
        embeds: Tensor,
        layout: Layout,
        mask: Mask,
        inside: Inside | None = None,
        keep: DynamicCache | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """(B, Q, D) embeddings -> (B, Q, D) last hidden states under the policy.

        Where the policy comes to plain causal attention and no window cuts it short, no mask is handed on: attention
        then takes its fastest kernel. States at padding are never to be used.

        Args:
            embeds: what enters the first layer.
            layout: what the positions are, those of the cache and then those of `embeds`.
            mask: who may look at whom.
            inside: what the blocks at the ports are given for the positions of `embeds`; None: they do nothing.
            keep: a cache of the positions before these, at first empty, that takes these up for what follows them;
                None: nothing is before them and nothing follows.
            watch: keeps the weights of every layer's attention, in families that hand keywords on to it.
        """
        before = 0 if keep is None else int(keep.get_seq_length())
        q = torch.arange(before, before + embeds.shape[1], device=embeds.device)
        shown = _per_layer_type(self.model.config, mask(layout, q), layout, q)
        return self.model.base_model(
            inputs_embeds=embeds,
            attention_mask=shown,
            # without a mask transformers looks for packed samples where positions jump, as they do at padding
            position_ids=q.expand(embeds.shape[:2]) if shown is None else layout.position[:, q],
            past_key_values=keep,
            use_cache=keep is not None,
            **({} if inside is None else {"inside": inside}),
            **({"watch": watch} if watch is not None and _takes_keywords(self.model.base_model) else {}),
        ).last_hidden_state

    def prefill(self, embeds: Tensor, layout: Layout, mask: Mask, inside: Inside | None = None) -> DynamicCache:
        """What ``generate`` continues from after these positions, as its option `past_key_values`.

        It is whole in every layer: a window is cut by position, and a cache cut by places would count padding.
        """
        cache = DynamicCache()
        self.states(embeds, layout, mask, inside, cache)
        return cache

    def logits(self, states: Tensor) -> Tensor:
        """(T, D) hidden states -> (T, V)."""
        head = self.model.get_output_embeddings()
        assert head is not None
        out: Tensor = head(states)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return out if cap is None else torch.tanh(out / cap) * cap

    @cached_property
    def stop_ids(self) -> list[int]:
        """Where generation ends: at what the chat template's answers end with, and at the tokenizer's end token.

        Of what the checkpoint's own settings name, control tokens are taken too, which no answer contains, and no word.

        Raises:
            UserError: the template has no end of an answer.
        """
        encoder = ChatEncoder(self.tokenizer, self.image_token, 0)
        return sorted({*encoder.stops, *(token for token in self._named_stops() if token in encoder.control_ids)})

    def stops_line(self) -> str:
        """The stop tokens in words, and what the checkpoint's settings name that is none."""
        words = ", ".join(f"{self.tokenizer.decode([token])} ({token})" for token in self.stop_ids)
        left = [str(token) for token in self._named_stops() if token not in self.stop_ids]
        return words + (
            f"; not at {', '.join(left)} of the checkpoint's settings, which is not an end token" if left else ""
        )

    def _named_stops(self) -> list[int]:
        named = getattr(self.model.generation_config, "eos_token_id", None)
        return [] if named is None else list(named) if isinstance(named, list) else [named]

    def texts(self, ids: Tensor, stops: Collection[int]) -> list[str]:
        """(B, T) generated ids -> the words before the first stop token, without special tokens."""
        rows = [row[: next((k for k, token in enumerate(row) if token in stops), len(row))] for row in ids.tolist()]
        # some tokenizers would take the blank before a comma out, which is in what was learnt
        said = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in said]

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        layout: Layout,
        mask: Mask,
        max_new_tokens: int,
        inside: Inside | None = None,
        **options: Any,
    ) -> Tensor:
        """Cached decoding of left-padded prompts: (B, S, D) -> (B', T) new ids (B' = B x return sequences).

        Greedy unless `options`, which are transformers', say more; nothing is taken from the checkpoint's own settings.
        """
        if bool((layout.kind[:, -1] == Kind.PAD).any()):
            raise ValueError("prompts must be padded on the left: generation continues the last position")
        tokenizer, settings = self.tokenizer, GenerationConfig()
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        stops = {} if "eos_token_id" in options else {"eos_token_id": self.stop_ids}
        others = settings.update(**{"pad_token_id": pad, "max_new_tokens": max_new_tokens, **stops, **options})
        if settings.stop_strings is not None:
            others["tokenizer"] = tokenizer
        decode: Any = self.model.generate
        given = {"inputs_embeds": embeds, "attention_mask": layout.valid.long(), "generation_config": settings}
        with generating(mask, layout), generating_inside(self.model, inside), _no_settings(self.model):
            return decode(**given, **others)


def open_lm(
    path: str, dtype: str, architecture: Architecture | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None, bool]:
    """An LM, a tokenizer, the hash of the weights, and whether the tokenizer is its own; from a folder or a hub id.

    On the meta device (``vlmlab.towers.blueprint``) the LM has no values and no hash.
    """
    number = getattr(torch, dtype)
    if weightless():
        model = AutoModelForCausalLM.from_config(
            read_config(path, architecture, "lm.path"), dtype=number, trust_remote_code=False
        )
        tokenizer, own = read_tokenizer(path)
        return model, tokenizer, None, own
    folder = resolve(path, "lm.path")
    config = open_config(folder, path, "lm.path")
    with quiet(), readable("weights", folder, path, "lm.path"):
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=number, **SAFE)
    return model, open_tokenizer(folder, path, "lm.path"), tower_hash(folder), True


def _takes_keywords(model: nn.Module) -> bool:
    """Whether a family's forward hands keywords on that it does not know."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _embeddings(model: PreTrainedModel) -> nn.Embedding:
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def _refuse_unknown_heads(model: PreTrainedModel) -> None:
    for key in LOGIT_RULES[1:]:
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            family = type(model).__name__
            raise UserError(f"lm: {family} changes its logits by `{key}`, which vlmlab does not reproduce.")


def _per_layer_type(config: Any, allowed: Tensor, layout: Layout, q: Tensor) -> Tensor | dict[str, Tensor] | None:
    """(B, 1, Q, S): the policy (B, Q, S), AND-ed with the window in the sliding layers of families that have them.

    None where that is plain causal attention, which transformers does by itself.
    """
    whole = layout.kind.shape[1]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)  # None: all layers slide (Mistral, Phi-3) or none does
    slides = window is not None and window < whole and (kinds is None or "sliding_attention" in kinds)
    if not slides:
        return None if len(q) == whole and plainly_causal(allowed, layout, q) else allowed[:, None]
    near = within(allowed, layout, q, window)[:, None]
    return near if kinds is None else {"full_attention": allowed[:, None], "sliding_attention": near}


@contextmanager
def _no_settings(model: PreTrainedModel) -> Iterator[None]:
    """While this is open, a checkpoint's own generation settings do not fill in what was not said."""
    own: Any = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
