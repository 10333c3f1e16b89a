"""Blocks of the newest chips, fused products and paged caches as the vendor documents them, by hand."""

import pytest
import torch
from torch import tensor


def mx(call, values, dst_type):
    x = torch.zeros(1, 64).bfloat16()
    x[0, : len(values)] = tensor(values).bfloat16()
    return call("npu::npu_dynamic_mx_quant", chip="a5", input=x, dst_type=dst_type)


@pytest.mark.parametrize("dst_type", [24, 292], ids=["torch's number", "torch_npu's number"])
def test_scale_of_a_block_is_a_power_of_two_that_leaves_room_for_its_largest(call, dst_type):
    codes, scales = mx(call, [448.0, 1.0], dst_type)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes[0, :2].float().tolist() == [448.0, 1.0]
    assert scales.tolist() == [[[127, 0]]]  # 2^0, and the least there is for a block of zeros


def test_four_bits_are_packed_low_half_first_and_ties_go_to_even(call):
    codes, scales = mx(call, [6.0, -0.5, 2.5, 5.0], 296)
    assert [hex(byte) for byte in codes[0, :2].tolist()] == ["0x97", "0x64"]  # 6, -0.5; 2, 4
    assert scales[0, 0, 0].item() == 127


def test_an_odd_number_of_blocks_leaves_a_scale_unwritten(call):
    given = {"input": torch.ones(1, 32).bfloat16(), "dst_type": 292}
    assert call("npu::npu_dynamic_mx_quant", chip="a5", **given)[1].tolist() == [[[119, 255]]]


def rounded_up(call, values, **more):
    x = torch.zeros(1, 64).bfloat16()
    x[0, : len(values)] = tensor(values).bfloat16()
    given = {"input": x, "dst_type": 292, "scale_alg": 1, **more}
    codes, scales = call("npu::npu_dynamic_mx_quant", chip="a5", **given)
    return codes[0, 0].float().item(), scales[0, 0].tolist()


@pytest.mark.parametrize(
    ("largest", "code", "byte"), [(448.0, 448.0, 127), (450.0, 224.0, 128), (1.75, 448.0, 119), (2.0, 256.0, 120)]
)
def test_scale_may_be_rounded_up_so_that_nothing_saturates(call, largest, code, byte):
    assert rounded_up(call, [largest]) == (code, [byte, 0])


def test_largest_value_of_a_block_may_have_a_lower_bound(call):
    assert rounded_up(call, [1.0], max_low_bound=448.0) == (1.0, [127, 127])


def test_lower_bound_is_for_scales_that_are_rounded_up_alone(call):
    with pytest.raises(RuntimeError, match="max_low_bound is"):
        rounded_up(call, [1.0], scale_alg=0, max_low_bound=1.0)


def test_blocks_may_be_longer_and_the_last_one_short(call):
    given = {"input": torch.full((1, 200), 448.0).bfloat16(), "dst_type": 292, "block_size": 128, "scale_alg": 1}
    codes, scales = call("npu::npu_dynamic_mx_quant", chip="a5", **given)
    assert (codes.shape, scales.tolist()) == ((1, 200), [[[127, 127]]])


def mx_product(call, **changes):
    # Each of the three blocks of 32 columns by itself: 1 * 2 * 32 products of 2 and 4, and so on.
    given = {
        "x1": torch.ones(1, 96).to(torch.float8_e4m3fn),
        "x2": torch.ones(2, 96).to(torch.float8_e4m3fn).T,
        "scale": tensor([[[127, 128], [129, 255]], [[127, 127], [127, 255]]], dtype=torch.uint8).transpose(0, 1),
        "pertoken_scale": tensor([[[127, 127], [128, 255]]], dtype=torch.uint8),
        "output_dtype": 6,
        "scale_dtype": 293,
        "pertoken_scale_dtype": 293,
        "group_sizes": [1, 1, 32],
    }
    return call("npu::npu_quant_matmul", chip="a5", **given | changes)


def test_every_32_columns_have_scales_of_their_own_in_pairs(call):
    assert mx_product(call).tolist() == [[32.0 + 64.0 + 2 * 128.0, 32.0 + 32.0 + 2 * 32.0]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale_dtype": None}, r"dtypes of scales are \(None, 293\)"),
        ({"group_sizes": None}, "group_sizes is None"),
        ({"scale": torch.full((2, 2, 2), 127, dtype=torch.uint8)}, "transposed alike"),
        ({"pertoken_scale": torch.full((1, 1, 2), 127, dtype=torch.uint8)}, "the scale of rows has shape"),
        ({"output_dtype": 3}, "output_dtype is 3"),
    ],
)
def test_product_in_blocks_refuses(call, changes, says):
    with pytest.raises(RuntimeError, match=says):
        mx_product(call, **changes)


