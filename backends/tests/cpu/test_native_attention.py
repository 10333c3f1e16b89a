"""Paths of the C++ attention and indexer that no sample takes: numbers that bfloat16 does not hold, and many ties."""

import pytest
import torch

from isolith import Make
from isolith.materials.byte_pools import byte_pool
from isolith.materials.indexer import batch_of_scores
from isolith.numerics.pages import FORMATS, views
from isolith.ops.attention import hybrid_attention, indexer_score, indexer_topk, lightning_indexer, sparse_attn
from isolith_backends.cpu.native import attention, indexer

NO_COMPILER = attention.library.missing() or indexer.library.missing()
pytestmark = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def lists(make, pool, heads=3, columns=300):
    slots = pool.shape[0] * pool.shape[1]
    dim = FORMATS[int(pool.shape[2])].dim if pool.dtype == torch.uint8 else pool.shape[2]
    return {
        "q": make.normal(4, heads, dim),
        "kv_cache": pool,
        "indices": make.integers(-1, slots, 4, columns, dtype=torch.int32),
        "softmax_scale": dim**-0.5,
    }


def attended(call):
    return attention.sparse_attn_native.fn(**call), sparse_attn.reference(**call)


def close(results, expected, rtol=2e-2, atol=1e-3):
    for result, due in zip(results, expected, strict=True):
        torch.testing.assert_close(result, due, rtol=rtol, atol=atol)


@pytest.mark.parametrize("where", ["q", "kv_cache"])
def test_subnormal_bfloat16_counts(where):
    make = Make(torch.bfloat16, seed=where)
    call = lists(make, make.normal(5, 64, 64))
    other = "kv_cache" if where == "q" else "q"
    call[where] = call[where] * 2.0**-130
    call[other] = call[other] * 2.0**60
    call["softmax_scale"] = 2.0**60
    result, expected = attended(call)
    assert float(expected[1].float().std()) > 0
    torch.testing.assert_close(result[1], expected[1])
    torch.testing.assert_close(
        result[0].float(), expected[0].float(), rtol=2e-2, atol=float(expected[0].abs().max()) / 99
    )


@pytest.mark.parametrize("code", [0, 3, 250, 255])
def test_scales_at_the_ends_of_the_range_are_read(code):
    make = Make(torch.bfloat16, seed="scales")
    pool = byte_pool(make, 584, 5, 64)
    views(pool, FORMATS[584])[1][2, :, 1] = code
    call = lists(make, pool) | {"softmax_scale": 1e-3 if code < 128 else 2.0**-140}
    result, expected = attended(call)
    assert torch.equal(result[0].isnan(), expected[0].isnan())
    close([value.nan_to_num(7.0) for value in result], [value.nan_to_num(7.0) for value in expected], atol=5e-3)


def test_scales_of_656_bytes_need_not_be_powers_of_two():
    make = Make(torch.bfloat16, seed="656")
    pool = byte_pool(make, 656, 5, 16)
    views(pool, FORMATS[656])[1].view(torch.float32)[1] *= 0.7
    close(*attended(lists(make, pool, columns=70)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_of_a_pool_may_lie_apart(dtype):
    make = Make(dtype, seed="apart")
    close(*attended(lists(make, make.normal(5, 11, 96)[..., ::2], columns=50)))


def test_bits_do_not_depend_on_the_tokens_beside():
    make = Make(torch.bfloat16, seed="beside")
    call = lists(make, make.normal(5, 64, 64), heads=40)
    whole, _ = attention.sparse_attn_native.fn(**call)
    alone, _ = attention.sparse_attn_native.fn(**call | {"q": call["q"][2:3], "indices": call["indices"][2:3]})
    assert torch.equal(whole[2:3], alone)


def test_a_window_longer_than_the_sequence_is_the_sequence():
    make = Make(torch.float32, seed="window")
    cu_seqlens, start_pos = make.batch([3], [4])
    call = hybrid_attention.arguments(
        q=make.normal(3, 2, 32),
        window_cache=make.normal(2, 8, 32),
        window_block_table=make.tensor([[1, 0]], torch.int32),
        cu_seqlens=cu_seqlens,
        start_pos=start_pos,
        window=1 << 20,
        softmax_scale=0.2,
    )
    close(attention.hybrid_attention_native.fn(**call), hybrid_attention.reference(**call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [1, 2, 40])
def test_of_many_ties_the_lowest_indices_are_selected(values):
    make = Make(torch.float32, seed="ties")
    scores = make.integers(0, values, 2, 70_001, dtype=torch.float32)
    call = {"scores": scores, "lengths": make.tensor([70_001, 60_000], torch.int32), "k": 100}
    (indices, _), (expected, _) = indexer.indexer_topk_native.fn(**call), indexer_topk.reference(**call)
    assert torch.equal(indices.sort().values, expected.sort().values)


def test_a_row_whose_largest_stand_together_is_selected_from():
    scores = torch.arange(90_000.0)[None].repeat(2, 1)
    scores[1] = scores[1].flip(0)
    scores[:, ::3] = torch.nan
    call = {"scores": scores.nan_to_num(-torch.inf), "lengths": torch.tensor([90_000, 80_000]), "k": 700}
    (indices, _), (expected, _) = indexer.indexer_topk_native.fn(**call), indexer_topk.reference(**call)
    assert torch.equal(indices.sort().values, expected.sort().values)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_negative_scale_turns_keys_and_queries(sign):
    make = Make(torch.bfloat16, seed="sign")
    call = batch_of_scores(make, [2], [300], 4, 8, 128, 16)
    call["k_cache"] = byte_pool(make, 132, call["k_cache"].shape[0], 16)
    views(call["k_cache"], FORMATS[132])[1].view(torch.float32)[1, 3:9] *= -1.0
    call["q"] = call["q"].to(torch.float8_e4m3fn)
    call["q_scale"] = make.uniform(2, 8, low=0.5, high=2.0, dtype=torch.float32) * sign
    call = indexer_score.arguments(**call)
    close([indexer.indexer_score_native.fn(**call)], [indexer_score.reference(**call)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("code", [0, 1, 253, 255])
def test_scales_of_keys_at_the_ends_of_the_range_are_read(code):
    make = Make(torch.bfloat16, seed="keys")
    call = batch_of_scores(make, [2], [300], 4, 8, 128, 16)
    call["k_cache"] = byte_pool(make, 68, call["k_cache"].shape[0], 16)
    views(call["k_cache"], FORMATS[68])[1][1, 3:9, 2] = code
    call = indexer_score.arguments(**call | {"weights": call["weights"] * (2.0**-60 if code > 9 else 1.0)})
    result, expected = indexer.indexer_score_native.fn(**call), indexer_score.reference(**call)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_candidates_select_as_the_composition_does():
    make = Make(torch.float32, seed="candidates")
    call = batch_of_scores(make, [40], [900], 2, 4, 64, 16)
    blocks = make.integers(-1, 70, 40, 30)
    call = lightning_indexer.arguments(**call, k=20, candidates=blocks, candidate_block=7)
    (indices, number), (due, length) = (
        indexer.lightning_indexer_native.fn(**call),
        lightning_indexer.reference(**call),
    )
    assert torch.equal(number, length)
    same = (indices.sort().values == due.sort().values).float().mean()
    assert same > 0.99
