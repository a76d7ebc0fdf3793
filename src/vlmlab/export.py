"""Trained weights as others read them: ``vlmlab export run=outputs/<name> to=<folder>``, or ``export(run, folder)``.

    <folder>/lm, encoder            ordinary transformers folders, an adapter merged where it is a change of weights
    <folder>/connector.safetensors  its state dict; what it is made of stands in config.yaml, the run's own
    <folder>/adapter.safetensors    an adapter that is no change of weights, for ``vlmlab.adapter.base.load_adapter``

The folders load again as ``lm=hf lm.path=<folder>/lm encoder=hf encoder.path=<folder>/encoder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.preprocess import Preprocess, processor_of
from vlmlab.encoder.tower import TowerEncoder
from vlmlab.model.vlm import VLM
from vlmlab.runs.files import is_free, share
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.trust import building, saved_config
from vlmlab.runs.withheld import stored
from vlmlab.towers.source import save_tower

PROCESSORS: dict[type[nn.Module], str] = {
    SiglipVisionModel: "SiglipImageProcessor",
    CLIPVisionModel: "CLIPImageProcessor",
    Dinov2Model: "BitImageProcessor",
}
"""The image processor that goes with a family of towers."""


def export(run: str | Path, folder: str | Path, trust: bool = False) -> dict[str, Path]:
    """Write what a finished run has trained in the forms of other libraries.

    Args:
        run: the run folder.
        folder: a new or empty one.
        trust: as for ``vlmlab.load``.

    Returns:
        What was written: "lm", "encoder", "connector", "fusion" and "adapter", as far as the run has them.

    Raises:
        CheckpointError: the run is not finished, or its files do not fit.
        UserError: there is no such run, the folder has files in it, or the run's configuration names a class from
            outside vlmlab without `trust`.
    """
    from vlmlab.engine.restore import load_trained

    RunFolder(Path(run)).finished()
    cfg = saved_config(Path(run), trust)
    _check_empty(Path(folder))
    with building(Path(run)):
        model = load_trained(cfg, Path(run))
    if not isinstance(model, VLM):
        raise UserError(f"{run} ends with two towers, which answer no question; only a VLM is exported.")
    return export_model(model, cfg, Path(folder))


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
        tower = _whole(encoder, cfg)
        save_tower(tower, folder)
        encoder.preprocess.save(folder, PROCESSORS.get(type(tower)) or processor_of(encoder.preprocess))
    elif tensors := encoder.state_dict():
        _save_tensors(tensors, folder / "model.safetensors")
    return folder


def _whole(encoder: TowerEncoder, cfg: DictConfig) -> Any:
    """The tower as it was loaded, layers behind the tapped one and the pooling head included, with what was trained."""
    tower = instantiate(cfg, layers=None, pooled=True).tower
    trained = encoder.tower.state_dict()
    tower.to(max((t.dtype for t in trained.values() if t.is_floating_point()), key=lambda dtype: dtype.itemsize))
    unknown = tower.load_state_dict(trained, strict=False).unexpected_keys
    assert not unknown, unknown
    return tower
