"""Which kernel each operator gets on which chip, where everything is registered, and why it does not get the others."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from isolith import OPERATORS
from isolith_backends import ascend

NUMBERS = {"310P": "202", "A2": "223", "A3": "250", "A5": "260"}

# What is chosen over an operator's samples, in order of preference; the operators' documents and the list of what is
# built for which chip (vllm-ascend 182b75ea csrc/build_aclnn.sh) say so.
ON_EVERY_SERVER = {
    "head_rms_norm": ["ascend.head_rms_norm"],
    "rms_norm": ["ascend.rms_norm"],
    "hc_head": ["reference"],
    "hc_post": ["ascend.hc_post", "reference"],
    "hc_pre": ["ascend.hc_pre", "reference"],
    "sinkhorn": ["reference"],
    "hadamard": ["ascend.hadamard"],
    "rope": ["ascend.rope", "ascend.rope_of_slice"],
    "fused_moe": ["ascend.fused_moe", "composition"],
    "grouped_gemm": ["ascend.grouped_gemm", "reference"],
    "moe_gate": ["ascend.moe_gate", "ascend.moe_gate_of_any_score", "reference"],
    "moe_hash_gate": ["ascend.moe_hash_gate"],
    "moe_permute": ["ascend.moe_permute", "reference"],
    "moe_unpermute": ["ascend.moe_unpermute"],
    "swiglu": ["ascend.swiglu"],
    "compress_indices": ["reference"],
    "grouped_output_proj": ["ascend.grouped_output_proj", "reference"],
    "hybrid_attention": ["ascend.hybrid_attention", "composition"],
    "indexer_score": ["reference"],
    "indexer_topk": ["reference"],
    "kv_cache_read": ["reference"],
    "kv_cache_write": ["ascend.kv_cache_write", "reference"],
    "kv_compress": ["ascend.kv_compress", "ascend.kv_compress_of_float32_norm", "reference"],
    "lightning_indexer": ["ascend.lightning_indexer", "composition"],
    "mla_attention": ["ascend.mla_attention", "reference"],
    "sparse_attn": ["reference"],
    "window_indices": ["reference"],
    "act_quant_fp4": ["reference"],
    "act_quant_fp8": ["reference"],
    "act_quant_int8": ["ascend.act_quant_int8", "reference"],
    "block_dequant": ["reference"],
    "quant_linear": ["ascend.quant_linear", "reference"],
}
A5 = {
    "grouped_gemm": ["ascend.grouped_gemm", "ascend.grouped_gemm_of_e4m3", "ascend.grouped_gemm_in_tiles", "reference"],
    "hybrid_attention": ["composition"],
    "kv_cache_write": ["ascend.kv_cache_write_by_slot", "reference"],
    "kv_compress": ["ascend.kv_compress_of_float32_norm", "reference"],
    "act_quant_fp8": ["ascend.act_quant_fp8", "ascend.act_quant_fp8_in_float32", "reference"],
    "quant_linear": ["ascend.quant_linear", "ascend.quant_linear_of_e4m3", "reference"],
}
COMPOSED = ("fused_moe", "hybrid_attention", "lightning_indexer")
SMALL = {operator: ["composition" if operator in COMPOSED else "reference"] for operator in ON_EVERY_SERVER}
CHOSEN = {"310P": SMALL, "A2": ON_EVERY_SERVER, "A3": ON_EVERY_SERVER, "A5": ON_EVERY_SERVER | A5}

NEWEST = (
    "act_quant_fp8",
    "act_quant_fp8_in_float32",
    "quant_linear_of_e4m3",
    "grouped_gemm_of_e4m3",
    "grouped_gemm_in_tiles",
)
OLDER = ("hybrid_attention", "kv_cache_write", "kv_compress")
REFUSED = {
    "A2": dict.fromkeys(NEWEST, "arch=2; needs >=5"),
    "A3": dict.fromkeys(NEWEST, "arch=3; needs >=5"),
    "A5": dict.fromkeys(OLDER, "arch=5; needs >=2,<5"),
}


@functools.cache
def sweep():
    """What selection.py says of every number."""
    program = str(Path(__file__).parent / "selection.py")
    done = subprocess.run([sys.executable, program, *NUMBERS.values()], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def refused(chip):
    """The kernels that are not for a chip, with the reasons."""
    return {kernel: why for _, reasons in sweep()[NUMBERS[chip]].values() for kernel, why in reasons.items()}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("chip", NUMBERS)
def test_operator_gets_the_kernels_of_its_chip(chip, operator):
    assert sweep()[NUMBERS[chip]][operator][0] == CHOSEN[chip][operator]


@pytest.mark.parametrize("chip", REFUSED)
def test_kernel_that_is_not_for_a_chip_says_so(chip):
    assert refused(chip) == REFUSED[chip]


def test_310p_refuses_every_kernel_by_its_number():
    assert set(refused("310P").values()) == {f"arch=1; needs {wanted}" for wanted in (">=2", ">=2,<5", ">=5")}


COMPOSED_HERE = ("hadamard", "moe_permute", "fused_moe", "hybrid_attention", "mla_attention", "grouped_output_proj")


@pytest.mark.parametrize(
    ("chip", "says"),
    [
        (
            "A3",
            "Of {all} operators, {calls} have a call on A2 and A3, {composed} are composed and {none} not available",
        ),
        ("A5", "on A5 {calls}, {composed} and {none}"),
    ],
)
def test_readme_counts_the_operators(chip, says):
    adapted = [name for name, chosen in CHOSEN[chip].items() if chosen[0].startswith("ascend.")]
    composed = [name for name in adapted if name in COMPOSED_HERE]
    counts = {"all": len(OPERATORS), "calls": len(adapted) - len(composed), "composed": len(composed)}
    text = " ".join((Path(ascend.__file__).parent / "README.md").read_text().split())
    assert says.format(**counts, none=len(OPERATORS) - len(adapted)) in text
