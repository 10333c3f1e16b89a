"""What the contract calls an error is not checked on a device, and must not read what lies beside the tables."""

import pytest
import torch

from isolith_backends.cuda import rotary


@pytest.mark.parametrize("position", [-1, 4, 1 << 40])
def test_a_position_outside_the_tables_turns_a_pair_to_zeros(position):
    tables = torch.full((6, 1), torch.nan)
    tables[1:5] = 0.5
    y = rotary.rope.fn(torch.ones(1, 4), torch.tensor([position]), tables[1:5], tables[1:5])
    assert y.tolist() == [[1.0, 1.0, 0.0, 0.0]]
