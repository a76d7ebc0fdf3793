"""Import of a published model as a run: towers as transformers folders, the connector as the weights of its one stage.

<run>/encoder, lm      ordinary transformers folders
<run>/...              what any finished run has; its one stage ``published`` has learnt nothing
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import GenerationConfig

from vlmlab.contracts.errors import UserError
from vlmlab.encoder.preprocess import processor_of
from vlmlab.engine.restore import enter, module_class, new_staged_model, weights_file
from vlmlab.engine.stamp import stamps
from vlmlab.engine.weights import StagedModel
from vlmlab.published.model import Found
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs.config import plain
from vlmlab.runs.files import is_free
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.withheld import stored
from vlmlab.towers.source import save_tower

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What of the published generation settings goes with the language model; how to sample is chosen when it generates."""


def split_model(found: Found, cfg: DictConfig, to: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Write the run folder of a published model.

    Args:
        found: the model.
        cfg: what ``found.words(to)`` compose, with whatever else was chosen.
        to: a new or empty folder; what was written is removed again where that fails.
        words: the overrides, for the run's record.

    Returns:
        The run's result, which has no scores.

    Raises:
        UserError: the folder has files in it, the weights are not whole, or the parts do not make the same connector.
    """
    if not is_free(to):
        raise UserError(f"{to} has files in it; give a new or empty folder.")
    try:
        with RunFolder(to) as run:
            run.open(plain(cfg), list(words), written=stored(cfg))
            connector = _write_towers(found, to)
            staged, stage = _composed(cfg)
            _give(staged, connector, found)
            file = weights_file(to, stage)
            file.parent.mkdir(parents=True)
            staged.save(file, stage, cfg, stamps(cfg, [stage], run, writes=True)[stage.name])
            run.update_env(published={"path": found.path, "class": found.plan.model.__name__})
            params = sum(parameter.numel() for parameter in staged.model.parameters())
            return run.finish({}, {"params": params, "trainable": 0, "seconds": 0.0})
    except BaseException:
        for path in to.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _write_towers(found: Found, to: Path) -> dict[str, Tensor]:
    """Write both towers, and keep the connector's weights of the published model alone."""
    model = found.load()
    tower, lm = found.plan.tower(model), found.plan.lm(model)
    settings = getattr(model, "generation_config", None)
    lm.generation_config = GenerationConfig(**{key: getattr(settings, key, None) for key in ENDS})
    save_tower(lm, to / "lm")
    found.tokenizer.save_pretrained(to / "lm")
    save_tower(tower, to / "encoder")
    found.preprocess.save(to / "encoder", processor_of(found.preprocess))
    return {name: weight.detach().float().clone() for name, weight in found.plan.connector(model).items()}


def _composed(cfg: DictConfig) -> tuple[StagedModel, Stage]:
    """The lab's model from the towers that were written, in the one stage of the recipe."""
    stage = parse(cfg)[0]
    staged = new_staged_model(cfg, module_class(stage).build)
    enter(staged, cfg, stage)
    return staged, stage


@torch.no_grad()
def _give(staged: StagedModel, weights: Mapping[str, Tensor], found: Found) -> None:
    """The connector's weights, all of them.

    Raises:
        UserError: it has others.
    """
    model: Any = staged.model
    own = model.connector.state_dict()
    wrong = own.keys() ^ weights.keys() or {name for name in own if own[name].shape != weights[name].shape}
    if wrong:
        raise UserError(f"path={found.path}: its connector does not fit ({sorted(wrong)[0]}), so that it is another.")
    model.connector.load_state_dict(weights)
