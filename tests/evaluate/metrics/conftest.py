"""Where the shared fixtures are."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def shared_data() -> Path:
    """``shared/data`` beside the repository, or the test is skipped."""
    path = Path(__file__).parents[4] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path