def test_product_in_blocks_is_on_the_newest_chip_alone(call):
    given = {"x1": torch.ones(1, 32).to(torch.float8_e4m3fn), "x2": torch.ones(32, 1).to(torch.float8_e4m3fn)}
    scale = torch.full((1, 1, 2), 127, dtype=torch.uint8)
    options = {"output_dtype": 15, "scale_dtype": 293, "pertoken_scale_dtype": 293, "group_sizes": [1, 1, 32]}
    with pytest.raises(RuntimeError, match="x is torch"):
        call("npu::npu_quant_matmul", chip="a3", **given, scale=scale, pertoken_scale=scale, **options)


def test_grouped_product_in_blocks_takes_each_experts_scales_and_leaves_rows_behind_alone(call):
    codes = torch.ones(3, 64).to(torch.float8_e4m3fn)
    of_experts = tensor([[[[127, 127]]], [[[128, 128]]]], dtype=torch.uint8)
    (out,) = call(
        "npu::npu_grouped_matmul",
        chip="a5",
        x=[codes],
        weight=[torch.ones(2, 1, 64).to(torch.float8_e4m3fn).transpose(1, 2)],
        scale=[of_experts.transpose(1, 2)],
        per_token_scale=[torch.full((3, 1, 2), 127, dtype=torch.uint8)],
        group_list=tensor([1, 2]),
        split_item=3,
        group_type=0,
        output_dtype=15,
        scale_dtype=293,
        per_token_scale_dtype=293,
    )
    assert out[:2].flatten().tolist() == [64.0, 128.0]
    assert out[2].isnan().all()


def tiled(call, chip="a5", **changes):
    given = {
        "x": [torch.ones(3, 129).to(torch.float8_e4m3fn)],
        "weight": [torch.ones(2, 1, 129).to(torch.float8_e4m3fn).transpose(1, 2)],
        "scale": [tensor([[[1.0, 10.0]], [[0.5, 1.0]]]).transpose(1, 2)],
        "per_token_scale": [tensor([[1.0, 1.0], [1.0, 3.0], [9.0, 9.0]])],
    }
    options = {"group_list": tensor([1, 2]), "split_item": 3, "group_type": 0, "output_dtype": 15}
    return call("npu::npu_grouped_matmul", chip=chip, **given | options | changes)[0]


def test_product_in_tiles_has_a_scale_for_every_128_and_the_rest(call):
    out = tiled(call)
    assert out[:2].flatten().tolist() == [128.0 + 10.0, 64.0 + 3.0]
    assert out[2].isnan().all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": [torch.ones(2, 2, 1).bfloat16()]}, "scale is torch"),
        ({"scale": [torch.ones(2, 1, 2)]}, "scale has shape"),
        ({"per_token_scale": [torch.ones(3, 1)]}, "per_token_scale has shape"),
        ({"chip": "a3"}, "x is torch"),
    ],
)
def test_product_in_tiles_refuses(call, changes, says):
    with pytest.raises(RuntimeError, match=says):
        tiled(call, **changes)


def test_tiles_of_128_have_float32_scales(call):
    x = torch.full((1, 256), 448.0).bfloat16()
    x[0, 128:] = 896.0
    codes, scales = call("npu::npu_dynamic_block_quant", chip="a5", x=x, dst_type=292)
    assert scales.tolist() == [[1.0, 2.0]]
    assert codes.float().unique().tolist() == [448.0]


def test_default_format_of_the_block_quantisation_is_none_of_its_own(call):
    with pytest.raises(RuntimeError, match="dst_type is 1"):
        call("npu::npu_dynamic_block_quant", chip="a5", x=torch.ones(1, 128).bfloat16())


def test_weight_of_a_token_comes_before_the_quantisation(call):
    given = {"x": torch.ones(2, 256).bfloat16(), "weight": tensor([1.0, 4.0]), "dst_type": 292}
    codes, scales, _ = call("npu::npu_swiglu_group_quant", chip="a5", **given)
    assert (scales[1] / scales[0]).tolist() == [4.0]
    assert torch.equal(codes[0].float(), codes[1].float())


def test_rows_behind_the_groups_are_undefined(call):
    given = {"x": torch.ones(2, 256).bfloat16(), "group_index": tensor([1]), "dst_type": 292}
    codes, scales, _ = call("npu::npu_swiglu_group_quant", chip="a5", **given)
    assert codes.float().isnan().all(1).tolist() == [False, True]
    assert scales.isnan().flatten().tolist() == [False, True]


