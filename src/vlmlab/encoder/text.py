"""The text tower that a vision tower was trained with: the other half of a CLIP or SigLIP checkpoint.

It is read in two ways: frozen, a state for every position, where a fusion reads the user's words; and pooled, as one of
two towers that are compared and may train.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipTextConfig,
    SiglipTextModel,
)

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import PairText, PairWeights, TextTower
from vlmlab.contracts.tensors import Textual
from vlmlab.contracts.values import Architecture
from vlmlab.encoder.tower import autocast, load_tower
from vlmlab.towers.blueprint import open_config, open_tokenizer, read_config, read_tokenizer, weightless
from vlmlab.towers.source import resolve, tower_hash

FAMILIES: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    CLIPTextConfig: CLIPTextModel,
    SiglipTextConfig: SiglipTextModel,
}
"""Text towers by the class of their config; AutoModel knows only some of them."""


class TransformersTextTower(TextTower):
    """A CLIP or SigLIP text tower, frozen, that gives a state for every position of its whole context.

    It reads as EMMA's code does (arXiv 2410.02080): the whole context without an attention mask over the padding, which
    has states as well. CLIP's own causal mask stays; SigLIP has none at all.

    Args:
        tower: the tower; what the states do not depend on is cut off it.
        tokenizer: its tokenizer.
        layer: index into the tower's hidden states (0 is the embedding, -1 the last layer's output, before the final
            norm, as EMMA's code takes it); None is the tower's final output, after that norm.
        source: hash of the weights that were loaded, None where there are none.

    Raises:
        UserError: the family is unknown, or the layer does not exist.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int | None = -1,
        source: str | None = None,
    ) -> None:
        super().__init__()
        _check_family(tower)
        self.tower = tower
        self.tokenizer = tokenizer
        self.source = source
        self.width = int(tower.config.hidden_size)
        self.context = int(tower.config.max_position_embeddings)
        self.tokenise = partial(tokenised, tokenizer, context=self.context)
        self.pad = _pad(tower, tokenizer)
        _cut(tower, layer)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> TransformersTextTower:
        """Never in training mode: it is frozen, and dropout would change what it says."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """(I, T) -> (I, T, width); -1 becomes the padding that the tower was trained with."""
        if not len(ids):  # no image: transformers' attention cannot reshape nothing
            return torch.zeros(*ids.shape, self.width, device=ids.device)
        filled = torch.where(ids < 0, self.pad, ids)
        states: Tensor = self.tower(input_ids=filled).last_hidden_state  # of the layer that `_cut` has made the last
        half = states.dtype.itemsize < 4 and not autocast(ids.device)
        return states.float() if half else states  # a frozen tower in half precision, all else in single


class TransformersPairText(PairText):
    """A CLIP or SigLIP text tower with its pooled output, as one of two towers that are compared.

    It reads as the family's processor and model do: the whole context, SigLIP with its padding in sight and pooled at
    the last position by its own last map, CLIP causally and pooled at the end token. Where that is is transformers'
    rule: the highest id where the config says ``eos_token_id: 2``, as the first checkpoints do, and otherwise the first
    end token. A half-precision tower gives single precision.

    Args:
        tower: the tower.
        tokenizer: its tokenizer.
        source: hash of the weights that were loaded, None where there are none.
        head: what the checkpoint has after both towers.

    Raises:
        UserError: the family is unknown.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str | None = None,
        head: PairWeights | None = None,
    ) -> None:
        super().__init__()
        _check_family(tower)
        self.model = tower
        self.tokenizer = tokenizer
        self.source, self.head = source, head
        config: Any = tower.config
        self.state_width = int(config.hidden_size)
        self.width = int(config.projection_size) if isinstance(tower, SiglipTextModel) else self.state_width
        self.context = int(config.max_position_embeddings)
        self.tokenise = partial(tokenised, tokenizer, context=self.context)
        self.pad = _pad(tower, tokenizer)

    def forward(self, ids: Tensor) -> Textual:
        """(B, T) -> states (B, T, Dt) after the last norm, and the pooled text (B, Wt)."""
        out = self.model(input_ids=torch.where(ids < 0, self.pad, ids))
        states, pooled = out.last_hidden_state, out.pooler_output
        if states.dtype.itemsize < 4 and not autocast(ids.device):
            states, pooled = states.float(), pooled.float()
        return Textual(states, pooled, ids >= 0)


def _check_family(tower: PreTrainedModel) -> None:
    if type(tower) not in FAMILIES.values():
        names = ", ".join(kind.__name__ for kind in FAMILIES.values())
        raise UserError(f"{type(tower).__name__} is not a known text tower; known are {names}.")


