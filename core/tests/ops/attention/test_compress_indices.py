"""An entry is seen from the last token of its window on."""

import pytest
import torch

from isolith.ops.attention import compress_indices


@pytest.mark.parametrize(
    ("ratio", "position", "seen"),
    [(4, 0, 0), (4, 2, 0), (4, 3, 1), (4, 6, 1), (4, 7, 2), (128, 126, 0), (128, 127, 1), (1, 0, 1), (2, 5, 3)],
)
def test_visibility_of_the_contracts_golden_positions(ratio, position, seen):
    listed = compress_indices(torch.tensor([position]), ratio, 4)
    assert listed.tolist() == [[*range(seen), *[-1] * (4 - seen)]]
