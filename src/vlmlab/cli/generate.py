"""The generate command: ``vlmlab generate run=... image=... "question"`` asks a finished run one question."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own, finished_run, trusted
from vlmlab.cli.rules.schema import Generate
from vlmlab.contracts.terminal import tell
from vlmlab.data.images import named_image
from vlmlab.runs.trust import saved_config

if TYPE_CHECKING:
    from vlmlab.loading import LoadedModel

EXAMPLE = 'vlmlab generate run=outputs/default image=photo.jpg "What is on the table?"'
OPTIONS = ("do_sample", "temperature", "top_p", "top_k", "num_beams")
"""Keys that are handed to transformers' ``generate`` where they are not null."""
KEY = re.compile(r"[+~]{0,2}[\w@/.:]+=")


def generate_command(cfg: DictConfig) -> None:
    """Print the answer, and its tokens with their probabilities where they are asked for.

    Raises:
        ConfigError: ``run`` or ``question`` is missing or ``run`` is not a folder of a run.
        CheckpointError: the run is not finished, or its files do not fit.
        UserError: an image, a question or an option that is not possible.
    """
    check_own(cfg, Generate)
    if OmegaConf.is_missing(cfg, "question"):
        raise ConfigError(f"which question? write it at the end, as in: {EXAMPLE}")
    model = opened(cfg, EXAMPLE)
    question, image = str(cfg.question), images_of(cfg)
    answer = model.generate(image, question, **settings_of(cfg))
    tell(answer)
    if cfg.probabilities:
        for token, probability in model.probabilities(image, question, answer, system=cfg.system):
            tell(f"{probability:8.4f}  {token!r}")


def opened(cfg: DictConfig, example: str) -> LoadedModel:
    """The model of the run that is named, with its sampling seeded; what can be refused without it is refused first."""
    folder = finished_run(cfg, example)
    if not trusted(cfg):
        saved_config(folder)
    for image in images_of(cfg) or ():
        named_image(image)
    import torch

    from vlmlab.loading import load

    model = load(folder, device=cfg.device, trust=cfg.trust)
    torch.manual_seed(cfg.seed)
    return model


def images_of(cfg: DictConfig) -> list[str] | None:
    """The files that are named."""
    given: Any = cfg.image
    if given is None:
        return None
    return [str(one) for one in given] if OmegaConf.is_list(given) else [str(given)]


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """What ``LoadedModel.generate`` is told beside images and question."""
    options = {name: cfg[name] for name in OPTIONS if cfg[name] is not None}
    return {"max_new_tokens": cfg.max_new_tokens, "system": cfg.system, **options}


def with_key(words: Sequence[str]) -> list[str]:
    """The command line with ``question=`` before a word that is neither an option nor has a key."""
    return [f"question={quoted(word)}" if is_bare(word) else word for word in words]


def is_bare(word: str) -> bool:
    """Whether a word is neither an option nor has a key."""
    return not word.startswith("-") and KEY.match(word) is None


def quoted(text: str) -> str:
    """A text as Hydra reads it back."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)  # a backslash counts double before a quote alone
    doubled = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{doubled}'"


if __name__ == "__main__":
    conf = conf_folder()
    sys.argv[1:] = with_key(sys.argv[1:])
    main = hydra.main(config_path=str(conf), config_name="generate", version_base="1.3")(guard(generate_command))
    sys.exit(run_command(main, conf, "generate"))
