import pytest
import torch
from torch.testing import assert_close

from isolith.ops.moe import moe_permute, moe_unpermute

NAMES = ("rows", "row_scale", "counts", "offsets", "pos_to_pair", "pair_to_pos", "pos_to_expert")


def permuted(idx, experts, alignment, hidden=4):
    x = torch.randn(idx.shape[0], hidden, generator=torch.Generator().manual_seed(0))
    return x, dict(zip(NAMES, moe_permute(x, idx, experts, alignment), strict=True))


def random_idx(tokens=37, k=3, experts=7, seed=0):
    return torch.randint(-1, experts, (tokens, k), generator=torch.Generator().manual_seed(seed)).int()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("counts", [3, 0, 2]),
        ("offsets", [3, 4, 6]),
        ("pos_to_pair", [1, 4, 5, -1, 0, 3, -1, -1, -1, -1, -1, -1]),
        ("pair_to_pos", [[4, 0], [-1, 5], [1, 2]]),
        ("pos_to_expert", [0, 0, 0, -1, 2, 2, -1, -1, -1, -1, -1, -1]),
    ],
)
def test_worked_example_of_the_contract(name, want):
    _, out = permuted(torch.tensor([[2, 0], [-1, 2], [0, 0]], dtype=torch.int32), 3, 4)
    assert out[name].tolist() == want


@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_pairs_of_an_expert_keep_their_order(alignment):
    _, out = permuted(random_idx(), 7, alignment)
    for expert in range(7):
        pairs = out["pos_to_pair"][out["pos_to_expert"] == expert].tolist()
        assert pairs == sorted(pairs)


@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_segments_start_at_multiples_of_the_alignment(alignment):
    _, out = permuted(random_idx(), 7, alignment)
    starts = out["offsets"] - out["counts"]
    assert (starts % alignment).tolist() == [0] * 7


@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_every_live_pair_has_its_own_row(alignment):
    idx = random_idx()
    _, out = permuted(idx, 7, alignment)
    position = out["pair_to_pos"].flatten()
    live = position >= 0
    assert out["pos_to_pair"][position[live].long()].tolist() == live.nonzero().flatten().tolist()
    assert torch.equal(live, idx.flatten() >= 0)


def test_worst_routing_fits_the_rows():
    # One pair an expert pads the most.
    idx = torch.arange(12, dtype=torch.int32).view(6, 2)
    _, out = permuted(idx, 12, 128)
    assert (out["rows"].shape[0], int(out["offsets"][-1])) == (12 * 128, 11 * 128 + 1)


@pytest.mark.parametrize("alignment", [1, 16, 128])
def test_round_trip_with_identity_experts_gives_the_sum_of_the_weights(alignment):
    idx = random_idx()
    x, out = permuted(idx, 7, alignment)
    weights = torch.rand(idx.shape, generator=torch.Generator().manual_seed(1))
    y = moe_unpermute(out["rows"], out["pair_to_pos"], weights)
    assert_close(y, x * (weights * (idx >= 0)).sum(1, keepdim=True))


def test_more_pairs_than_a_byte_counts_go_to_one_expert():
    _, out = permuted(torch.full((300, 2), 3, dtype=torch.int32), 5, 1)
    assert out["counts"].tolist() == [0, 0, 0, 600, 0]


def test_scales_travel_with_their_rows():
    x = torch.arange(5.0)[:, None].expand(5, 8).contiguous()
    rows, scale, *_, pos_to_expert = moe_permute(x, random_idx(5, 2, 4), 4, 8, x_scale=x[:, :2].contiguous())
    live = pos_to_expert >= 0
    assert torch.equal(rows[live, :2], scale[live])


def test_combination_skips_stale_rows_and_their_weights():
    rows = torch.full((4, 2), float("nan"))
    rows[1] = 1.0
    weights = torch.tensor([[float("nan"), 2.0]])
    y = moe_unpermute(rows, torch.tensor([[-1, 1]], dtype=torch.int32), weights)
    assert y.tolist() == [[2.0, 2.0]]


def test_combination_rounds_once():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(64, 33, generator=generator).bfloat16()
    residual = torch.randn(8, 33, generator=generator).bfloat16()
    order = torch.randperm(64, generator=generator).view(8, 8).int()
    exact = moe_unpermute(rows.double(), order, None, residual.double())
    assert torch.equal(moe_unpermute(rows, order, None, residual), exact.bfloat16())
