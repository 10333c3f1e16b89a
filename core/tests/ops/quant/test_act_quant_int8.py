"""Facts of act_quant_int8 that no sample states."""

import torch

from isolith import Make
from isolith.ops.quant.act_quant_int8 import act_quant_int8


def test_codes_are_the_golden_ones():
    q, scale = act_quant_int8(torch.tensor([-2.0, 1.0, 0.0, 5 / 254]))
    assert (q.tolist(), scale.tolist()) == ([-127, 64, 0, 1], [(torch.tensor(2.0) / 127).item()])


def test_halves_go_to_the_even_code():
    q, _ = act_quant_int8(torch.tensor([254.0, 1.0, 3.0, -5.0, -7.0]))  # scale 2
    assert q.tolist() == [127, 0, 2, -2, -4]


def test_zero_row_has_code_zero_and_the_scale_of_the_floor():
    q, scale = act_quant_int8(torch.zeros(1, 3))
    assert (q.tolist(), scale.item()) == ([[0, 0, 0]], (torch.tensor(1e-10) / 127).item())


def test_extremes_are_127_of_both_signs():
    q, _ = act_quant_int8(Make(seed=1).normal(4096, 16))
    assert (q.min().item(), q.max().item(), q.abs().amax(-1).unique().tolist()) == (-127, 127, [127])


def test_smooth_multiplies():
    x, smooth = Make(seed=2).normal(8, 64), Make(seed=3).uniform(64, low=0.1, high=4.0)
    assert torch.equal(act_quant_int8(x, smooth)[0], act_quant_int8(x * smooth)[0])


def test_rows_do_not_share_a_scale():
    x = Make(seed=4).normal(8, 64)
    assert torch.equal(act_quant_int8(x)[0][3:4], act_quant_int8(x[3:4])[0])


def test_codes_are_equal_for_float32_and_float64():
    x, smooth = Make(seed=5).normal(16, 300), Make(seed=6).uniform(300)
    single, double = act_quant_int8(x, smooth), act_quant_int8(x.double(), smooth.double())
    assert torch.equal(single[0], double[0])


def test_scales_are_float32_for_float64():
    assert act_quant_int8(torch.ones(1, 3, dtype=torch.float64))[1].dtype == torch.float32


def test_quantising_twice_changes_no_code():
    q, scale = act_quant_int8(Make(seed=7).normal(64, 128))
    assert torch.equal(act_quant_int8(q.float() * scale)[0], q)


def test_error_is_at_most_half_a_scale():
    x = Make(seed=8).normal(64, 128)
    q, scale = act_quant_int8(x)
    assert bool(((q.double() * scale.double() - x.double()).abs() <= 0.5000001 * scale.double()).all())


def test_nan_stays_in_its_row():
    x = Make(seed=9).normal(3, 16)
    clean = act_quant_int8(x)[0]
    x[1, 4] = torch.nan
    assert torch.equal(act_quant_int8(x)[0][::2], clean[::2])


def test_floor_raises_the_scale():
    assert act_quant_int8(torch.full((1, 3), 0.25), amax_floor=127.0)[1].item() == 1.0


def test_negative_smooth_turns_the_sign():
    q, _ = act_quant_int8(torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 0.5]))
    assert q.tolist() == [-127, -42]


def test_smoothed_values_are_not_rounded_to_the_dtype_of_x():
    x, smooth = torch.tensor([1.0, 1.0], dtype=torch.bfloat16), torch.tensor([1 + 2.0**-10, 0.5])
    assert act_quant_int8(x, smooth)[1].item() == ((1 + 2.0**-10) / torch.tensor(127.0)).item()


def test_row_without_columns_has_the_scale_of_the_floor():
    q, scale = act_quant_int8(torch.ones(2, 0))
    assert (q.shape, scale.tolist()) == ((2, 0), [[(torch.tensor(1e-10) / 127).item()]] * 2)
