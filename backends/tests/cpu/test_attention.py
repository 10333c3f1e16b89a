"""The host's attention kernels of torch's operations against the references: every sample, in one piece and in many."""

from functools import cache

import pytest
import torch

import isolith
from isolith import Kernel, Make
from isolith.numerics import pages
from isolith.numerics.pages import FORMATS
from isolith.ops import OPERATORS
from isolith_backends.cpu import attention, entries, scores
from isolith_conformance.judge import expect

KERNELS = {kernel.operator.name: kernel for kernel in vars(attention).values() if isinstance(kernel, Kernel)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def large(sample):
    """Whether gold takes seconds; one of these is left to CI."""
    return sample.name != "flash_decode" and ("model" in sample.tags or sample.name == "tokens_66000")


def cases(*names):
    return [
        pytest.param(
            *(name, sample.name, dtype),
            id=f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if dtype == torch.float16 or large(sample) else [],
        )
        for name in names
        for dtype in DTYPES
        for sample in OPERATORS[name].samples(Make(dtype, seed=name))
        if not sample.tags & {"device", "invariants"} and runs(name, sample)
    ]


@cache
def due(name, label, dtype):
    """What is due for a call, once for the kernel in one piece and in many."""
    return expect(OPERATORS[name], call_of(name, label, dtype))


def runs(name, sample):
    """Whether the kernel can take the call: small ones it refuses for speed alone, empty ones it cannot."""
    call = OPERATORS[name].arguments(**sample.arguments)
    if not all(value.numel() for value in call.values() if isinstance(value, torch.Tensor)):
        return False
    why = KERNELS[name].why_not(**call)
    return call.get("max_entries") != 0 and (why is None or "no longer" in why)


def call_of(name, label, dtype):
    made = OPERATORS[name].samples(Make(dtype, seed=name))
    return OPERATORS[name].arguments(**next(sample for sample in made if sample.name == label).arguments)


def kernel_takes(name, label):
    """What takes a call where nothing is compiled."""
    rows = isolith.explain(OPERATORS[name], **call_of(name, label, torch.bfloat16)).candidates
    return next(row.name for row in rows if row.why_not is None and not row.name.endswith("_native"))


@pytest.fixture(params=["whole", "pieces"])
def cut(request, monkeypatch):
    """The limits as they are, and so small that every call is cut at every seam."""
    if request.param == "pieces":
        monkeypatch.setattr(scores, "PIECE", 1)
        for limit, value in (("GATHERED", 1), ("SCORED", 1), ("TOKENS", 3)):
            monkeypatch.setattr(attention, limit, value)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("name", "label", "dtype"), cases(*KERNELS))
def test_results_are_those_of_legal_roundings(name, label, dtype):
    call = call_of(name, label, dtype)
    result = KERNELS[name].fn(**call)
    verdict = due(name, label, dtype).verdict_on(list(result) if isinstance(result, tuple) else [result])
    assert verdict.problem is None


@pytest.mark.parametrize("name", ["sparse_attn", "indexer_score", "indexer_topk", "lightning_indexer"])
def test_the_kernel_takes_calls_of_a_model(name):
    label = "flash" if name == "indexer_topk" else "flash_decode"
    assert kernel_takes(name, label) == f"cpu.{name}"


@pytest.mark.parametrize(
    ("name", "label"),
    [("sparse_attn", "one_head_odd_width"), ("indexer_topk", "one"), ("indexer_score", "around_the_ratio")],
)
def test_small_calls_stay_with_the_reference(name, label):
    assert kernel_takes(name, label) == "reference"


def test_a_visible_entry_without_a_block_scores_as_zeros():
    call = call_of("indexer_score", "flash_decode", torch.float32)
    call["block_table"][0, 3] = -1
    torch.testing.assert_close(KERNELS["indexer_score"].fn(**call), OPERATORS["indexer_score"].reference(**call))


def test_nan_scores_leave_the_indices_in_range_and_distinct():
    scores = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1))
    scores[0, ::7] = torch.nan
    indices, _ = KERNELS["indexer_topk"].fn(scores, torch.tensor([4000]), 900)
    assert distinct(indices)
    assert int(indices.max()) < 4000


def distinct(indices):
    """Whether no row has an index twice."""
    return all(len(set(row)) == len(row) for row in ([i for i in row if i >= 0] for row in indices.tolist()))


def test_of_equal_scores_the_lowest_columns_are_selected():
    make = Make(torch.float32, seed="ties")
    scores, lengths = make.small_integers(3, 5003), make.tensor([5003, 4001, 120], torch.int32)
    expected = OPERATORS["indexer_topk"].reference(scores, lengths, 200)
    assert all(map(torch.equal, KERNELS["indexer_topk"].fn(scores, lengths, 200), expected))


@pytest.mark.parametrize("entry", [584, 132, 68])
def test_every_code_reads_as_in_the_reference(entry):
    layout = FORMATS[entry]
    codes = torch.arange(256).to(torch.uint8)[:, None].expand(-1, layout.data_bytes)
    codes = codes[(codes[:, 0] & 127) < 127]  # without the NaN of e4m3
    scales = torch.tensor([120, 121, 133, 134, 127, 127, 127, 0]).to(torch.uint8)[: layout.scale_bytes]
    scales = torch.tensor([0.3]).view(torch.uint8) if entry == 132 else scales
    call = (codes, scales.expand(len(codes), -1), layout)
    assert torch.equal(entries.dequantised(*call), pages.dequantise(*call, torch.float32))
