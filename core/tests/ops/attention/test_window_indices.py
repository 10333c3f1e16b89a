"""The window of a token counts the token."""

import pytest
import torch

from isolith.ops.attention import window_indices


@pytest.mark.parametrize(
    ("position", "listed"),
    [(0, [0, -1, -1, -1]), (1, [0, 1, -1, -1]), (3, [0, 1, 2, 3]), (4, [1, 2, 3, 4]), (5, [2, 3, 4, 5])],
)
def test_lists_of_the_contracts_golden_window(position, listed):
    assert window_indices(torch.tensor([position]), 4).tolist() == [listed]


@pytest.mark.parametrize("split", [1, 3, 130])
def test_list_does_not_depend_on_the_other_tokens_of_the_call(split):
    positions = torch.arange(300, dtype=torch.int32)
    parts = torch.cat([window_indices(part, 128) for part in positions.split(split)])
    assert torch.equal(parts, window_indices(positions, 128))
