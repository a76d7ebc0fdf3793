"""The models of a recipe: which module runs a stage, its model as it is made, and the model of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vlmlab.contracts.errors import CheckpointError, UserError, reason
from vlmlab.engine import rng
from vlmlab.engine.stage import StageModule
from vlmlab.engine.stamp import recorded
from vlmlab.engine.weights import StagedModel
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs import folder as folder_module

Builder = Callable[[DictConfig], nn.Module]
"""Makes the model of a stage's kind; stages of the same builder train the same model."""


def module_class(stage: Stage) -> type[StageModule]:
    """The LightningModule class of a stage.

    Raises:
        UserError: there is no such class, or it is none of a stage's.
    """
    try:
        found = get_class(stage.module)
    except Exception as error:
        remedy = "give the dotted path of a StageModule"
        raise UserError(
            f"{stage.key('module')}={stage.module} cannot be imported ({reason(error)}); {remedy}."
        ) from error
    if not issubclass(found, StageModule):
        raise UserError(f"{stage.key('module')}={stage.module} is not a StageModule; see {StageModule.__module__}.")
    return found


def new_staged_model(cfg: DictConfig, build: Builder) -> StagedModel:
    """A model before its first stage: the same weights for the same configuration."""
    rng.seed_all(cfg.seed)
    return StagedModel(build(cfg))


def enter(staged: StagedModel, cfg: DictConfig, stage: Stage) -> None:
    """Let a stage begin: what it adds to the model starts with the same weights whatever was done before."""
    rng.seed_all(cfg.seed, stage.name, "enter")
    staged.enter(stage)


def weights_file(folder: Path, stage: Stage) -> Path:
    """Where a finished stage's weights are in a run folder."""
    return folder_module.weights_file(folder, stage.index, stage.name)


def evaluated_file(cfg: DictConfig, folder: Path, stage: Stage) -> Path:
    """The weights that a run is evaluated with: the last ones of its last stage, or the best (``load_best``).

    Raises:
        CheckpointError: the best are asked for and none were kept.
    """
    file = weights_file(folder, stage)
    if not OmegaConf.select(cfg, "evaluation.load_best"):
        return file
    best = file.with_name(folder_module.BEST)
    if not best.is_file():
        raise CheckpointError(
            f"evaluation.load_best=true: {best} is missing, since stage {stage.name} has kept none; set it false, "
            "or train with evaluation.save_best=true."
        )
    return best


def load_trained(cfg: DictConfig, path: Path) -> nn.Module:
    """The model of a finished run, as after its last stage (or its best look), in evaluation mode.

    Args:
        cfg: the run's configuration.
        path: the run folder.

    Raises:
        CheckpointError: a stage's file is missing, damaged, of another run, or does not fit.
    """
    staged_models: dict[Builder, StagedModel] = {}
    for stage in parse(cfg):
        build: Builder = module_class(stage).build
        if build not in staged_models:
            staged_models[build] = new_staged_model(cfg, build)
        staged = staged_models[build]
        file = weights_file(path, stage)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; finish the run first by starting it again.")
        enter(staged, cfg, stage)
    staged.load(evaluated_file(cfg, path, stage), recorded(folder_module.RunFolder(path), stage))
    staged.model.requires_grad_(False)
    return staged.model.eval()
