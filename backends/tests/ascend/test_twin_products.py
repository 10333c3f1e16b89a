"""Gated units, products by group, quantisation and cache writes as the vendor documents them, by hand."""

import math

import pytest
import torch
from torch import tensor

SILU = 1 / (1 + math.exp(-1.0))


def test_swiglu_activates_the_first_half(call):
    assert call("npu::npu_swiglu", input=tensor([[1.0, 3.0]])).item() == pytest.approx(3 * SILU)


def test_clipped_swiglu_by_default_is_another_function(call):
    x = tensor([[1.0, 3.0, 20.0, 20.0]])
    given = {"alpha": 1.0, "limit": 2.0, "bias": 0.0, "interleaved": False}
    halves = call("npu::npu_clipped_swiglu", x=x, **given)[0].tolist()
    assert halves == pytest.approx([2 * SILU, 2 * 2 / (1 + math.exp(-2.0))])
    default = call("npu::npu_clipped_swiglu", x=x)[0, 0].item()
    assert default == pytest.approx(4 / (1 + math.exp(-1.702)))


def test_clipped_swiglu_leaves_rows_behind_the_counts(call):
    out = call("npu::npu_clipped_swiglu", x=torch.ones(3, 2), group_index=tensor([1, 1]))
    assert out.isnan().flatten().tolist() == [False, False, True]


SWIGLU = {"x": tensor([[1, 2, 3, 4]], dtype=torch.int32), "quant_mode": 1, "clamp_limit": 100.0}
ONES = {"weight_scale": torch.ones(1, 4), "activation_scale": torch.ones(1, 1), "glu_alpha": 1.0, "glu_bias": 0.0}


def scale_of(call, name, **given):
    return call(name, **SWIGLU | ONES | given)[1].item() * 127


def unit(gate, up):
    return gate / (1 + math.exp(-gate)) * up


def test_mode_1_means_even_and_odd_in_torch_npu_and_halves_elsewhere(call):
    odd = max(unit(1, 2), unit(3, 4))
    halves = max(unit(1, 3), unit(2, 4))
    assert scale_of(call, "npu::npu_dequant_swiglu_quant", swiglu_mode=1) == pytest.approx(odd)
    left = {"swiglu_mode": 1, "activate_left": True}
    assert scale_of(call, "_C_ascend::npu_dequant_swiglu_quant", **left) == pytest.approx(halves)
    assert scale_of(call, "custom::npu_dequant_swiglu_clamp_quant", **left) == pytest.approx(halves)
    both = {"swiglu_mode": 2, "activate_left": True}
    assert scale_of(call, "npu::npu_dequant_swiglu_quant", **both) == pytest.approx(halves)


def test_the_second_half_is_activated_unless_told(call):
    assert scale_of(call, "npu::npu_dequant_swiglu_quant") == pytest.approx(max(unit(3, 1), unit(4, 2)))


def test_extension_knows_no_mode_2(call):
    with pytest.raises(RuntimeError, match="swiglu_mode is 2"):
        scale_of(call, "_C_ascend::npu_dequant_swiglu_quant", swiglu_mode=2)


def test_groups_are_counts_and_rows_behind_them_undefined(call):
    given = {"x": torch.ones(3, 2, dtype=torch.int32), "group_index": tensor([1, 1]), "quant_mode": 1}
    scales = {"weight_scale": tensor([[1.0, 1.0], [2.0, 1.0]]), "activation_scale": torch.ones(3, 1)}
    _, scale = call("_C_ascend::npu_dequant_swiglu_quant", **given, **scales)
    assert (scale * 127)[:2].tolist() == pytest.approx([unit(1, 1), unit(2, 1)])
    assert scale[2].isnan()


def grouped(call, x=None, weight=None, **given):
    x = torch.eye(3).bfloat16() if x is None else x
    weight = torch.arange(12.0).view(2, 3, 2).bfloat16() if weight is None else weight
    (out,) = call("npu::npu_grouped_matmul", x=[x], weight=[weight], **{"split_item": 2, "group_type": 0} | given)
    return out


