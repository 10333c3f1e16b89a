"""Indices that the checks of values would refuse touch no memory: what they name is dropped."""

import torch

from isolith_backends.cuda import attention, moe


def test_an_expert_that_there_is_not_is_dropped() -> None:
    x, idx = torch.ones(3, 8), torch.tensor([[0, 7], [1 << 20, 1], [-5, 0]], dtype=torch.int32)

    _, _, counts, _, _, pair_to_pos, _ = moe.moe_permute.fn(x, idx, experts=4, alignment=4)

    assert (counts.tolist(), (pair_to_pos < 0).tolist()) == (
        [2, 1, 0, 0],
        [[False, True], [True, False], [True, False]],
    )


def test_an_expert_beyond_32_bits_is_dropped() -> None:
    idx = torch.tensor([[1 << 32, 1]])

    assert moe.moe_permute.fn(torch.ones(1, 8), idx, experts=4)[2].tolist() == [0, 1, 0, 0]


def test_a_position_beyond_the_rows_adds_nothing() -> None:
    positions = torch.tensor([[0, 2], [1 << 30, 1]], dtype=torch.int32)

    assert moe.moe_unpermute.fn(torch.ones(2, 3), positions).tolist() == [[1.0] * 3] * 2


def test_a_token_id_beyond_the_table_has_no_experts() -> None:
    logits, table = torch.zeros(3, 4), torch.tensor([[0, 1], [2, 9]])

    chosen, weights = moe.moe_hash_gate.fn(logits, torch.tensor([1, 2, -1]), table)

    assert (chosen.tolist(), weights.tolist()) == ([[2, -1], [-1, -1], [-1, -1]], [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])


def test_a_slot_beyond_the_pool_is_not_written() -> None:
    cache = torch.zeros(2, 4, 584, dtype=torch.uint8)

    attention.kv_cache_write.fn(cache, torch.ones(3, 512), torch.tensor([8, 1 << 40, -9]))

    assert not cache.any()


def test_a_slot_beyond_the_pool_reads_as_zeros() -> None:
    cache = torch.full((2, 4, 584), 255, dtype=torch.uint8)

    assert not attention.kv_cache_read.fn(cache, torch.tensor([8, 1 << 40, -9])).any()
