"""Sizes that no machine has room for are refused before a weight is made; counting changes nothing else."""

from __future__ import annotations

import pytest
import torch

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.room import check_room


def test_weights_beyond_the_memory_are_refused_by_their_keys() -> None:
    sizes = {"hidden": 100_000, "depth": 1000, "bias": True, "_target_": "x"}
    with pytest.raises(UserError, match=r"^connector.hidden=100000, connector.depth=1000 would be 39,9\d\d GB of weig"):
        check_room("connector", sizes, lambda: MlpConnector(8, 8, depth=1000, hidden=100_000))


def test_counting_draws_no_random_numbers_and_is_left_out_without_weights() -> None:
    before = torch.get_rng_state()
    check_room("connector", {}, lambda: MlpConnector(8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        check_room("connector", {}, lambda: pytest.fail("it is built without weights anyway"))
