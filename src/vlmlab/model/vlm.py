"""The vision-language model, in the order of the data: encoder -> connector -> fusion into the LM, under a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.cache.none import NoCache
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import (
    Adapter,
    Connector,
    Encoder,
    FeatureCache,
    Fusion,
    Mask,
    NamedParameters,
    TextTower,
)
from vlmlab.contracts.tensors import Batch, Images, Kind, Layout, Outputs, Pairing, Role, Seen
from vlmlab.lm.inside import Inside, has_ports
from vlmlab.mask.causal import Causal
from vlmlab.mask.leak import check_mask

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlmlab.data.chat import Prompt
    from vlmlab.data.collate import Collator
    from vlmlab.lm.causal import CausalLanguageModel


class VLM(nn.Module):
    """A vision-language model made of named parts.

    Args:
        encoder: pixels -> Visual; None where the fusion reads no vision.
        connector: Visual -> (I, M, D) visual tokens; None likewise.
        fusion: how vision acts on the LM.
        lm: the language model.
        mask: who may look at whom.
        text: the encoder's paired text tower, where the fusion reads the user's words through it.

    Attributes:
        cache: what stands before the encoder; nothing but while a ``FeatureCache`` is serving.

    Raises:
        UserError: the fusion does not go with the other parts.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        connector: Connector | None,
        fusion: Fusion,
        lm: CausalLanguageModel,
        mask: Mask,
        text: TextTower | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.fusion = fusion
        self.lm = lm
        self.text = text
        self.mask = mask
        self.cache: FeatureCache = NoCache()
        self._adapted: dict[str, dict[str, Adapted]] = {}  # part -> name -> its adapter
        self.objectives = nn.ModuleDict()  # those of the stage that have weights of their own
        self._acting: dict[str, str | None] = {}  # part -> name of the adapter that acts
        fusion.attach(self)

    # -- the way of the data -------------------------------------------------------------------------------------

    @property
    def tokens_per_image(self) -> int:
        """Positions that one image takes in the LM's sequence."""
        if self.encoder is None or self.connector is None:
            return 0
        return self.fusion.tokens_per_image(self.connector.tokens_per_image(self.encoder.hw))

    def tokens_of(self, picture: tuple[int, int]) -> int:
        """Positions that a picture of so many rows and columns of pixels takes in the LM's sequence."""
        return self.tokens_per_image  # every picture is brought to the encoder's one size

    @property
    def token_width(self) -> int:
        """Width of the connector's tokens: the LM's, where the connector does not say otherwise."""
        own = None if self.connector is None else self.connector.width
        return self.lm.width if own is None else own

    def see(self, batch: Batch) -> Seen:
        """What the encoder saw, after the fusion's change of features, and the visual tokens (I, M, D)."""
        if self.encoder is None or self.connector is None or batch.pixels.shape[0] == 0:
            return Seen()
        visual = self.cache(self.encoder, batch.pixels)
        visual = self.fusion.features(visual, batch, self._asked(batch))
        return Seen(visual, self.connector(visual, batch.instructions() if self.connector.reads_instruction else None))

    def _asked(self, batch: Batch) -> Tensor | None:
        """(I, T, Dt) what the user says to each image, as the encoder's text tower reads it."""
        if self.text is None or batch.asked is None:
            return None
        with torch.no_grad():
            states: Tensor = self.text(batch.asked)
        return states

    def embed(self, batch: Batch, seen: Seen | None = None) -> Tensor:
        """(B, S, D) embeddings with vision fused in; without `seen` the model looks first."""
        return self.fusion.embed(self.see(batch) if seen is None else seen, self.lm.embed(batch.input_ids), batch)

    def inside(self, batch: Batch, seen: Seen) -> Inside | None:
        """What the blocks at the ports of the LM's layers are given; None where there are none."""
        if not has_ports(self.lm.model):
            return None
        return Inside(batch.layout, self.fusion.memories(seen, batch), _with_image(batch))

    def forward(self, batch: Batch, mask: Mask | None = None, in_step: bool = False) -> Outputs:
        """Logits at the positions that predict a supervised token, and their targets.

        Args:
            batch: the micro-batch.
            mask: in place of the model's own.
            in_step: some rank has an image in its micro-batch and weights are cut into shards, so that all ranks have
                to go through the encoder and the fusion, and back through the LM, together.
        """
        alone = in_step and batch.pixels.shape[0] == 0
        batch = self._with_blank(batch) if alone else batch
        seen = self.see(batch)
        embeds = self.embed(batch, seen)  # (B, S, D)
        if in_step:
            embeds = self._in_step(embeds, seen)
        states = self.lm.states(embeds, batch.layout, mask or self.mask, self.inside(batch, seen))  # (B, S, D)
        chosen = batch.labels[:, 1:] != -100  # (B, S - 1)
        logits = self.lm.logits(states[:, :-1][chosen])  # (T, V)
        targets = batch.labels[:, 1:][chosen]
        seen = Seen() if alone else seen
        return Outputs(logits=logits, targets=targets, seen=seen, states=states, embeds=embeds)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, **options: Any) -> list[str]:
        """Greedy cached decoding of left-padded prompts, as text without special tokens."""
        seen = self.see(batch)
        embeds, inside = self.embed(batch, seen), self.inside(batch, seen)
        ids = self.lm.generate(embeds, batch.layout, self.mask, max_new_tokens, inside, **options)
        return [text.strip() for text in self.lm.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    # -- ranks that share weights --------------------------------------------------------------------------------

    def _with_blank(self, batch: Batch) -> Batch:
        """The batch with a blank image that belongs to no row, so that nobody sees it."""
        if self.encoder is None:
            return batch
        size, device = (self.encoder.preprocess.height, self.encoder.preprocess.width), batch.input_ids.device
        zero = torch.zeros(1, dtype=torch.long, device=device)
        table = Images(zero - 1, zero - 1, zero, zero, zero, zero, torch.tensor([size], device=device), zero, ["blank"])
        asked = None if self.text is None else self.text.tokenise([""]).to(device)
        return replace(batch, pixels=zero.to(torch.uint8).expand(1, 3, *size), images=table, asked=asked)

    def _in_step(self, embeds: Tensor, seen: Seen) -> Tensor:
        """(B, S, D) as they are, by the way of ranks whose images take part.

        What was seen of a blank image counts nothing; and where images teach anything, the backward pass goes through
        all of the LM.
        """
        if seen.tokens is not None:
            embeds = embeds + 0.0 * seen.tokens.sum()
        taught = any(p.requires_grad for m in (self.encoder, self.connector, self.fusion) for p in _parameters(m))
        return embeds.requires_grad_() if taught and not embeds.requires_grad else embeds

    # -- stages --------------------------------------------------------------------------------------------------

    def set_mask(self, mask: Mask) -> None:
        """The policy of the stage that begins."""
        self.mask = mask

    def set_objectives(self, objectives: Mapping[str, Any]) -> None:
        """The objectives of the stage that begins, as far as they have weights; those of the stage before are dropped.

        Raises:
            UserError: one of them does not go with this composition.
        """
        for objective in objectives.values():
            objective.attach(self)
        self.objectives = nn.ModuleDict(dict(objectives))

    def set_adapter(self, adapter: Adapter) -> None:
        """Lets the adapter act on the towers that it names, wrapping each of them once per name of an adapter.

        Raises:
            UserError: the adapter names a part that this composition does not have, or its name or kind does not go
                with the adapters that are there.
        """
        for part in adapter.parts:
            if part not in ("lm", "encoder") or getattr(self, part) is None:
                raise UserError(f"adapter.parts has {part}, which is no tower of this composition; use lm or encoder.")
            others = self._adapted.setdefault(part, {})
            _check_company(adapter, part, others)
            if adapter.name not in others:
                known = {id(t) for t in self.state_dict(keep_vars=True).values()}
                owner, place = self._tower(part)
                wrapped = adapter.wrap(getattr(owner, place))
                setattr(owner, place, wrapped)
                ratios = {id(p): ratio for p, ratio in adapter.ratios(wrapped).items()}
                new = {n: t for n, t in _once(self.state_dict(keep_vars=True)).items() if id(t) not in known}
                rates = {n: ratios[id(t)] for n, t in new.items() if id(t) in ratios}
                others[adapter.name] = Adapted(adapter, set(new), rates)
        self._switch(adapter.parts, adapter.name)

    def switch(self, name: str | None) -> None:
        """Let the adapters of this name act, and no other; None: none, every tower as it was loaded.

        One model serves many tasks: switch between batches or requests. Soft prompts stand in the batches, so make
        those with a collator built after switching.

        Raises:
            UserError: no tower has such an adapter, or one cannot be without its adapter.
        """
        known = sorted({other for others in self._adapted.values() for other in others})
        if name is not None and name not in known:
            raise UserError(f"there is no adapter {name} to switch to; the model has {', '.join(known) or 'none'}.")
        if name is None and any(a.adapter.alone for others in self._adapted.values() for a in others.values()):
            raise UserError("adapter.pissa=true took its share out of the tower's weights; it cannot be switched off.")
        self._switch(self._adapted, name)

    def _switch(self, parts: Iterable[str], name: str | None) -> None:
        from vlmlab.adapter.base import switch

        for part in parts:
            owner, place = self._tower(part)
            switch(getattr(owner, place), name)
            self._acting[part] = name if name in self._adapted[part] else None

    def merge(self) -> None:
        """Put the adapters that act into the towers' own weights and drop all adapters: plain towers again.

        Raises:
            UserError: an adapter that acts is no change of weights.
        """
        from vlmlab.adapter.base import merge

        for part in list(self._adapted):
            owner, place = self._tower(part)
            setattr(owner, place, merge(getattr(owner, place)))
            del self._adapted[part], self._acting[part]

    def _tower(self, part: str) -> tuple[Any, str]:
        """Where a tower is: its owner and the attribute's name."""
        return (self.lm, "model") if part == "lm" else (self.encoder, "tower")

    @property
    def prompt_tokens(self) -> int:
        """Positions that the adapter that acts on the LM wants before every sample."""
        name = self._acting.get("lm")
        return 0 if name is None else self._adapted["lm"][name].adapter.prompt_tokens

    def adapter_tensors(self, name: str) -> set[str]:
        """State-dict names of the weights and buffers of the adapters of this name."""
        return {n for others in self._adapted.values() if name in others for n in others[name].tensors}

    def ratios(self) -> dict[str, float]:
        """Learning rates that are a multiple of their part's, by the parameter's name."""
        return {n: r for others in self._adapted.values() for a in others.values() for n, r in a.ratios.items()}

    def parts(self) -> dict[str, NamedParameters]:
        """Part -> its named parameters that a stage may train.

        Of an adapted tower that is the adapter that acts; "<part>.base" are its own weights and "<part>.<name>" other
        adapters.
        """
        out: dict[str, NamedParameters] = {}
        for part in ("encoder", "connector", "fusion", "lm", "text"):
            module = getattr(self, part)
            own = [] if module is None else list(module.trainable() if hasattr(module, "trainable") else _named(module))
            named = [(f"{part}.{name}", p) for name, p in own]
            if adapters := self._adapted.get(part):
                every = set().union(*(adapted.tensors for adapted in adapters.values()))
                out[f"{part}.base"] = [(n, p) for n, p in named if n not in every]
                for name, adapted in adapters.items():
                    key = part if name == self._acting.get(part) else f"{part}.{name}"
                    out[key] = [(n, p) for n, p in named if n in adapted.tensors]
            elif named:
                out[part] = named
        if own := _named(self.objectives):
            out["objective"] = [(f"objectives.{name}", p) for name, p in own]
        return out

    def sourced(self) -> dict[str, str]:
        """Part -> sha256 of the tower it was loaded from."""
        towers = {"encoder": self.encoder, "lm": self.lm, "text": self.text}
        return {part: tower.source for part, tower in towers.items() if tower is not None and tower.source is not None}


class DualEncoder(VLM):
    """An image encoder and a text encoder for contrastive training, with a captioning term on the patch features.

    The text model reads a caption alone for the contrastive pair (its state at the end token). The caption is also
    predicted from the visual tokens: either word by word after them, as in CoCa (arXiv 2205.01917, section 3.2), or
    all words at once, without seeing any other word (parallel prediction, as in CapPa, arXiv 2306.07915, section 3.2,
    here without a decoder: visual token k predicts the k-th equal share of the caption's words, in no order). Parallel
    prediction cannot lean on the words before, so the patch features themselves must name what they show.

    Args:
        encoder, connector, fusion, lm, mask: as in ``VLM``; the encoder must return a pooled feature.
        width: of the shared embedding space.
        parallel: predict all words at once; captions then have a multiple of M words, in the order of the tokens.
        scale, bias: initial temperature and bias (10 and -10 in SigLIP, arXiv 2303.15343 section 3.2).
    """

    def __init__(
        self,
        encoder: Encoder,
        connector: Connector,
        fusion: Fusion,
        lm: CausalLanguageModel,
        mask: Mask,
        width: int = 128,
        parallel: bool = False,
        scale: float = 10.0,
        bias: float = -10.0,
        text: TextTower | None = None,
    ) -> None:
        super().__init__(encoder, connector, fusion, lm, mask, text)
        self.parallel = parallel
        self.pair = PairHead(encoder.pooled_width, lm.width, width, scale, bias)

    def forward(self, batch: Batch, mask: Mask | None = None, in_step: bool = False) -> Outputs:
        """The captioning outputs with the pair of embeddings."""
        outputs = self._parallel(batch) if self.parallel else super().forward(batch, mask, in_step)
        visual = outputs.seen.visual
        if visual is None or visual.pooled is None or batch.pixels.shape[0] != len(batch.input_ids):
            raise UserError("ContrastiveModule needs one image a row and a tower with a pooled output.")
        pairing = self.pair(visual.pooled, self.text_state(batch))
        return replace(outputs, pairing=pairing)

    def _parallel(self, batch: Batch) -> Outputs:
        """The words of every caption, each from the visual token whose share it is in, and from that alone."""
        seen = self.see(batch)
        tokens = seen.tokens
        if tokens is None:
            raise UserError("ContrastiveModule needs images; give recipe.stages.<name>.data captioned images.")
        answer = batch.labels != -100
        length = answer.sum(1, keepdim=True) - 1  # (B, 1) without the end token
        share = int(length[0]) // tokens.shape[1]
        if share == 0 or bool((length != share * tokens.shape[1]).any()):
            raise UserError(
                f"dual_encoder.parallel needs captions of one length that {tokens.shape[1]} visual tokens divide "
                f"(sample {batch.sample_ids[0][0]} has {int(length[0])} tokens); use other captions or parallel=false."
            )
        words = batch.labels[answer & (answer.cumsum(1) <= length)]  # (I * M * share,)
        logits = self.lm.logits(tokens).flatten(0, 1).repeat_interleave(share, 0)  # (I * M * share, V)
        return Outputs(logits, words, seen)

    def text_state(self, batch: Batch) -> Tensor:
        """(B, D): the state at the end of each row's caption, read without any image."""
        answer = batch.labels != -100
        length = answer.sum(1)  # (B,)
        longest = int(length.max())
        steps = torch.arange(longest, device=length.device)
        index = (answer.long().argmax(1, keepdim=True) + steps).clamp(max=answer.shape[1] - 1)  # (B, L)
        valid = steps < length[:, None]
        layout = _text_layout(valid)
        states = self.lm.states(self.lm.embed(batch.input_ids.gather(1, index)), layout, Causal())  # (B, L, D)
        return states[torch.arange(len(length), device=length.device), length - 1]

    def parts(self) -> dict[str, NamedParameters]:
        """The parts of a VLM and the pair head."""
        return {**super().parts(), "pair": [(f"pair.{n}", p) for n, p in _named(self.pair)]}


class PairHead(nn.Module):
    """Projects both sides into one space of unit vectors, with SigLIP's learned temperature and bias."""

    def __init__(self, image_width: int, text_width: int, width: int, scale: float, bias: float) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, width, bias=False)
        self.text = nn.Linear(text_width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, image: Tensor, text: Tensor) -> Pairing:
        """(B, Dv) and (B, D) -> unit vectors (B, E)."""
        return Pairing(
            image=F.normalize(self.image(image), dim=-1),
            text=F.normalize(self.text(text), dim=-1),
            log_scale=self.log_scale,
            bias=self.bias,
        )


