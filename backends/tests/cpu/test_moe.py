"""The host's mixture-of-experts kernels against their operators."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from isolith import Make, ops
from isolith_backends.cpu import moe
from isolith_conformance.judge import judge

KERNELS = {
    "moe_permute": (ops.moe.moe_permute, moe.moe_permute),
    "grouped_gemm": (ops.moe.grouped_gemm, moe.grouped_gemm),
    "fused_moe": (ops.moe.fused_moe, moe.fused_moe),
}
IN_TURN = (torch.float32, torch.bfloat16)
"""CI takes each sample in one of these; the slow sweep takes all in all."""
CASES = [
    pytest.param(
        *(name, sample.name, dtype),
        id=f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}",
        marks=[] if dtype == IN_TURN[place % 2] else [pytest.mark.slow],
    )
    for name, (operator, _) in KERNELS.items()
    for dtype in operator.sample_dtypes
    for place, sample in enumerate(operator.samples(Make(dtype, seed=name)))
    if not sample.tags & {"slow", "model", "invariants"}
]


def arguments_of(name, label, dtype):
    operator = KERNELS[name][0]
    made = operator.samples(Make(dtype, seed=name))
    return operator.arguments(**next(sample for sample in made if sample.name == label).arguments)


@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_kernel_errs_no_more_than_legal_variants_do(name, label, dtype):
    operator, kernel = KERNELS[name]
    arguments = arguments_of(name, label, dtype)
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    results = [leaf for leaf in tree_flatten(kernel.fn(**given))[0] if isinstance(leaf, Tensor)]
    verdict = judge(operator, arguments, results)
    assert verdict.problem is None


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_takes_every_sample_in_its_dtypes(name):
    operator, kernel = KERNELS[name]
    for sample in operator.samples(Make(torch.bfloat16, seed=name)):
        arguments = operator.arguments(**sample.arguments)
        assert kernel.requires.why_not(arguments) is None, sample.name
        assert kernel.why_not is None or kernel.why_not(**arguments) is None, sample.name


def test_float64_is_left_to_the_reference():
    arguments = ops.moe.fused_moe.arguments(**next(ops.moe.fused_moe.samples(Make(torch.float64))).arguments)
    assert moe.fused_moe.requires.why_not(arguments) == "x is float64; takes bfloat16, float16, float32"


@pytest.fixture
def multiplied(monkeypatch):
    """The weights that reach a product, as (address, bytes)."""
    seen = []
    product = moe.linear

    def spy(rows, weight, out):
        seen.append((weight.data_ptr(), weight.nbytes))
        product(rows, weight, out)

    monkeypatch.setattr(moe, "linear", spy)
    return seen


def test_weights_of_idle_experts_are_neither_read_nor_copied(multiplied):
    make = Make(torch.float32, seed="idle")
    w13, w2 = make.normal(64, 16, 8), make.normal(64, 8, 8)
    moe.fused_moe.fn(make.normal(1, 8), make.tensor([[3, 60]], torch.int32), make.normal(1, 2), w13, w2)
    assert [at for at, _ in multiplied] == [each.data_ptr() for each in (w13[3], w13[60], w2[3], w2[60])]


def test_quantised_weight_is_dequantised_a_piece_at_a_time(multiplied):
    make = Make(torch.float32, seed="pieces")
    weight = make.integers(-128, 128, 2048, 4096, dtype=torch.int8)
    moe.product(make.normal(1, 4096), weight, make.full(1.0, 2048, 1), 128, 128)
    assert max(size for _, size in multiplied) == moe.PIECE
