"""sparse_attn against the formula written as loops, and what its samples cannot express."""

import math

import pytest
import torch

from isolith import Make
from isolith.ops.attention import sparse_attn
from isolith.ops.attention.sparse_attn import reference

WIDE = torch.float64
inf = math.inf


def by_hand(q, rows, scale, sink):
    """One head over a list of entries, number by number."""
    logits = [scale * sum(a * b for a, b in zip(q, row, strict=True)) for row in rows]
    if not rows:
        return [0.0] * len(q), inf
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    below = total + (math.exp(sink - top) if sink < inf else inf)
    out = [sum(w * row[c] for w, row in zip(weights, rows, strict=True)) / below for c in range(len(q))]
    return out, top + math.log(total)


def call(make, tokens=4, heads=3, dim=6, slots=20, columns=9):
    return {
        "q": make.normal(tokens, heads, dim),
        "kv_cache": make.normal(1, slots, dim),
        "indices": make.integers(-2, slots + 3, tokens, columns),
        "softmax_scale": 0.5,
        "sink": make.normal(heads),
    }


@pytest.mark.parametrize(("sink", "out"), [(0.5, [2.0780850, -0.2523942]), (None, [2.3794135, -0.2889921])])
def test_sink_takes_the_share_of_golden_vector_5_and_leaves_lse_alone(sink, out):
    q = torch.tensor([[[1.0, 0.0]]], dtype=WIDE)
    kv = torch.tensor([[[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]]], dtype=WIDE)
    sink = None if sink is None else torch.tensor([sink], dtype=WIDE)
    got, lse = sparse_attn(q, kv, torch.tensor([[0, 1, 2]]), 2**-0.5, sink)
    assert torch.allclose(
        torch.cat((got.flatten(), lse.flatten())), torch.tensor([*out, 2.4310011], dtype=WIDE), atol=5e-8
    )


@pytest.mark.parametrize("sink", ["normal", "inf", "-inf", "none"])
def test_result_is_the_formula_over_the_valid_columns(sink):
    make = Make(WIDE, seed=3)
    given = call(make)
    sinks = {"normal": given["sink"], "inf": make.full(inf, 3), "-inf": make.full(-inf, 3), "none": None}[sink]
    given["sink"] = sinks
    out, lse = sparse_attn(**given)
    for t in range(4):
        rows = [given["kv_cache"][0, i].tolist() for i in given["indices"][t].tolist() if 0 <= i < 20]
        for h in range(3):
            number = -inf if sinks is None else float(sinks[h])
            want, want_lse = by_hand(given["q"][t, h].tolist(), rows, 0.5, number)
            assert out[t, h].tolist() == pytest.approx(want, rel=1e-12, abs=1e-14)
            assert float(lse[t, h]) == pytest.approx(want_lse, rel=1e-12)


def test_logits_that_exp_cannot_hold_are_no_matter():
    given = call(Make(WIDE, seed=14), heads=1) | {"indices": torch.arange(20).repeat(4, 1), "softmax_scale": 1e4}
    out, _ = sparse_attn(**given)
    largest = (given["q"][:, 0] @ given["kv_cache"][0].T).argmax(1)
    torch.testing.assert_close(out[:, 0], given["kv_cache"][0, largest])


def test_two_pools_equal_one_concatenated_pool():
    make = Make(WIDE, seed=4)
    given = call(make)
    both = {"extra_kv_cache": make.normal(2, 7, 6), "extra_indices": make.integers(0, 14, 4, 5)}
    joined = torch.cat((given["kv_cache"], both["extra_kv_cache"].view(1, 14, 6)), dim=1)
    first = torch.where(given["indices"] < 20, given["indices"], -1)
    one = given | {"kv_cache": joined, "indices": torch.cat((first, both["extra_indices"] + 20), dim=1)}
    torch.testing.assert_close(sparse_attn(**given, **both), sparse_attn(**one))


def test_halves_merged_by_lse_equal_the_whole():
    given = call(Make(WIDE, seed=5)) | {"sink": None}
    left, right = (sparse_attn(**given | {"indices": part}) for part in given["indices"].tensor_split(2, dim=1))
    lse = torch.logaddexp(left[1], right[1])
    merged = sum(out * (part - lse).exp()[..., None] for out, part in (left, right))
    torch.testing.assert_close((merged, lse), sparse_attn(**given))


def test_an_entry_listed_twice_counts_twice():
    make = Make(WIDE, seed=6)
    given = call(make, tokens=1) | {"indices": torch.tensor([[3, 3, 8]]), "sink": None}
    copied = given["kv_cache"].clone()
    copied[0, 4] = copied[0, 3]
    twice = given | {"kv_cache": copied, "indices": torch.tensor([[3, 4, 8]])}
    assert torch.equal(sparse_attn(**given)[0], sparse_attn(**twice)[0])


def test_order_of_columns_does_not_matter_beyond_rounding():
    given = call(Make(WIDE, seed=7))
    turned = given | {"indices": given["indices"].flip(1)}
    torch.testing.assert_close(sparse_attn(**given), sparse_attn(**turned))


def test_row_without_valid_columns_is_zero_with_infinite_lse():
    given = call(Make(WIDE, seed=8)) | {"indices": torch.full((4, 9), -1)}
    out, lse = sparse_attn(**given)
    assert (out == 0).all()
    assert (lse == inf).all()


def test_nan_outside_the_lists_changes_no_bit():
    given = call(Make(WIDE, seed=9))
    valid = given["indices"].clamp(-1, 20)
    used = torch.zeros(21, dtype=torch.bool).index_fill(0, valid[valid >= 0].long(), True)[:20]
    poisoned = given["kv_cache"].clone()
    poisoned[0, ~used] = torch.nan
    assert (~used).any()
    assert torch.equal(sparse_attn(**given)[0], sparse_attn(**given | {"kv_cache": poisoned})[0])


def test_nan_in_a_selected_entry_reaches_only_the_tokens_that_list_it():
    given = call(Make(WIDE, seed=10)) | {"indices": torch.tensor([[1, 2], [2, 3], [3, 4], [0, -1]])}
    given["kv_cache"][0, 2] = torch.nan
    assert reference(**given)[0].isnan().flatten(1).any(1).tolist() == [True, True, False, False]


def test_block_table_means_the_slots_that_it_names():
    make = Make(WIDE, seed=11)
    pages, (cu_seqlens, _) = make.pages([7, 5], 3), make.batch([1, 2])
    given = call(make, tokens=3) | {"kv_cache": make.normal(pages.blocks, 3, 6), "indices": make.integers(0, 5, 3, 9)}
    row = torch.tensor([0, 1, 1])
    slots = pages.block_table[row[:, None], given["indices"] // 3] * 3 + given["indices"] % 3
    logical = sparse_attn(**given, block_table=pages.block_table, cu_seqlens=cu_seqlens)
    assert torch.equal(logical[0], sparse_attn(**given | {"indices": slots})[0])


def test_value_dim_takes_the_first_elements():
    given = call(Make(WIDE, seed=12))
    assert torch.equal(sparse_attn(**given, value_dim=4)[0], sparse_attn(**given)[0][..., :4])


def test_scaling_values_by_a_power_of_two_scales_the_output_exactly():
    given = call(Make(WIDE, seed=13))
    doubled = given | {"kv_cache": given["kv_cache"] * 2, "softmax_scale": 0.25}
    assert torch.equal(sparse_attn(**doubled)[0], sparse_attn(**given)[0] * 2)