def test_group_list_is_cumulated_unless_told(call):
    assert grouped(call, group_list=tensor([1, 3])).tolist() == [[0.0, 1.0], [8.0, 9.0], [10.0, 11.0]]
    assert torch.equal(
        grouped(call, group_list=tensor([1, 3])), grouped(call, group_list=tensor([1, 2]), group_list_type=1)
    )


def test_counts_taken_for_a_cumulated_list_lose_rows_in_silence(call):
    assert grouped(call, group_list=tensor([2, 1])).isnan().any(1).tolist() == [False, False, True]


def test_rows_behind_the_groups_are_not_written(call):
    assert grouped(call, group_list=tensor([1, 2])).isnan().any(1).tolist() == [False, False, True]


def test_counts_of_one_expert_are_refused(call):
    weight = torch.ones(1, 3, 2).bfloat16()
    with pytest.raises(RuntimeError, match="length 1"):
        grouped(call, weight=weight, group_list=tensor([3]), group_list_type=1)
    assert grouped(call, weight=weight, group_list=tensor([3])).shape == (3, 2)


def test_transposed_view_is_a_weight_and_a_slice_is_not(call):
    whole = torch.ones(2, 2, 3).bfloat16()
    assert grouped(call, weight=whole.transpose(1, 2), group_list=tensor([1, 3])).tolist() == [[1.0, 1.0]] * 3
    with pytest.raises(RuntimeError, match="neither contiguous"):
        grouped(call, weight=torch.ones(2, 3, 4).bfloat16()[:, :, ::2], group_list=tensor([1, 3]))


INT8 = {"x": torch.ones(2, 3, dtype=torch.int8), "weight": torch.ones(2, 3, 2, dtype=torch.int8)}


def test_int8_products_are_scaled_by_column_and_by_token(call):
    scale, token = tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([1.0, 10.0])
    given = {"per_token_scale": [token], "group_list": tensor([1, 2])}
    for chip, scales, output in (("a3", scale, 5), ("a3", scale.bfloat16(), 15), ("a5", scale, 15)):
        out = grouped(call, chip=chip, **INT8, **given, scale=[scales], output_dtype=output)
        assert out.tolist() == [[3.0, 6.0], [90.0, 120.0]]


def test_bfloat16_takes_scales_of_bfloat16_before_a5(call):
    given = {"scale": [torch.ones(2, 2)], "per_token_scale": [torch.ones(2)], "group_list": tensor([1, 2])}
    with pytest.raises(RuntimeError, match="output_dtype is 15 for a scale of"):
        grouped(call, **INT8, **given, output_dtype=15)


def test_int8_products_without_scale_stay_int32(call):
    assert grouped(call, **INT8, group_list=tensor([1, 2]), output_dtype=3).dtype == torch.int32
    with pytest.raises(RuntimeError, match="output_dtype is None"):
        grouped(call, **INT8, group_list=tensor([1, 2]))


def test_310p_has_no_bfloat16_experts(call):
    with pytest.raises(RuntimeError, match="x is torch"):
        grouped(call, chip="310p", group_list=tensor([1, 3]))


def test_fused_gated_product_wants_a_cumulated_list(call):
    given = {"x_scale": torch.ones(2), "weight_scale": torch.ones(2, 2), "group_list": tensor([1, 2])}
    codes, scale, _ = call("_C_ascend::grouped_matmul_swiglu_quant", **INT8, **given)
    assert codes.tolist() == [[127], [127]]
    assert (scale * 127).tolist() == pytest.approx([unit(3, 3)] * 2)


def test_dynamic_quant_divides_by_127_and_leaves_a_zero_row_undefined(call):
    codes, scale = call("npu::npu_dynamic_quant", input=tensor([[254.0, -3.0], [0.0, 0.0]]).bfloat16())
    assert codes.tolist() == [[127, -2], [-128, -128]]  # -1.5 to even
    assert scale.tolist() == [2.0, 0.0]


