"""Adapters over the twin's functions on the host, for what depends on how tensors lie in memory."""

import torch

from isolith import ops
from isolith_backends.cambricon import attention


def lists(pools):
    """A call of sparse_attn with two pools."""
    torch.manual_seed(5)
    return {
        "q": torch.randn(3, 2, 8),
        "kv_cache": pools[0],
        "indices": torch.tensor([[0, 3, -1], [1, 1, 2], [-1, -1, -1]], dtype=torch.int32),
        "softmax_scale": 0.5,
        "sink": torch.tensor([0.5, -1.0]),
        "extra_kv_cache": pools[1],
        "extra_indices": torch.tensor([[5, 0], [-1, 2], [-1, -1]], dtype=torch.int32),
    }


def pool_that_is_called(monkeypatch, call):
    """How many rows the call of tmo has in its pool."""
    seen, right = [], attention.attended
    monkeypatch.setattr(attention, "attended", lambda q, pool, *rest: seen.append(pool) or right(q, pool, *rest))
    made = attention.sparse_attn.fn(**call)
    return seen[0], made


def test_two_slices_of_one_buffer_are_not_copied(card, monkeypatch):
    card()
    buffer = torch.randn(9, 2, 8)
    pool, made = pool_that_is_called(monkeypatch, lists((buffer[6:8], buffer[1:4])))
    assert pool.data_ptr() == buffer[1:].data_ptr()
    torch.testing.assert_close(made, ops.attention.sparse_attn.reference(**lists((buffer[6:8], buffer[1:4]))))


def test_two_pools_are_gathered_some_tokens_at_a_time(card, monkeypatch):
    card()
    monkeypatch.setattr(attention, "MOST_GATHERED", 5 * 8)
    pools = torch.randn(2, 2, 8), torch.randn(3, 2, 8)
    pool, made = pool_that_is_called(monkeypatch, lists(pools))
    assert pool.shape == (1, 5, 8)
    torch.testing.assert_close(made, ops.attention.sparse_attn.reference(**lists(pools)))