@dataclass(frozen=True)
class Adapted:
    """What an adapter did to one tower.

    Attributes:
        adapter: the adapter.
        tensors: state-dict names of its weights and buffers.
        ratios: learning rates that are a multiple of the others', by name.
    """

    adapter: Adapter
    tensors: set[str]
    ratios: dict[str, float]


def _check_company(adapter: Adapter, part: str, others: Mapping[str, Adapted]) -> None:
    """Refuse an adapter that cannot share a tower with those that are there."""
    for name, other in others.items():
        if type(other.adapter) is not type(adapter):
            kinds = f"{type(other.adapter).__name__} {name} and {type(adapter).__name__} {adapter.name}"
            raise UserError(f"adapter: {part} cannot have {kinds} together; use one kind of adapter in all stages.")
        if name != adapter.name and (other.adapter.alone or adapter.alone):
            raise UserError(f"adapter.pissa=true goes with no second adapter on {part}; use one name in all stages.")


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor that modules share under its first name alone, as ``named_parameters`` has it."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def _parameters(module: nn.Module | None) -> Iterable[nn.Parameter]:
    return () if module is None else module.parameters()


def _named(module: nn.Module) -> NamedParameters:
    return list(module.named_parameters())


def _with_image(batch: Batch) -> Tensor:
    """(B, S) bool: positions whose packed sample has an image."""
    images, layout = batch.images, batch.layout
    own = images.row[:, None] == torch.arange(len(layout.kind), device=layout.kind.device)  # (I, B)
    same = layout.segment[None] == images.segment[:, None, None]  # (I, B, S)
    return (own[..., None] & same).any(0) & layout.valid


