"""mla_attention against dense attention with a key and value of every head, and DSA made of two operators."""

import math

import pytest
import torch

from isolith import Make
from isolith.materials.byte_pools import byte_pool
from isolith.numerics.pages import read_entries
from isolith.ops.attention import lightning_indexer, mla_attention

WIDE = torch.float64
NOPE, ROTARY, LATENT, VALUES, HEADS = 6, 4, 10, 5, 3


class Layer:
    """One sequence: queries, cache in shuffled blocks with NaN behind the end, weights."""

    def __init__(self, seed, length, dtype=WIDE):
        make = Make(dtype, seed=seed)
        pages = make.pages([length], 4)
        item = torch.arange(length)
        self.rows = make.normal(length, LATENT + ROTARY)
        self.cache = make.full(torch.nan, pages.blocks, 4, LATENT + ROTARY)
        self.cache[pages.block_table[0].long()[item // 4], item % 4] = self.rows
        self.table, self.length = pages.block_table, length
        self.q = make.normal(length, HEADS, NOPE + ROTARY)
        self.w_uk, self.w_uv = make.normal(HEADS, NOPE, LATENT), make.normal(HEADS, VALUES, LATENT)

    def attend(self, start, stop, **more):
        cu_seqlens, start_pos = Make().batch([stop - start], [start])
        tensors = (self.q[start:stop], self.cache, self.w_uk, self.w_uv, self.table, cu_seqlens, start_pos)
        return mla_attention(*tensors, 0.3, **more)

    def dense(self, allowed):
        """Softmax over all tokens, -inf where not allowed [length, length]."""
        latent, rotary = self.rows[:, :LATENT], self.rows[:, LATENT:]
        k = torch.cat((torch.einsum("jc,hnc->jhn", latent, self.w_uk), rotary[:, None].expand(-1, HEADS, -1)), dim=-1)
        v = torch.einsum("jc,hvc->jhv", latent, self.w_uv)
        logits = torch.einsum("thd,jhd->thj", self.q, k) * 0.3
        logits = logits.masked_fill(~allowed[:, None], -math.inf)
        return torch.einsum("thj,jhv->thv", logits.softmax(-1), v), logits.logsumexp(-1)


@pytest.mark.parametrize("absorbed", [True, False])
def test_result_is_dense_causal_attention_with_expanded_keys(absorbed):
    layer = Layer(1, 11)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    torch.testing.assert_close(layer.attend(0, 11, absorbed=absorbed), layer.dense(causal))


@pytest.mark.parametrize("splits", [[1] * 11, [4, 7], [10, 1]], ids=["decode", "chunks", "last_alone"])
def test_result_does_not_depend_on_the_division_into_calls(splits):
    layer, parts, start = Layer(2, 11), [], 0
    for tokens in splits:
        parts.append(layer.attend(start, start + tokens)[0])
        start += tokens
    torch.testing.assert_close(torch.cat(parts), layer.attend(0, 11)[0])


def test_sequences_of_a_batch_do_not_see_each_other():
    one, two = Layer(7, 9), Layer(8, 11)
    two.w_uk, two.w_uv = one.w_uk, one.w_uv
    cu_seqlens, start_pos = Make().batch([3, 0, 7], [6, 5, 4])
    tables = [torch.nn.functional.pad(table, (0, 3 - table.shape[1]), value=-1) for table in (one.table, two.table)]
    block_table = torch.cat((tables[0], torch.full((1, 3), -1, dtype=torch.int32), tables[1] + len(one.cache)))
    both = torch.cat((one.q[6:], two.q[4:])), torch.cat((one.cache, two.cache)), one.w_uk, one.w_uv
    out, lse = mla_attention(*both, block_table, cu_seqlens, start_pos, 0.3)
    alone = one.attend(6, 9), two.attend(4, 11)
    wanted = torch.cat([part[0] for part in alone]), torch.cat([part[1] for part in alone])
    torch.testing.assert_close((out, lse), wanted)


def test_position_without_a_block_is_left_out():
    layer = Layer(9, 11)
    layer.table[0, 1] = -1  # positions 4 .. 7
    allowed = torch.ones(11, 11, dtype=torch.bool).tril()
    allowed[:, 4:8] = False
    torch.testing.assert_close(layer.attend(0, 11), layer.dense(allowed))


def test_quantised_rows_attend_as_their_values():
    make = Make(torch.float32, seed=10)
    pool = byte_pool(make, 656, 3, 4)
    values = read_entries(pool, torch.arange(12), torch.float32).view(3, 4, 576)
    weights = make.normal(2, 16, 512, std=0.05), make.normal(2, 8, 512, std=0.05)
    batch = torch.tensor([[2, 0, 1]], dtype=torch.int32), *make.batch([3], [7])
    q = make.normal(3, 2, 80)
    given, wanted = (mla_attention(q, cache, *weights, *batch, 0.1) for cache in (pool, values))
    assert torch.equal(given[0], wanted[0])


def test_listed_positions_behind_the_token_are_not_seen():
    layer = Layer(3, 9)
    lists = torch.arange(9).expand(9, 9).contiguous()
    torch.testing.assert_close(layer.attend(0, 9, topk_indices=lists), layer.attend(0, 9))


def test_columns_of_minus_one_list_nothing():
    layer = Layer(11, 6)
    lists = torch.arange(6).where(torch.arange(6) % 2 == 0, -1).expand(6, 6).contiguous()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[:, 1::2] = False
    torch.testing.assert_close(layer.attend(0, 6, topk_indices=lists), layer.dense(allowed))


def test_length_cuts_the_list():
    layer = Layer(4, 6)
    lists = torch.arange(6).expand(6, 6).contiguous()
    lengths = torch.full((6,), 1)
    allowed = torch.zeros(6, 6, dtype=torch.bool)
    allowed[:, 0] = True
    given = layer.attend(0, 6, topk_indices=lists, topk_length=lengths)
    torch.testing.assert_close(given, layer.dense(allowed))


def test_lists_of_the_indexer_give_attention_masked_to_them():
    """DeepSeek-V3.2's sparse attention, from lightning_indexer at ratio 1 and this operator."""
    length, k = 30, 5
    layer, make = Layer(5, length), Make(WIDE, seed=6)
    pages, (cu_seqlens, start_pos) = make.pages([length], 7), make.batch([length])
    keys, q, weights = make.normal(length, 32), make.normal(length, 4, 32), make.normal(length, 4)
    k_cache = make.full(torch.nan, pages.blocks, 7, 32)
    item = torch.arange(length)
    k_cache[pages.block_table[0].long()[item // 7], item % 7] = keys
    lists, count = lightning_indexer(
        q, weights, k_cache, pages.block_table, cu_seqlens, start_pos, 1, k, length, out_dtype="float64"
    )
    scores = (torch.einsum("thc,jc->thj", q, keys).relu() * weights[..., None]).sum(1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    chosen = scores.masked_fill(~causal, -math.inf).topk(k, dim=1).indices
    allowed = torch.zeros_like(causal).scatter(1, chosen, True) & causal
    given = layer.attend(0, length, topk_indices=lists, topk_length=count)
    torch.testing.assert_close(given, layer.dense(allowed))


def cost_of(tokens, absorbed):
    """Of V3's widths: nope 128, rotary 64, latent 512, values 128, over a table for 256 positions."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors = empty(tokens, 16, 192), empty(4, 64, 576), empty(16, 128, 512), empty(16, 128, 512)
    batch = [empty(1, 4, dtype=torch.int32), empty(2, dtype=torch.int32), empty(1, dtype=torch.int32)]
    return mla_attention.cost(**mla_attention.arguments(*tensors, *batch, 0.1, absorbed)).flops


def test_absorbed_form_costs_its_products():
    assert cost_of(3, True) == 3 * 2 * 16 * (512 * 256 + 256 * (576 + 512))


def test_form_per_head_makes_keys_and_values_once_however_many_tokens_there_are():
    assert cost_of(200, False) == 2 * 16 * (256 * 512 * 256 + 200 * 256 * (192 + 128))