def test_groups_of_smooth_scales_are_cumulated(call):
    given = {
        "smooth_scales": tensor([[1.0, 1.0], [2.0, 1.0]]).bfloat16(),
        "group_index": tensor([1, 2], dtype=torch.int32),
    }
    scale = call("npu::npu_dynamic_quant", input=torch.ones(2, 2).bfloat16(), **given)[1]
    assert (scale * 127).tolist() == pytest.approx([1.0, 2.0])
    counts = given | {"group_index": tensor([1, 1], dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="group_index"):
        call("npu::npu_dynamic_quant", input=torch.ones(2, 2).bfloat16(), **counts)


@pytest.mark.parametrize("wrong", [torch.ones(2, 2), torch.ones(2).bfloat16()], ids=["float32", "one axis"])
def test_dynamic_quant_refuses(call, wrong):
    with pytest.raises(RuntimeError, match="x is"):
        call("npu::npu_dynamic_quant", input=wrong)


def test_quant_matmul(call):
    given = {"x1": torch.ones(1, 3, dtype=torch.int8), "x2": torch.ones(2, 3, dtype=torch.int8).T}
    scales = {"scale": tensor([1.0, 2.0]), "pertoken_scale": tensor([10.0])}
    assert call("npu::npu_quant_matmul", **given, **scales, output_dtype=15).tolist() == [[30.0, 60.0]]


PERMS = {"perm_x1": [1, 0, 2], "perm_x2": [0, 1, 2], "perm_y": [1, 0, 2]}


def test_transpose_batchmatmul_permutes_three_times(call):
    x, w = torch.randn(2, 3, 16).bfloat16(), torch.randn(3, 16, 32).bfloat16()
    out = call("npu::npu_transpose_batchmatmul", input=x, weight=w, **PERMS)
    assert torch.equal(out, torch.einsum("tgk,gkn->tgn", x.float(), w.float()).bfloat16())


@pytest.mark.parametrize(
    ("groups", "inner", "outputs", "changes"),
    [(2, 24, 16, {}), (2, 16, 24, {}), (16, 4096, 16, {}), (2, 16, 16, {"perm_y": [0, 1, 2]})],
    ids=["K", "N", "K_times_B", "batch_first"],
)
def test_transpose_batchmatmul_refuses_sizes_and_orders(call, groups, inner, outputs, changes):
    given = {"input": torch.zeros(1, groups, inner), "weight": torch.zeros(groups, inner, outputs)}
    with pytest.raises(RuntimeError, match="npu_transpose_batchmatmul"):
        call("npu::npu_transpose_batchmatmul", **given, **PERMS | changes)


def test_wide_rows_may_come_with_the_batch_first(call):
    given = {"input": torch.ones(16, 1, 4096), "weight": torch.ones(16, 4096, 16)}
    out = call("npu::npu_transpose_batchmatmul", **given, **PERMS | {"perm_x1": [0, 1, 2]})
    assert (out.shape, out.unique().tolist()) == ((1, 16, 16), [4096.0])


def test_16cast32_does_not_round_the_product(call):
    x = torch.full((1, 3), 1 + 2.0**-7).bfloat16()
    assert call("npu::npu_fused_matmul", x1=x, x2=x.T, fused_op_type="16cast32").item() == 3 * (1 + 2.0**-7) ** 2


def test_pairs_are_flattened_before_they_are_looked_at(call):
    var = torch.zeros(4, 2, 1, 2)
    pairs = tensor([[0, 1], [-1, 1], [-1, -1], [3, -1], [4, 0]], dtype=torch.int32)
    update = torch.arange(1.0, 6.0).view(5, 1, 1).expand(5, 1, 2)
    assert call("_C_ascend::npu_scatter_nd_update_v2", var=var, indices=pairs, update=update) is None
    assert var[..., 0, 0].tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]


def test_flat_slots_skip_what_is_negative(call):
    var = torch.zeros(4, 1)
    indices, update = tensor([[2], [-1]]), tensor([[5.0], [6.0]])
    call("custom::scatter_nd_update_asc", var=var, indices=indices, update=update)
    assert var.flatten().tolist() == [0.0, 0.0, 5.0, 0.0]


def test_the_two_scatters_have_different_formats(call):
    with pytest.raises(RuntimeError, match="var must be 2-D"):
        call("custom::scatter_nd_update_asc", var=torch.zeros(2, 2, 1), indices=tensor([[0]]), update=torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="indices has shape"):
        call(
            "_C_ascend::npu_scatter_nd_update_v2",
            var=torch.zeros(2, 2, 1),
            indices=tensor([[0]]),
            update=torch.zeros(1, 1),
        )
