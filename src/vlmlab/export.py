"""Trained models in others' hands: ``vlmlab export run=outputs/<name> to=<folder>``, or ``export(run, folder)``.

form=hf     one model of transformers with its processor, which opens without vlmlab
form=run    the run with its towers, which ``vlmlab.load`` opens anywhere
form=auto   the first of these that the composition can be
form=parts  its parts, each for itself:

    <folder>/lm, encoder            ordinary transformers folders, an adapter merged where it is a change of weights
    <folder>/connector.safetensors  its state dict; its class and arguments are in config.yaml, the run's own
    <folder>/adapter.safetensors    an adapter that is not a change of weights, for ``vlmlab.adapter.base.load_adapter``

The parts load again as ``lm=hf lm.path=<folder>/lm encoder=hf encoder.path=<folder>/encoder``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.terminal import tell
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.preprocess import Preprocess, processor_of
from vlmlab.encoder.tower import TowerEncoder
from vlmlab.model.vlm import VLM
from vlmlab.published.bundle import bundle
from vlmlab.published.card import write_card
from vlmlab.published.export import export_route, whole_tower, write
from vlmlab.published.hub import push
from vlmlab.runs.files import is_free, share
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.trust import building, saved_config
from vlmlab.runs.withheld import stored
from vlmlab.towers.source import save_tower

Form: TypeAlias = Literal["auto", "hf", "run", "parts"]
"""What is written."""

PROCESSORS: dict[type[nn.Module], str] = {
    SiglipVisionModel: "SiglipImageProcessor",
    CLIPVisionModel: "CLIPImageProcessor",
    Dinov2Model: "BitImageProcessor",
}
"""The image processor that goes with a family of towers."""


def export(
    run: str | Path, folder: str | Path, trust: bool = False, form: Form = "auto", hub: str | None = None
) -> dict[str, Path]:
    """Write what a finished run has trained.

    Args:
        run: the run folder.
        folder: a new or empty one.
        trust: as for ``vlmlab.load``.
        form: "hf", "run", "parts", or "auto": the first of hf and run that it can be. Why it is not a model of
            transformers is then written in the card, and printed.
        hub: owner and name of a repository that the folder goes to, too; None: nothing leaves this machine.

    Returns:
        What was written: "hf" or "run" with "card"; or "lm", "encoder", "connector", "fusion" and "adapter", as far as
        the run has them.

    Raises:
        CheckpointError: the run is not finished, or its files do not fit.
        UserError: there is no such run, the folder has files in it, the run's configuration names a class from outside
            vlmlab without `trust`, it cannot be had in this form, or the hub is out of reach.
    """
    RunFolder(Path(run)).finished()
    cfg = saved_config(Path(run), trust)
    _check_empty(Path(folder))
    model = _trained(cfg, Path(run))
    if form == "parts":
        written = export_model(model, cfg, Path(folder))
    else:
        written = _whole_model(model, cfg, Path(run), Path(folder), form)
    if hub is not None:
        tell(push(Path(folder), hub))
    return written


def _trained(cfg: DictConfig, run: Path) -> VLM:
    from vlmlab.engine.restore import load_trained

    with building(run):
        model = load_trained(cfg, run)
    if not isinstance(model, VLM):
        raise UserError(f"{run} ends with two towers, which answer no question; only a VLM is exported.")
    return model


def _whole_model(model: VLM, cfg: DictConfig, run: Path, folder: Path, form: Form) -> dict[str, Path]:
    """A model of transformers, or the run where it is none."""
    why = "It was asked for as a run, by form=run."
    if form != "run":
        try:
            return _as_transformers(model, cfg, run, folder)
        except UserError as error:
            if form == "hf":
                raise
            why = f"{str(error)[:1].upper()}{str(error)[1:]}"
            tell(f"note: {error} It is written as a run, for vlmlab.load.", sys.stderr)
    bundle(run, cfg, folder)
    return {"run": folder, "card": write_card(folder, run, cfg, None, None, why)}


def _as_transformers(model: VLM, cfg: DictConfig, run: Path, folder: Path) -> dict[str, Path]:
    if model.prompt_tokens == 0:  # export_route says that there are
        model.merge()
    route = export_route(model)
    proof = write(model, cfg, folder, route)
    return {"hf": folder, "card": write_card(folder, run, cfg, route, proof)}


def export_model(model: VLM, cfg: DictConfig, folder: Path) -> dict[str, Path]:
    """The same for a model at hand, on the CPU; its adapters are merged into it or dropped.

    Args:
        model: a trained composition.
        cfg: the configuration it was built from.
        folder: a new or empty one.

    Returns:
        As ``export``.

    Raises:
        UserError: the folder has files in it.
    """
    _check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = {
        "adapter": _taken_apart(model),
        "connector": {} if model.connector is None else model.connector.state_dict(),
        "fusion": model.fusion.state_dict(),
    }
    written = {"lm": _save_lm(model, folder / "lm")}
    if model.encoder is not None:
        written["encoder"] = _save_encoder(model.encoder, cfg.encoder, folder / "encoder")
    for part, tensors in beside.items():
        if tensors:
            written[part] = _save_tensors(tensors, folder / f"{part}.safetensors")
    OmegaConf.save(OmegaConf.create(stored(cfg)), folder / "config.yaml")
    return written


def _check_empty(folder: Path) -> None:
    if not is_free(folder):
        raise UserError(f"{folder} has files in it; export into a new or empty folder.")


def _taken_apart(model: VLM) -> dict[str, Tensor]:
    """Make the towers plain again; the weights of an acting adapter that could not go into theirs, by name."""
    try:
        model.merge()
    except UserError:  # it says so before it changes anything of that tower
        parts = model.parts()
        left = {n: p.detach() for part, named in parts.items() if f"{part}.base" in parts for n, p in named}
        model.switch(None)
        model.merge()
        return left
    return {}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Each tensor with memory of its own, as safetensors wants them."""
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, str(path))
    share(path)
    return path


def _save_lm(model: VLM, folder: Path) -> Path:
    lm: Any = model.lm
    save_tower(lm.model, folder)
    lm.plain_tokenizer.save_pretrained(folder)
    return folder


def _save_encoder(encoder: Encoder, cfg: DictConfig, folder: Path) -> Path:
    """A transformers folder; one for each encoder of several (encoder/0, ...); one file for raw patches."""
    if isinstance(encoder, MultiEncoder):
        for index, (part, node) in enumerate(zip(encoder.encoders, cfg.encoders, strict=True)):
            _save_encoder(part, node, folder / str(index))
        return folder
    folder.mkdir(parents=True)
    if isinstance(encoder, TowerEncoder):
        assert isinstance(encoder.preprocess, Preprocess)
        tower: Any = whole_tower(encoder, cfg)
        save_tower(tower, folder)
        encoder.preprocess.save(folder, PROCESSORS.get(type(tower)) or processor_of(encoder.preprocess))
    elif tensors := encoder.state_dict():
        _save_tensors(tensors, folder / "model.safetensors")
    return folder