def _text_layout(valid: Tensor) -> Layout:
    """The layout of right-padded text, (B, L) bool -> Layout."""
    none = torch.full_like(valid, -1, dtype=torch.long)
    return Layout(
        kind=torch.where(valid, int(Kind.TEXT), int(Kind.PAD)),
        image=none,
        tile=none,
        segment=torch.where(valid, 0, -1),
        role=torch.full_like(none, int(Role.USER)),
        position=torch.arange(valid.shape[1], device=valid.device).expand_as(none),
    )


# -- composition -----------------------------------------------------------------------------------------------------


def build_model(cfg: DictConfig) -> VLM:
    """The composition that a configuration describes; towers are loaded, everything else is new."""
    return VLM(**_instantiate_parts(cfg))


def build_dual_encoder(cfg: DictConfig) -> DualEncoder:
    """The same groups as an image encoder and a text encoder; the text encoder is ``text_tower`` where there is one."""
    settings = cfg.get("dual_encoder") or {}
    return DualEncoder(**_instantiate_parts(cfg, text=cfg.get("text_tower"), encoder={"pooled": True}), **settings)


def _instantiate_parts(
    cfg: DictConfig, text: DictConfig | None = None, encoder: dict[str, Any] | None = None
) -> dict[str, Any]:
    from hydra.utils import instantiate

    lm = instantiate(cfg.lm if text is None else text)
    fusion = instantiate(cfg.fusion)
    mask = instantiate(cfg.mask)
    check_mask(mask, "mask")
    if fusion.reads == "nothing":
        return {"encoder": None, "connector": None, "fusion": fusion, "lm": lm, "mask": mask}
    tower = instantiate(cfg.encoder, **(encoder or {}))
    described = _with_vocabulary(cfg.connector, lm.model.get_input_embeddings().num_embeddings)
    connector = instantiate(described, in_width=tower.width, out_width=lm.width)
    paired = tower.text_tower() if fusion.reads_text else None
    return {"encoder": tower, "connector": connector, "fusion": fusion, "lm": lm, "mask": mask, "text": paired}


