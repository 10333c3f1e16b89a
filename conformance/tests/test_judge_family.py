"""The legal family: orders of sums, codes beside a boundary, inputs off by a rounding."""

import torch

import isolith
from isolith import OPERATORS, Make
from isolith_conformance.family import Numerics, evaluate, family_of
from isolith_conformance.judge import judge
from isolith_conformance.limits import CODE_LEAN, ratios_of


def cast(values, lean=0.0):
    with Numerics(lean=lean):
        return values.to(torch.float8_e4m3fn).float().tolist()


BESIDE = torch.tensor([19.0, 19.0 - 2.0**-16, 19.0 + 2.0**-16, 18.9, -19.0 + 2.0**-16])


def test_what_is_beside_a_boundary_goes_up_where_it_leans_up():
    assert cast(BESIDE, CODE_LEAN) == [20.0, 20.0, 20.0, 18.0, -18.0]


def test_what_is_beside_a_boundary_goes_down_where_it_leans_down():
    assert cast(BESIDE, -CODE_LEAN) == [20.0, 18.0, 18.0, 18.0, -20.0]


def test_without_a_lean_a_cast_is_torchs_own():
    assert cast(BESIDE) == BESIDE.to(torch.float8_e4m3fn).float().tolist()


def in_order(way, values):
    with Numerics(in_order=way):
        return values.sum(0).item()


def test_a_sum_is_taken_in_either_order():
    values = torch.tensor([2.0**24, 1.0, 1.0])
    assert (in_order("forward", values), in_order("backward", values)) == (2.0**24, 2.0**24 + 2)


def test_a_product_is_summed_column_by_column():
    a, b = torch.tensor([[2.0**24, 1.0, 1.0]]), torch.ones(3, 1)
    with Numerics(in_order="forward"):
        assert (a @ b).item() == 2.0**24


def test_an_einsum_is_summed_over_its_index_in_order():
    a, b = torch.tensor([[2.0**24, 1.0, 1.0]]), torch.ones(3, 1)
    with Numerics(in_order="forward"):
        assert torch.einsum("ik,kj->ij", a, b).item() == 2.0**24


def layer(seed):
    made = OPERATORS["fused_moe"].samples(Make(torch.bfloat16, seed=seed))
    return OPERATORS["fused_moe"].arguments(**next(each for each in made if each.name == "e4m3").arguments)


def test_a_layer_in_bfloat16_changes_codes_on_the_way():
    assert family_of(OPERATORS["fused_moe"], layer("codes")).requantised


def test_an_operator_without_codes_has_none_to_change():
    call = isolith.rms_norm.arguments(torch.randn(4, 64), torch.ones(64))
    assert not family_of(OPERATORS["rms_norm"], call).requantised


def test_changed_codes_widen_the_rows_and_elements_but_not_the_tensor():
    plain, changed = (ratios_of("standard", torch.bfloat16, each) for each in (False, True))
    assert (changed.r1, changed.r2, changed.r3) == (plain.r1, 2.5, 4.0)


def test_no_backend_is_imported_for_a_reference():
    call = layer("parts")
    result = evaluate(OPERATORS["fused_moe"], OPERATORS["fused_moe"].reference, call)
    assert judge(OPERATORS["fused_moe"], call, result).problem is None
