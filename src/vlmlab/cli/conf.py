"""Where the configuration files are."""

from __future__ import annotations

from pathlib import Path

from vlmlab.contracts.errors import UserError
from vlmlab.runs.environment import package_folder


def conf_folder() -> Path:
    """``vlmlab/conf`` of an installed package, or ``conf`` of the checkout the package runs from.

    Raises:
        UserError: neither is there.
    """
    package = package_folder()
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"no configuration files beside {package}; install vlmlab again, or run from its checkout")
