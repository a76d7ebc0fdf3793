"""What a run was made with: the package's code, the versions, the machine. Never imports torch."""

from __future__ import annotations

import functools
import hashlib
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "peft",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "pillow",
    "wandb",
)


def package_folder() -> Path:
    """The folder of the vlmlab package."""
    return Path(__file__).resolve().parents[1]


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of the names and contents of all ``.py`` files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def code_fingerprint() -> str:
    """The fingerprint of the package's code, as it was when this process first asked."""
    return fingerprint(package_folder())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(package_folder()), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Code, versions, machine and command of this process, for ``env.json``."""
    return {
        "code": code_fingerprint(),
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {package: _version(package) for package in PACKAGES},
        "command": sys.argv,
    }
