"""The adapters of libraries that are not here, against stand-ins with their real signatures, judged as kernels are."""

import sys
from importlib.machinery import BuiltinImporter
from types import ModuleType

import pytest
import stand_ins
import torch
from stand_in_deep_gemm import deep_gemm as stand_in_deep_gemm

from isolith import Make
from isolith.select import refusal
from isolith_backends.cuda import libraries
from isolith_backends.cuda.libraries import (
    deep_gemm,
    deep_gemm_sm100,
    flash_mla,
    flashinfer,
    grouped_mm,
    tile_kernels,
)
from isolith_conformance.buffers import place_all
from isolith_conformance.judge import expect

PINNED = [
    flashinfer.indexer_topk_flashinfer,
    tile_kernels.moe_gate_tile_kernels,
    tile_kernels.act_quant_fp8_tile_kernels,
    tile_kernels.hc_post_tile_kernels,
    tile_kernels.sinkhorn_tile_kernels,
]
ON_SM100 = [
    deep_gemm_sm100.grouped_gemm_deep_gemm_sm100,
    deep_gemm_sm100.quant_linear_deep_gemm_sm100,
    deep_gemm_sm100.indexer_score_deep_gemm_sm100,
]
INSTALLED = [
    flash_mla.sparse_attn_flash_mla,
    flash_mla.sparse_attn_flash_mla_prefill,
    deep_gemm.grouped_gemm_deep_gemm,
    deep_gemm.quant_linear_deep_gemm,
    deep_gemm.indexer_score_deep_gemm,
    *ON_SM100,
    *PINNED,
]
KERNELS = [*INSTALLED, grouped_mm.grouped_gemm_torch]
STAND_INS = {
    "flash_mla": stand_ins.flash_mla(),
    "deep_gemm": stand_in_deep_gemm(9),
    "flashinfer": stand_ins.flashinfer(),
    **stand_ins.tile_kernels(),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch, request):
    """The stand-ins, found as installed libraries are, on the GPU that the kernel under test is for."""
    libraries.attempt.cache_clear()
    for name, stand_in in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("kernel") in ON_SM100:
        monkeypatch.setitem(sys.modules, "deep_gemm", stand_in_deep_gemm(10))
    yield
    libraries.attempt.cache_clear()


def taken(kernel):
    """(sample, arguments) of every sample that a kernel takes."""
    operator = kernel.operator
    dtype = torch.bfloat16 if torch.bfloat16 in operator.sample_dtypes else torch.float32
    for sample in operator.samples(Make(dtype, seed="libraries")):
        if not sample.tags & {"device", "slow", "invariants"}:
            arguments = operator.arguments(**sample.arguments)
            if refusal(kernel, arguments) is None:
                yield sample, arguments


def problem_of(kernel, sample, arguments, layout="as_is"):
    """What the judge says of a kernel's results."""
    results = kernel.fn(**place_all(arguments, layout=layout)[1])
    due = expect(kernel.operator, arguments, "exact" in sample.tags)
    return due.verdict_on(list(results) if isinstance(results, tuple) else [results]).problem


def elements(call):
    """How large a call's tensors are; one without anything in it shows least, and comes last."""
    sizes = [value.numel() for value in call[1].values() if isinstance(value, torch.Tensor)]
    return 0 in sizes, sum(sizes)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_an_adapter_is_right_on_the_smallest_sample_that_it_takes(kernel):
    assert problem_of(kernel, *min(taken(kernel), key=elements)) is None


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_an_adapter_is_right_on_every_sample_that_it_takes(kernel):
    assert {sample.name: said for sample, given in taken(kernel) if (said := problem_of(kernel, sample, given))} == {}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "offset"])
@pytest.mark.parametrize("kernel", PINNED, ids=lambda kernel: kernel.name)
def test_an_adapter_makes_of_any_layout_what_its_library_takes(kernel, layout):
    calls = list(taken(kernel))
    assert {sample.name: said for sample, given in calls if (said := problem_of(kernel, sample, given, layout))} == {}


@pytest.mark.parametrize("kernel", INSTALLED, ids=lambda kernel: kernel.name)
def test_an_adapter_is_unavailable_where_its_library_is_not_installed(monkeypatch, kernel):
    assert kernel.requires.missing() is None
    libraries.attempt.cache_clear()
    for name in STAND_INS:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # nothing that is installed is found
    assert kernel.requires.missing().endswith(" is not installed")


def test_an_older_call_of_the_same_name_is_refused(monkeypatch):
    def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, indices=None, attn_sink=None):
        raise AssertionError("it must not be called")

    monkeypatch.setitem(sys.modules, "flash_mla", stand_ins.module("flash_mla", flash_mla_with_kvcache))
    said = flash_mla.sparse_attn_flash_mla.requires.missing()
    assert said == "flash_mla.flash_mla_with_kvcache does not take extra_k_cache, topk_length"


def test_a_group_without_a_bias_is_refused():
    call = {"logits": torch.zeros(2, 32), "k": 4, "groups": 8, "topk_groups": 2}
    gate = tile_kernels.moe_gate_tile_kernels
    assert refusal(gate, gate.operator.arguments(**call)) == (
        "groups=8 without a bias; it counts a group by its two best, not by its best alone"
    )


def test_a_library_that_fails_to_load_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("raise AssertionError('CUDA_HOME is not set')")
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries.lacks("broken_library", "run") == (
        "importing broken_library failed: AssertionError: CUDA_HOME is not set"
    )


def test_a_library_without_the_function_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "empty_library", ModuleType("empty_library"))
    assert libraries.lacks("empty_library", "run") == "empty_library has no run"


def test_a_row_belongs_to_the_expert_whose_segment_it_lies_in():
    found = deep_gemm.expert_of_rows(torch.tensor([3, 0, 4]), 12, 4)
    assert found.tolist() == [0, 0, 0, -1, 2, 2, 2, 2, -1, -1, -1, -1]
