import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # configurations name classes of fake_lab


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
