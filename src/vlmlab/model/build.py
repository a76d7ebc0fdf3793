"""From a configuration to a model and to what brings samples into its form."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.cache.none import NoCache
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import FeatureCache
from vlmlab.contracts.room import check_room
from vlmlab.mask.leak import check_fusion, check_mask
from vlmlab.model.dual import DualEncoder
from vlmlab.model.pair import PairedTowers
from vlmlab.model.questions import read_questions
from vlmlab.model.vlm import VLM

if TYPE_CHECKING:
    from vlmlab.data.chat import Prompt
    from vlmlab.data.collate import Collator


def build_model(cfg: DictConfig) -> VLM:
    """The composition that a configuration describes; towers are loaded, everything else is new."""
    return VLM(**_instantiate_parts(cfg))


def build_dual_encoder(cfg: DictConfig) -> DualEncoder:
    """The same groups as an image encoder and a text encoder; the text encoder is ``text_tower`` where there is one."""
    settings = cfg.get("dual_encoder") or {}
    return DualEncoder(**_instantiate_parts(cfg, text=cfg.get("text_tower"), encoder={"pooled": True}), **settings)


def build_pair(cfg: DictConfig) -> PairedTowers:
    """``encoder``, with the pooled output after its last layer, and ``text_tower``, compared by ``dual_encoder``.

    Raises:
        UserError: there is no text tower, or the two do not go together.
    """
    if not cfg.get("text_tower"):
        raise UserError("PairModule wants a text tower; choose one, as in +text_tower=scratch.")
    settings = {k: v for k, v in (cfg.get("dual_encoder") or {}).items() if k != "parallel" or v}
    if settings.get("head") is not None:
        settings["head"] = instantiate(settings["head"])
    reads_pooled = settings.get("head") is None or settings["head"].pooled
    if "parallel" in settings:
        raise UserError("dual_encoder.parallel=true is of ContrastiveModule alone; set it to false for PairModule.")
    pooled = {"pooled": reads_pooled, **({"layers": None} if cfg.encoder.get("layers") is not None else {})}
    return PairedTowers(instantiate(cfg.encoder, **pooled), instantiate(cfg.text_tower), **settings)


def _instantiate_parts(
    cfg: DictConfig, text: DictConfig | None = None, encoder: dict[str, Any] | None = None
) -> dict[str, Any]:
    lm = instantiate(cfg.lm if text is None else text)
    fusion = instantiate(cfg.fusion)
    mask = instantiate(cfg.mask)
    check_mask(mask, "mask")
    check_fusion(fusion)
    if fusion.reads == "nothing":
        return {"encoder": None, "connector": None, "fusion": fusion, "lm": lm, "mask": mask}
    tower = instantiate(cfg.encoder, **(encoder or {}))
    described = _with_vocabulary(cfg.connector, lm.model.get_input_embeddings().num_embeddings)
    read = tower.widths[-fusion.read_by_connector(len(tower.widths)) :]
    make = partial(instantiate, described, in_width=sum(read), out_width=lm.width)
    check_room("connector", described, make)
    connector = make()
    paired = tower.text_tower() if fusion.reads_text else None
    return {"encoder": tower, "connector": connector, "fusion": fusion, "lm": lm, "mask": mask, "text": paired}


def _with_vocabulary(node: DictConfig, size: int) -> DictConfig:
    """A connector's configuration, or that of several, with every null ``vocab_size`` filled (see contracts.parts)."""
    out = node.copy()
    for key in (key for key in node if not OmegaConf.is_missing(node, key)):
        if key == "vocab_size" and node[key] is None:
            out[key] = size
        elif isinstance(node[key], DictConfig):
            out[key] = _with_vocabulary(node[key], size)
    return out


def build_cache(cfg: DictConfig) -> FeatureCache:
    """What is before a frozen encoder; a configuration older than that key has none."""
    return instantiate(cfg.cache) if cfg.get("cache") else NoCache()


def build_collator(cfg: DictConfig, model: VLM, prompt: Prompt) -> Collator:
    """Samples -> Batch for this model: its tokenizer, its tower's geometry, its number of visual tokens."""
    from vlmlab.data.chat import ChatEncoder
    from vlmlab.data.collate import Collator

    tokenizer = model.lm.tokenizer
    encoder = ChatEncoder(
        tokenizer=tokenizer,
        image_token=model.lm.image_token,
        tokens_per_image=model.tokens_per_image,  # one number: every picture is brought to the encoder's size
        prompt=prompt,
        max_length=cfg.collate.max_length,
        control_tokens=cfg.collate.get("control_tokens") or "refuse",  # a configuration older than that key has none
    )
    questions, _ = read_questions(cfg, model, prompt)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    resize = None if model.encoder is None else model.encoder.preprocess
    return Collator(
        encoder=encoder,
        resize=resize,
        pad_id=pad,
        pack_length=cfg.collate.pack_length,
        prompt_tokens=model.prompt_tokens,
        text=None if model.text is None else model.text.tokenise,
        questions=questions,
    )
