"""The C++ kernels: right on every sample, on this machine's instructions and without them, on any number of threads."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from isolith import Kernel, Make
from isolith.ops import OPERATORS
from isolith_backends.cpu import isolith_backend
from isolith_backends.cpu.native import library as native
from isolith_backends.cpu.native.library import Library
from isolith_conformance.judge import expect

MODULES = {name.rpartition(".")[2]: import_module(name) for name in isolith_backend().kernels if ".native." in name}
KERNELS = {
    kernel.name: (kernel, module.library)
    for module in MODULES.values()
    for kernel in vars(module).values()
    if isinstance(kernel, Kernel)
}
BUILDS = ("machine", "portable")
PORTABLE = {"x86_64": "-march=x86-64-v2", "AMD64": "-march=x86-64-v2"}.get(platform.machine(), "-march=native")
NO_COMPILER = Library("norm").missing()

pytestmark = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def cases():
    """Every sample with every dtype on every build; CI takes each sample once, in turn in one dtype on one build."""
    for name, (kernel, _) in KERNELS.items():
        for at, dtype in enumerate(kernel.operator.sample_dtypes):
            samples = kernel.operator.samples(Make(dtype, seed=kernel.operator.name))
            for place, sample in enumerate(samples):
                if sample.tags & {"device", "invariants", "slow"}:
                    continue
                for number, build in enumerate(BUILDS):
                    turn = (place + number) % len(kernel.operator.sample_dtypes) == at
                    quick = turn and (place // 2 + number) % 2 == 0 and "model" not in sample.tags
                    marks = [] if quick else [pytest.mark.slow]
                    label = f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}-{build}"
                    yield pytest.param(name, sample.name, dtype, build, id=label, marks=marks)


def call_of(name, label, dtype):
    operator = KERNELS[name][0].operator
    made = operator.samples(Make(dtype, seed=operator.name))
    return operator.arguments(**next(sample for sample in made if sample.name == label).arguments)


@cache
def due(operator, name, label, dtype):
    """What is due for a call, once for both builds."""
    return expect(OPERATORS[operator], call_of(name, label, dtype))


@cache
def portable(name):
    """The functions of a library without this machine's instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", PORTABLE)
        other = Library(name)
        assert other.missing() is None
    return other.functions


def results_of(kernel, call):
    """Outputs, then what was written in place, of a call on copies."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    outputs = [leaf for leaf in tree_flatten(kernel.fn(**given))[0] if isinstance(leaf, Tensor)]
    return outputs + [given[name] for name in kernel.operator.mutates]


def refused(kernel, call):
    return kernel.requires.why_not(call) or (kernel.why_not(**call) if kernel.why_not else None)


@pytest.mark.parametrize(("name", "label", "dtype", "build"), [*cases()])
def test_results_are_those_of_legal_roundings(name, label, dtype, build, monkeypatch):
    kernel, library = KERNELS[name]
    call = call_of(name, label, dtype)
    if reason := refused(kernel, call):
        pytest.skip(reason)
    assert library.missing() is None
    if build == "portable":
        monkeypatch.setattr(library, "functions", portable(library.source.stem))
    assert due(kernel.operator.name, name, label, dtype).verdict_on(results_of(kernel, call)).problem is None


def large_samples(kernel):
    """The three samples with the most bytes that take no long gold."""
    sized = []
    for sample in kernel.operator.samples(Make(torch.bfloat16, seed=kernel.operator.name)):
        call = kernel.operator.arguments(**sample.arguments)
        size = sum(value.nbytes for value in call.values() if isinstance(value, Tensor))
        if not sample.tags & {"device", "invariants", "slow"} and not refused(kernel, call):
            sized.append((size, sample.name))
    return [name for _, name in sorted(sized)[-3:]]


@pytest.mark.parametrize("name", KERNELS)
def test_bits_do_not_depend_on_the_number_of_threads(name):
    kernel, library = KERNELS[name]
    assert library.missing() is None
    before = torch.get_num_threads()
    try:
        for label in large_samples(kernel):
            found = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                found.append(bits_of(kernel, call_of_bf16(name, label)))
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other)), label
    finally:
        torch.set_num_threads(before)


def bits_of(kernel, call):
    """The bytes of what is specified of the results."""
    results, operator = results_of(kernel, call), kernel.operator
    masks = operator.defined(**call) if operator.defined else [None] * len(results)
    kept = [
        leaf if mask is None else leaf[mask.expand(leaf.shape[: mask.dim()])]
        for leaf, mask in zip(results, masks, strict=True)
    ]
    return [leaf.contiguous().flatten().view(torch.uint8) for leaf in kept]


def call_of_bf16(name, label):
    return call_of(name, label, torch.bfloat16)


def test_every_kernel_is_named_after_its_operator():
    assert KERNELS
    assert all(name == f"{kernel.operator.name}_native" for name, (kernel, _) in KERNELS.items())


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("", "CXX='' names no program"), ("no-such-compiler", "names no program"), ("false", "false ended with 1")],
)
def test_a_compiler_that_does_not_work_is_a_reason(compiler, said, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.machine.cache_clear()
    assert said in Library("norm").missing()


def test_without_a_compiler_the_reference_runs_and_nothing_is_said(tmp_path):
    code = """
import warnings
warnings.simplefilter("error")
import torch, isolith
with isolith.record() as calls:
    isolith.rms_norm(torch.ones(2, 8), torch.ones(8))
print(*calls)
print(isolith.explain(isolith.rms_norm, torch.ones(2, 8), torch.ones(8)))
"""
    environment = {**os.environ, "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('rms_norm', 'reference')")
    assert "norm.cpp is not compiled: CXX='' names no program" in done.stdout
    assert not (tmp_path / "isolith" / "native").exists()


def test_what_is_compiled_once_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Library("norm").missing() is None
    (made,) = (tmp_path / "isolith" / "native").glob("*.so")
    before = made.stat().st_mtime_ns
    assert Library("norm").missing() is None
    assert made.stat().st_mtime_ns == before
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert Library("norm").missing() is None
    assert len(list((tmp_path / "isolith" / "native").glob("*.so"))) == 2


def test_a_file_that_does_not_compile_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = Library("norm")
    broken.source = tmp_path / "broken.cpp"
    broken.source.write_text("EXPORT nonsense")
    assert broken.missing().startswith("broken.cpp is not compiled: ")
    assert not list((tmp_path / "isolith" / "native").glob("**/*.so"))
