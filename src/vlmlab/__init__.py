"""vlmlab: a Hydra + PyTorch Lightning lab for how vision should meet language.

``vlmlab.load(run)`` gives the trained model of a finished run; see ``vlmlab.loading``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmlab.loading import load as load

__version__ = "0.1.0"

# Else the bits of a product depend on where its factors lie in memory. MKL asks at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO")


def __getattr__(name: str) -> Any:
    """``load``, found when it is first asked for: ``import vlmlab`` alone imports neither torch nor numpy."""
    if name == "load":
        from vlmlab.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
