"""Facts of head_rms_norm that no sample states."""

import torch

import isolith
from isolith import Make
from isolith.ops.norm.head_rms_norm import head_rms_norm


def test_worked_head_is_divided_by_its_root_mean_square():
    # mean(3^2 + 4^2) = 12.5, and eps stands inside the root.
    y = head_rms_norm(torch.tensor([[[3.0, 4.0]]], dtype=torch.float64), eps=3.5)
    torch.testing.assert_close(y, torch.tensor([[[0.75, 1.0]]], dtype=torch.float64))


def test_equals_rms_norm_with_a_weight_of_ones():
    x = Make(torch.bfloat16, seed=1).normal(5, 3, 64)
    assert torch.equal(head_rms_norm(x), isolith.rms_norm(x, torch.ones(64)))


def test_one_rounding_differs_from_a_rounded_factor():
    x = Make(torch.bfloat16, seed=2).normal(5, 3, 64)
    factor = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(head_rms_norm(x), (x.float() * factor).bfloat16())
    assert not torch.equal(head_rms_norm(x), x * factor.bfloat16())


def test_head_does_not_depend_on_other_heads():
    x = Make(seed=3).normal(4, 3, 64)
    alone = head_rms_norm(x[:, 1:2].clone())
    x[:, 0], x[:, 2] = float("nan"), 1e20
    assert torch.equal(head_rms_norm(x)[:, 1:2], alone)


def test_scale_of_a_head_does_not_matter_where_eps_is_small():
    x = Make(torch.float64, seed=4).normal(4, 3, 64)
    torch.testing.assert_close(head_rms_norm(x * 8, eps=1e-30), head_rms_norm(x, eps=1e-30), rtol=1e-14, atol=0)


def test_output_is_contiguous_for_heads_that_are_not():
    x = Make(seed=5).normal(3, 4, 64).transpose(0, 1)
    assert head_rms_norm(x).is_contiguous()
