"""Makers of run folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def cells() -> ModuleType:
    """The helpers in ``cells.py`` beside this file (tests are not a package)."""
    spec = importlib.util.spec_from_file_location("analyse_cells", Path(__file__).with_name("cells.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
