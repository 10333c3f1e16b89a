"""Facts of rms_norm that no sample states."""

import torch

from isolith import Make
from isolith.ops.norm.rms_norm import rms_norm

DOUBLE = torch.float64


def test_worked_row_is_divided_by_its_root_mean_square():
    # mean(3^2 + 4^2) = 12.5, and eps stands inside the root.
    y = rms_norm(torch.tensor([[3.0, 4.0]], dtype=DOUBLE), torch.tensor([2.0, -1.0], dtype=DOUBLE), eps=3.5)
    torch.testing.assert_close(y, torch.tensor([[1.5, -1.0]], dtype=DOUBLE))


def test_product_with_the_weight_is_rounded_once():
    make = Make(torch.bfloat16, seed=1)
    x, weight = make.normal(5, 64), make.normal(64)
    assert torch.equal(rms_norm(x, weight), rms_norm(x.float(), weight.float()).bfloat16())


def test_rounding_before_the_weight_rounds_twice():
    make = Make(torch.bfloat16, seed=2)
    x, weight = make.normal(5, 64), make.normal(64)
    normed = rms_norm(x, torch.ones(64)).float()
    assert torch.equal(rms_norm(x, weight, round_before_weight=True), (normed * weight.float()).bfloat16())


def test_orders_of_rounding_differ_in_bfloat16():
    make = Make(torch.bfloat16, seed=3)
    x, weight = make.normal(5, 64), make.normal(64)
    assert not torch.equal(rms_norm(x, weight), rms_norm(x, weight, round_before_weight=True))


def test_orders_of_rounding_are_equal_in_float32():
    make = Make(seed=4)
    x, weight = make.normal(5, 64), make.normal(64)
    assert torch.equal(rms_norm(x, weight), rms_norm(x, weight, round_before_weight=True))


def test_weight_is_not_rounded_to_the_dtype_of_x():
    # Normalised to 4/5. bfloat16 would round this weight to 159/128, and the result to 254/256.
    y = rms_norm(torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([1.25 * 255 / 256]), eps=9 / 16)
    assert y.item() == 255 / 256


def test_result_has_the_dtype_of_x():
    assert rms_norm(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.bfloat16


def test_row_does_not_depend_on_other_rows():
    make = Make(seed=5)
    x, weight = make.normal(3, 64), make.normal(64)
    alone = rms_norm(x[[0, 2]], weight)
    x[1, 5] = float("nan")
    assert torch.equal(rms_norm(x, weight)[[0, 2]], alone)


def test_eps_of_v41_leaves_small_rows_their_size():
    x = torch.full((1, 4), 2.0**-20)
    assert rms_norm(x, torch.ones(4), eps=1e-20).tolist() == [[1.0] * 4]
