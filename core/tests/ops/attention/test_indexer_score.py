"""indexer_score against the formula written as loops, and visibility in every division of a sequence into calls."""

import math

import pytest
import torch

from isolith import Make
from isolith.materials.byte_pools import byte_pool
from isolith.materials.indexer import batch_of_scores, quantised_kinds
from isolith.numerics.pages import read_entries
from isolith.ops.attention import indexer_score

WIDE = torch.float64


def by_hand(q, weights, keys, scale):
    """The score of one token against one entry, number by number."""
    dots = [sum(a * b for a, b in zip(head, keys, strict=True)) for head in q]
    return scale * sum(w * max(0.0, dot) for w, dot in zip(weights, dots, strict=True))


def test_scores_are_the_formula_over_visible_entries():
    call = batch_of_scores(Make(WIDE, seed=1), [3, 2], [2, 9], 4, 3, 32, 2)
    scores, table = indexer_score(**call, out_dtype="float64"), call["block_table"].tolist()
    for t, (b, p) in enumerate([(0, 2), (0, 3), (0, 4), (1, 9), (1, 10)]):
        seen = (p + 1) // 4
        keys = [call["k_cache"][table[b][s // 2], s % 2].tolist() for s in range(seen)]
        q, weights = call["q"][t].tolist(), call["weights"][t].tolist()
        want = [by_hand(q, weights, key, call["softmax_scale"]) for key in keys]
        assert scores[t].tolist() == pytest.approx(want + [-math.inf] * (call["max_entries"] - seen), rel=1e-12)


@pytest.mark.parametrize(("position", "seen"), [(2, 0), (3, 1), (6, 1), (7, 2)])
def test_an_entry_is_seen_from_the_last_token_of_its_window_on(position, seen):
    call = batch_of_scores(Make(WIDE, seed=2), [1], [position], 4, 2, 32, 2) | {"max_entries": 3}
    assert indexer_score(**call).isfinite().sum().item() == seen


@pytest.mark.parametrize("splits", [[1] * 13, [5, 0, 8], [12, 1]], ids=["decode", "chunks", "last_alone"])
def test_scores_do_not_depend_on_the_division_into_calls(splits):
    whole = batch_of_scores(Make(WIDE, seed=3), [13], [0], 2, 2, 32, 4)
    rows, start = [], 0
    for tokens in splits:
        cu_seqlens, start_pos = Make().batch([tokens], [start])
        part = {name: whole[name][start : start + tokens] for name in ("q", "weights")}
        rows.append(indexer_score(**whole | part | {"cu_seqlens": cu_seqlens, "start_pos": start_pos}))
        start += tokens
    assert torch.equal(torch.cat(rows), indexer_score(**whole))


def test_softmax_scale_and_weights_are_one_factor():
    call = batch_of_scores(Make(WIDE, seed=4), [2], [30], 4, 2, 32, 4)
    folded = call | {"weights": call["weights"] * call["softmax_scale"], "softmax_scale": 1.0}
    torch.testing.assert_close(indexer_score(**folded), indexer_score(**call))


@pytest.mark.parametrize("entry", [132, 68])
def test_quantised_keys_score_as_their_values(entry):
    make = Make(torch.float32, seed=5)
    call = batch_of_scores(make, [2], [60], 4, 4, 128, 8)
    pool = byte_pool(make, entry, call["k_cache"].shape[0], 8, spread=6)
    slots = torch.arange(pool.shape[0] * 8)
    values = read_entries(pool, slots, torch.float32).view(-1, 8, 128)
    assert torch.equal(indexer_score(**call | {"k_cache": pool}), indexer_score(**call | {"k_cache": values}))


def test_packed_query_scores_as_its_values():
    make = Make(torch.float32, seed=6)
    call = batch_of_scores(make, [2], [60], 4, 4, 64, 8)
    # Codes 2 and 9 are 1.0 and -0.5; the even element is in the low nibble; groups of 32 with scales 2 and 0.25.
    packed = torch.full((2, 4, 32), 0x92, dtype=torch.uint8)
    scale = torch.tensor([2.0, 0.25]).expand(2, 4, 2).contiguous()
    values = torch.tensor([1.0, -0.5]).repeat(32) * torch.tensor([2.0, 0.25]).repeat_interleave(32)
    plain = call | {"q": values.expand(2, 4, 64).contiguous()}
    assert torch.equal(indexer_score(**call | {"q": packed, "q_scale": scale}), indexer_score(**plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=["float32", "e8m0"])
def test_e4m3_query_scores_as_its_values(dtype):
    make = Make(torch.float32, seed=7)
    call = batch_of_scores(make, [2], [60], 4, 4, 32, 8)
    codes = make.normal(2, 4, 32, dtype=torch.float8_e4m3fn)
    scale = make.integers(-6, 7, 2, 4).float().exp2().to(dtype)
    plain = call | {"q": codes.float() * scale.float()[..., None]}
    assert torch.equal(indexer_score(**call | {"q": codes, "q_scale": scale}), indexer_score(**plain))


def test_visible_entry_without_a_block_scores_as_zeros_and_hides_no_other():
    call = batch_of_scores(Make(WIDE, seed=8), [1], [11], 1, 2, 32, 4)
    whole = indexer_score(**call)
    call["block_table"][0, 1] = -1
    lost = torch.tensor([4 <= s < 8 for s in range(12)])
    assert torch.equal(indexer_score(**call), torch.where(lost, 0.0, whole))


@pytest.mark.parametrize("kind", ["e4m3_132", "e2m1_68"])
def test_quantised_query_of_no_tokens_gives_no_scores(kind):
    make = Make(seed=9)
    calls = dict(quantised_kinds(make, batch_of_scores(make, [0, 0], [5, 9], 4, 4, 128, 8), 8))
    assert indexer_score(**calls[kind]).shape == (0, 2)