def _with_vocabulary(node: DictConfig, size: int) -> DictConfig:
    """A connector's configuration, or that of several, with every null ``vocab_size`` filled (see contracts.parts)."""
    from omegaconf import DictConfig, OmegaConf

    out = node.copy()
    for key in (key for key in node if not OmegaConf.is_missing(node, key)):
        if key == "vocab_size" and node[key] is None:
            out[key] = size
        elif isinstance(node[key], DictConfig):
            out[key] = _with_vocabulary(node[key], size)
    return out


def build_cache(cfg: DictConfig) -> FeatureCache:
    """What stands before a frozen encoder; a configuration older than that key has none."""
    from hydra.utils import instantiate

    return instantiate(cfg.cache) if cfg.get("cache") else NoCache()


def build_collator(cfg: DictConfig, model: VLM, prompt: Prompt) -> Collator:
    """Samples -> Batch for this model: its tokenizer, its tower's geometry, its number of visual tokens."""
    from vlmlab.data.chat import ChatEncoder
    from vlmlab.data.collate import Collator

    tokenizer = model.lm.tokenizer
    encoder = ChatEncoder(
        tokenizer=tokenizer,
        image_token=model.lm.image_token,
        tokens_per_image=model.tokens_of,
        prompt=prompt,
        max_length=cfg.collate.max_length,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    resize = None if model.encoder is None else model.encoder.preprocess
    return Collator(
        encoder=encoder,
        resize=resize,
        pad_id=pad,
        pack_length=cfg.collate.pack_length,
        prompt_tokens=model.prompt_tokens,
        text=None if model.text is None else model.text.tokenise,
    )