def fused(call, **more):
    given = {"x": torch.ones(2, 3, dtype=torch.int8), "weight": [torch.ones(2, 3, 2, dtype=torch.int8)]}
    scales = {"x_scale": tensor([1.0, 2.0]), "weight_scale": [torch.ones(2, 2)]}
    return call("npu::npu_grouped_matmul_swiglu_quant_v2", **given | scales | more)[1] * 127


def test_fused_product_of_torch_npu_takes_either_list(call):
    cumulated = fused(call, group_list=tensor([1, 2]))
    assert torch.equal(cumulated, fused(call, group_list=tensor([1, 1]), group_list_type=1))
    silu = torch.nn.functional.silu(tensor([3.0, 6.0])) * tensor([3.0, 6.0])
    assert torch.allclose(cumulated, silu)


def cache_of(blocks=2):
    return torch.zeros(blocks, 2, 1, 1)


def test_scatter_into_pages_wants_its_mode_named(call):
    rows = tensor([1.0, 2.0]).view(2, 1, 1)
    key, value, slots = cache_of(), cache_of(), tensor([3, -1])
    given = {"key": rows, "value": rows, "key_cache": key, "value_cache": value, "slot_mapping": slots}
    with pytest.raises(RuntimeError, match="cache_mode is 'PA_NZ'"):
        call("npu::npu_scatter_pa_kv_cache", **given)
    call("npu::npu_scatter_pa_kv_cache", **given, cache_mode="Norm")
    assert key.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("lengths", "cumulated"), [([3, 1], False), ([0, 3, 4], True)], ids=["plain", "cumulated"])
def test_gather_from_pages_packs_requests(call, lengths, cumulated):
    cache, out = torch.arange(6.0).view(3, 2, 1, 1), torch.full((4, 1, 1), -1.0)
    tables = {"block_tables": tensor([[2, 0], [1, 0]], dtype=torch.int32), "is_seq_lens_cumsum": cumulated}
    given = {"key_cache": cache, "value_cache": cache, "key": out, "value": out.clone()}
    call("npu::npu_gather_pa_kv_cache", **given, **tables, seq_lens=tensor(lengths, dtype=torch.int32))
    assert out.flatten().tolist() == [4.0, 5.0, 0.0, 2.0]


def stored(call, x, slots):
    cache = torch.zeros(1, 16, 1, 640, dtype=torch.uint8).view(torch.float8_e4m3fn)
    settings = {"quant_group_size": 64, "quant_mode": 2, "round_scale_flag": True, "layout": 1}
    given = {"kv_compress_cache": cache, "x": x, "slot_mapping": tensor(slots)}
    call("_C_ascend::kv_compress_epilog", chip="a5", **given, **settings)
    return cache


def test_packed_rows_skip_minus_one(call):
    cache = stored(call, torch.ones(2, 512).bfloat16(), [-1, 3])
    assert cache.view(torch.uint8)[0].flatten(1).any(1).nonzero().flatten().tolist() == [3]


def packed(call, chip="a5", **more):
    """One token at position 1 over two packed rows, of 1 and of 27, whose codes have steps of 2."""
    x = torch.ones(2, 512).bfloat16()
    x[1] = 27.0
    lengths = {"cu_seqlens_q": tensor([0, 1], dtype=torch.int32), "seqused_kv": tensor([2], dtype=torch.int32)}
    window = {"layout_q": "TND", "ori_win_left": 1, "kv_quant_mode": 1, "tile_size": 64, "rope_head_dim": 64}
    sizes = {"num_heads_q": 64, "num_heads_kv": 1, "head_dim": 512, "batch_size": 1, "max_seqlen_q": 1}
    made = {**lengths, **window, **sizes, "has_cmp_kv": False}
    metadata = call("_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata", chip=chip, **made)
    given = {"q": torch.zeros(1, 64, 512).bfloat16(), "ori_kv": stored(call, x, [0, 1]), "metadata": metadata}
    given |= {"ori_block_table": tensor([[0]], dtype=torch.int32), "sinks": torch.full((64,), -1e4)}
    return call("_C_ascend::npu_kv_quant_sparse_attn_sharedkv", chip=chip, **given, **lengths, **window | more)[0]


def test_packed_rows_lose_bits_in_their_codes_and_none_in_rope(call):
    out = packed(call)[0, 0]
    assert out[0].item() == (1 + 28) / 2  # 27 lies between 13 and 14 steps
    assert out[-1].item() == (1 + 27) / 2


def test_packed_rows_want_their_own_settings(call):
    with pytest.raises(RuntimeError, match="'tile_size': 128"):
        packed(call, tile_size=128)
