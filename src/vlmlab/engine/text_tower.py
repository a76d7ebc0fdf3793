"""``TextTowerModule``: a SigLIP text tower learns to read what a vision tower sees, which is frozen or learns too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SiglipTextConfig, SiglipTextModel

from vlmlab.cache.none import NoCache
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder, FeatureCache, Geometry, NamedParameters
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.contracts.tensors import Batch, Images, Layout, Outputs, Pairing
from vlmlab.contracts.values import Count, Depth, Vocabulary, Width
from vlmlab.encoder.text import tokenised
from vlmlab.engine.stage import StageModule
from vlmlab.lm.tokenizer import texts_of, train_tokenizer
from vlmlab.towers.source import embedded


class TextTowerModule(StageModule):
    """Image-text pairs; one micro-batch per step and rank, since every sample is compared with all others."""

    prompt = "plain"

    @staticmethod
    def build(cfg: DictConfig) -> nn.Module:
        """``PairedTowers`` of ``encoder`` and ``text_tower``."""
        from hydra.utils import instantiate

        return PairedTowers(instantiate(cfg.encoder, pooled=True), instantiate(cfg.text_tower))

    @staticmethod
    def collator(cfg: DictConfig, model: nn.Module, prompt: str) -> Callable[[list[Sample]], Batch]:
        """Samples of as many images as turns to a micro-batch."""
        assert isinstance(model, PairedTowers)
        return PairCollator(model.encoder.preprocess, model.lm.tokenise, model.lm.pad)


class ScratchTextTower(nn.Module):
    """A SigLIP text tower with random weights (arXiv 2303.15343 for the family; sizes are ours), to be trained.

    Its tokenizer is trained on some text, or the embedded LM's, whose words are those of the embedded world.

    Args:
        projection_size: width of the pooled output: of the vision tower's own, with which it is compared.
        max_position_embeddings: length of its context.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in ``SiglipTextConfig``.
        text: the data set whose prompts and answers its tokenizer is trained on; null: the embedded LM's tokenizer.
        tokenizer_samples: how many of its samples.
        vocab_size: upper bound of that tokenizer's vocabulary.
    """

    def __init__(
        self,
        projection_size: Width,
        max_position_embeddings: Count,
        hidden_size: Width,
        intermediate_size: Width,
        num_hidden_layers: Depth,
        num_attention_heads: Width,
        text: SampleSource | None = None,
        tokenizer_samples: Count = 4000,
        vocab_size: Vocabulary = 512,
    ) -> None:
        super().__init__()
        learnt = None if text is None else train_tokenizer(texts_of(text, tokenizer_samples), vocab_size)
        # by its file: AutoTokenizer would put the rules of Qwen2 in place of its own
        read: Any = {"tokenizer_file": str(embedded("lm") / "tokenizer.json")}
        self.tokenizer = PreTrainedTokenizerFast(
            **(read if learnt is None else {"tokenizer_object": learnt.backend_tokenizer}),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="right",
            model_max_length=max_position_embeddings,
        )
        self.context, self.pad = max_position_embeddings, int(self.tokenizer.pad_token_id)
        config = SiglipTextConfig(
            vocab_size=len(self.tokenizer),
            projection_size=projection_size,
            max_position_embeddings=max_position_embeddings,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.pad,
        )
        self.model = SiglipTextModel(config)
        self.tokenise = partial(tokenised, self.tokenizer, context=self.context)

    def forward(self, ids: Tensor) -> Tensor:
        """(I, T) -> (I, E), the pooled output."""
        pooled: Tensor = self.model(input_ids=torch.where(ids < 0, self.pad, ids)).pooler_output
        return pooled


class PairedTowers(nn.Module):
    """A vision tower with its pooled output as it is, and a text tower whose pooled output is to point the same way.

    As in SigLIP (arXiv 2303.15343) the two pooled outputs are compared themselves: the text tower's own last map is the
    only projection, so that nothing is thrown away and the two saved folders are a pair by themselves.

    Args:
        encoder: with a pooled output.
        lm: the text tower; the part "lm" of a stage.
        scale, bias: initial temperature and bias (10 and -10 in SigLIP, section 3.2).

    Attributes:
        pair: temperature and bias, the part "pair" of a stage.
    """

    def __init__(self, encoder: Encoder, lm: ScratchTextTower, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.lm = lm
        self.pair = nn.ParameterDict({"log_scale": torch.tensor(scale).log(), "bias": torch.tensor(bias)})
        self.cache: FeatureCache = NoCache()

    def forward(self, batch: Batch, in_step: bool = False) -> Outputs:
        """The pair of embeddings, of unit length; no logits. Every batch has images, so that ranks are always in step.

        Raises:
            UserError: the vision tower has no pooled output, or the batch no texts.
        """
        pooled = self.cache(self.encoder, batch.pixels).pooled
        if pooled is None or batch.asked is None:
            raise UserError("TextTowerModule needs a vision tower with a pooled output and a text beside every image.")
        text = self.lm(batch.asked)
        image = F.normalize(pooled, dim=-1)
        pairing = Pairing(image, F.normalize(text, dim=-1), self.pair["log_scale"], self.pair["bias"])
        return Outputs(logits=text.new_zeros(0, 1), targets=batch.input_ids.new_zeros(0), pairing=pairing)

    def parts(self) -> dict[str, NamedParameters]:
        """Part -> its parameters under their state-dict names."""
        modules: Mapping[str, nn.Module] = {"encoder": self.encoder, "lm": self.lm, "pair": self.pair}
        return {part: [(f"{part}.{n}", p) for n, p in module.named_parameters()] for part, module in modules.items()}

    def sourced(self) -> dict[str, str]:
        """The hash of the vision tower; the text tower is new."""
        return {} if self.encoder.source is None else {"encoder": self.encoder.source}

    def set_mask(self, mask: Any) -> None:
        """Nothing: the text tower has none."""

    def set_adapter(self, adapter: Any) -> None:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError("TextTowerModule trains a new text tower whole; use adapter=none.")


class PairCollator:
    """Samples whose turns each tell one of their images -> a batch with a row a pair.

    A row's text is the turn's answer in the text tower's tokens.

    Args:
        resize: the vision tower's geometry.
        tokenise: the text tower's.
        pad: what stands in ``input_ids`` behind a text.
    """

    def __init__(self, resize: Geometry, tokenise: Callable[[Sequence[str]], Tensor], pad: int) -> None:
        self.resize, self.tokenise, self.pad = resize, tokenise, pad

    def __call__(self, samples: list[Sample]) -> Batch:
        """One row a pair: the first image of a sample with its first turn, the second with the second.

        Raises:
            UserError: a sample has no images, or not as many as turns.
        """
        if bad := next((s for s in samples if not s.images or len(s.images) != len(s.turns)), None):
            raise UserError(f"TextTowerModule wants one text for each image, unlike {bad.id}; use other data.")
        images = [image for sample in samples for image in sample.images]
        names = [name for sample in samples for name in _names(sample)]
        asked = self.tokenise([turn.answer for sample in samples for turn in sample.turns])
        ids = torch.where(asked < 0, self.pad, asked)
        return Batch(
            pixels=torch.stack([torch.from_numpy(self.resize(image)) for image in images]),
            input_ids=ids,
            labels=torch.full_like(ids, -100),
            layout=Layout.of_text(asked >= 0),
            images=_one_a_row([image.shape[:2] for image in images], names),
            sample_ids=[[sample.id] for sample in samples for _ in sample.images],
            asked=asked,
        )


def _names(sample: Sample) -> Sequence[str]:
    """Of its images; where they have none, the sample's own."""
    return sample.image_ids or [sample.id] * len(sample.images)


def _one_a_row(sides: Sequence[tuple[int, ...]], names: list[str]) -> Images:
    """The images, each before the first token of its own row, where none takes a position."""
    rows, none = torch.arange(len(sides)), torch.zeros(len(sides), dtype=torch.long)
    return Images(rows, none, none, none, none, none, torch.tensor(sides), none, names)
