"""The twin has the functions of each release with their real signatures."""

import inspect

import pytest
import torch

from isolith_backends.cambricon.vendor.library import entries, functions, simulated
from isolith_backends.cambricon.vendor.profile import named

DEFINED = [row for row in entries() if row["form"] == "definition"]
CALLED = [row for row in entries() if row.get("profile") == "day0"]
WRITTEN = {"torch.half": "torch.float16", "torch.float": "torch.float32"}


@pytest.mark.parametrize("row", DEFINED, ids=[row["name"] for row in DEFINED])
def test_names_order_and_defaults_are_those_of_1_12_1(row):
    found = inspect.signature(functions(named("mlu590"))[row["name"]]).parameters.values()
    assert [(p.name, p.default is p.empty) for p in found] == [
        (r["name"], "default" not in r) for r in row["parameters"]
    ]


@pytest.mark.parametrize("row", DEFINED, ids=[row["name"] for row in DEFINED])
def test_default_values_are_those_of_1_12_1(row):
    found = inspect.signature(functions(named("mlu590"))[row["name"]]).parameters
    wanted = {r["name"]: r["default"].strip("'") for r in row["parameters"] if "default" in r}
    assert {name: str(found[name].default) for name in wanted} == {k: WRITTEN.get(v, v) for k, v in wanted.items()}


@pytest.mark.parametrize("row", CALLED, ids=[row["name"] for row in CALLED])
def test_day0_takes_what_its_stack_gives(row):
    found = list(inspect.signature(functions(named("mlu590-day0"))[row["name"]]).parameters.values())
    by_place = [p.name for p in found if p.kind is p.POSITIONAL_ONLY]
    assert ([p.name for p in found], len(by_place)) == ([r["name"] for r in row["parameters"]], row["positional"])


def test_day0_has_no_other_functions():
    assert set(functions(named("mlu590-day0"))) == {row["name"] for row in CALLED}


def test_1_12_1_has_all_functions():
    assert set(functions(named("mlu590"))) == {row["name"] for row in DEFINED}


def test_a_function_without_public_mathematics_says_so():
    with pytest.raises(NotImplementedError, match="moe_all2all_destroy: no public source"):
        functions(named("mlu590"))["moe_all2all_destroy"](handle=0)


def test_forty_functions_are_simulated():
    assert len(simulated()) == 40


def test_day0_renames_the_sink(day0, int32):
    q, cache = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    given = (q, cache, None, torch.empty_like(q), int32([[0]]), int32([1]), None, None, None, 1, -1, -1, 1.0, False)
    sink = {"q_quant_scale": None, "head_size_v": -1, "compute_dtype": torch.float32, "mask": None}
    out = day0.single_query_cached_kv_attn(*given, **sink, learnable_sink=torch.zeros(1))
    assert out.flatten().tolist() == [0.5] * 4


def test_a_name_that_day0_does_not_prove_is_no_keyword(day0, int32):
    with pytest.raises(TypeError):
        day0.moe_gen_idx(expert_id=int32([[0]]), expert_num=1)


def test_an_unknown_twin_is_an_error():
    with pytest.raises(ValueError, match="mlu370-day0"):
        named("mlu220")
