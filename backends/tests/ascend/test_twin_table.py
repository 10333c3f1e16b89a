"""What the twin offers is what is registered, with every argument and on the chips that have it."""

import inspect

import pytest
import torch

from isolith.errors import ConfigError
from isolith_backends.ascend.vendor import soc, table
from isolith_backends.ascend.vendor.rules import hf32

FUNCTIONS = {name: (function, families) for name, function, families in table.OFFERED}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_takes_the_arguments_of_its_schema(name, arguments_of):
    arguments = {argument.name: None for argument in arguments_of(name)}
    inspect.signature(FUNCTIONS[name][0]).bind(**arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_asks_for_nothing_that_its_schema_lacks(name, arguments_of):
    parameters = inspect.signature(FUNCTIONS[name][0]).parameters.values()
    needed = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.default is p.empty}
    assert needed <= {argument.name for argument in arguments_of(name)}


def test_operators_without_a_kernel_on_a_chip_are_not_offered():
    offered = {chip: {n for n, (_, families) in FUNCTIONS.items() if chip in families} for chip in ("310P", "A2", "A5")}
    assert "_C_ascend::npu_scatter_nd_update_v2" not in offered["A5"]
    assert "_C_ascend::npu_sparse_attn_sharedkv" not in offered["A5"]
    assert "npu::npu_mhc_post" not in offered["A2"]
    assert not any(name.startswith(("_C_ascend", "custom")) for name in offered["310P"])


def test_setting_chooses_chip_extensions_and_wheel():
    default, other = soc.chosen(""), soc.chosen("A2-wheel-2.8.0")
    assert (default.soc.name, default.namespaces, default.wheel) == ("A3", ("npu", "_C_ascend", "custom"), "2.13.0")
    assert (other.soc.name, other.namespaces, other.wheel) == ("A2", ("npu",), "2.8.0")


@pytest.mark.parametrize("setting", ["a4", "a3-sgl", "a3-vllm-recipes"])
def test_unknown_setting_lists_the_choices(setting):
    with pytest.raises(ConfigError) as caught:
        soc.chosen(setting)
    assert str(caught.value) == (
        "ISOLITH_TWIN must be one of 310p, a2, a3, a5, alone or with some of -vllm, -recipes, -wheel, -2.13.0, "
        f"-2.10.0.post4, -2.8.0 behind; got {setting!r}."
    )


def test_numbers_of_chips_are_those_of_their_families():
    numbers = {name: found.number for name, found in soc.FAMILIES.items()}
    assert numbers == {"310p": 202, "a2": 223, "a3": 250, "a5": 260}


def test_hf32_keeps_ten_bits_and_rounds_toward_zero():
    kept = 1 + 2.0**-10
    assert hf32(torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, kept + 2.0**-11])).tolist() == [1.0, -1.0, kept]