def _pad(tower: Any, tokenizer: Any) -> int:
    """What a family's processor pads with: its tokenizer's own, and not always what its config says."""
    own = tokenizer.pad_token_id
    return int(tower.config.pad_token_id if own is None else own)


def tokenised(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int) -> Tensor:
    """(I, T) ids with the tokenizer's own tokens of beginning and end, cut off at T, -1 after the last."""
    ids = torch.full((len(texts), context), -1, dtype=torch.long, device="cpu")
    if not texts:
        return ids
    options = {"truncation": True, "max_length": context, "padding": False}
    for row, read in zip(ids, tokenizer(list(texts), **options)["input_ids"], strict=True):
        row[: len(read)] = torch.tensor(read, dtype=torch.long, device="cpu")
    return ids


def open_text_tower(
    path: str, dtype: str, architecture: Architecture | None = None, layer: int | None = -1
) -> TransformersTextTower:
    """The text tower of a two-tower checkpoint, or of a folder that holds it alone, by local folder or hub id.

    On the meta device (``vlmlab.towers.blueprint``) it has no values and no hash, and where its tokenizer is not at
    hand the embedded one.

    Raises:
        UserError: no text tower, no tokenizer or not all weights there; names ``encoder.path``.
    """
    if weightless():
        config, kind = _kind(read_config(path, architecture, "encoder.path"), path)
        make: Any = kind._from_config
        empty = make(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        return TransformersTextTower(empty, read_tokenizer(path)[0], layer)
    folder = resolve(path, "encoder.path")
    config, kind = _kind(open_config(folder, path, "encoder.path"), path)
    tower = load_tower(kind, config, folder, dtype)
    return TransformersTextTower(tower, open_tokenizer(folder, path, "encoder.path"), layer, tower_hash(folder))


def open_pair_text(
    path: str, dtype: str, head: bool = True, architecture: Architecture | None = None, key: str = "text_tower.path"
) -> TransformersPairText:
    """The text tower of a two-tower checkpoint as one of a pair, with what the checkpoint has after both towers.

    Args:
        path: local folder or hub id of a two-tower checkpoint, or of a text tower alone, which has no head.
        dtype: of the weights.
        head: take projections, temperature and bias of the checkpoint, where it has them.
        architecture: what the config.json of a hub id says; read only on the meta device.
        key: the config key that holds the path.

    Raises:
        UserError: no text tower, no tokenizer or not all weights there; names the key.
    """
    if weightless():
        config, kind = _kind(read_config(path, architecture, key), path, key)
        make: Any = kind._from_config
        empty = make(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        return TransformersPairText(empty, read_tokenizer(path)[0])
    folder = resolve(path, key)
    config, kind = _kind(open_config(folder, path, key), path, key)
    tower = load_tower(kind, config, folder, dtype)
    found = _pair_weights(folder) if head else None
    return TransformersPairText(tower, open_tokenizer(folder, path, key), tower_hash(folder), found)


def _pair_weights(folder: Path) -> PairWeights | None:
    """Projections, temperature and bias of a checkpoint; None where it holds a text tower alone."""
    named = {"visual_projection.weight", "text_projection.weight", "logit_scale", "logit_bias"}
    found: dict[str, Tensor] = {}
    for file in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with safe_open(str(file), framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name).float() for name in named & {*tensors.keys()}}
    if "logit_scale" not in found:
        return None
    bias = found.get("logit_bias")
    return PairWeights(
        image=found.get("visual_projection.weight"),
        text=found.get("text_projection.weight"),
        log_scale=found["logit_scale"].reshape(()),
        bias=None if bias is None else bias.reshape(()),
    )


def _kind(
    config: PreTrainedConfig, path: str, key: str = "encoder.path"
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config and class of the text half of a two-tower checkpoint, or of a text tower saved alone."""
    text = getattr(config, "text_config", config)
    if type(text) not in FAMILIES:
        remedy = "give a checkpoint of both towers, as save_pretrained of CLIPModel or SiglipModel writes it"
        raise UserError(f"{key}={path} has no text tower beside its vision tower; {remedy}.")
    return text, FAMILIES[type(text)]


def _cut(tower: Any, layer: int | None) -> None:
    """Removes what the states of a layer do not depend on, so that they are the tower's last ones."""
    if hasattr(tower, "head"):  # SigLIP's projection of the pooled state
        tower.head = nn.Identity()
    if layer is None:
        return
    depth = int(tower.config.num_hidden_layers)
    if not -depth - 1 <= layer <= depth:
        raise UserError(f"the text tower of {depth} layers has no hidden state {layer}; use {-depth - 1}..{depth}.")
    tower.encoder.layers = tower.encoder.layers[: layer % (depth + 1)]
    tower.final_layer_norm = nn.Identity()
