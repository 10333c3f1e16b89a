"""Every sample that a kernel takes, run on the twin in this process and judged as the suite judges it."""

import functools
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isolith import OPERATORS, Make, config, plugins
from isolith.kernel import Kernel
from isolith.registry import Registry
from isolith_backends.vendor_calls import VendorCall
from isolith_conformance.judge import Expectation, expect

sys.path.insert(0, str(Path(__file__).parent))
from cut_adapters import CUTS, Cut
from more_calls import samples_of
from wrong_adapters import WRONG, Wrong

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


def taken(kernel: Kernel, dtype: str) -> Iterator[tuple[str, dict]]:
    """(name, arguments on the host) of the samples with work that the kernel takes."""
    operator = kernel.operator
    for sample in samples_of(operator, Make(DTYPES[dtype], seed=f"{operator.name}-{dtype}")):
        arguments = operator.arguments(**sample.arguments)
        refused = kernel.requires.why_not(arguments) or (kernel.why_not and kernel.why_not(**arguments))
        if not refused and not {"invariants", "slow"} & set(sample.tags):
            yield sample.name, arguments


@functools.cache
def expected(operator: str, sample: str, dtype: str) -> Expectation:
    """What is due for a sample."""
    made = samples_of(OPERATORS[operator], Make(DTYPES[dtype], seed=f"{operator}-{dtype}"))
    found = next(one for one in made if one.name == sample)
    arguments = OPERATORS[operator].arguments(**found.arguments)
    declared = tuple(OPERATORS[operator].declared)
    return expect(OPERATORS[operator], arguments, "exact" in found.tags, declared)


def results_of(kernel: Kernel, arguments: dict) -> list[Tensor]:
    """Outputs and written arguments of a call on the device, copied to the host."""
    given = {name: on_device(value) for name, value in arguments.items()}
    made = kernel.fn(**given)
    outputs = () if made is None else (made,) if isinstance(made, Tensor) else made
    return [result.cpu() for result in (*outputs, *(given[name] for name in kernel.operator.mutates))]


def on_device(value: object) -> object:
    """A copy on the device with the same strides, in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")
    made.copy_(value)
    return made


def problems(kernel: Kernel, dtype: str) -> Iterator[tuple[str, str]]:
    """(sample, what is wrong with it or "") of the samples that the kernel takes."""
    for name, arguments in taken(kernel, dtype):
        try:
            results = results_of(kernel, arguments)
        except Exception as error:  # the vendor's call may raise anything
            yield name, f"raises {type(error).__name__}: {error}"
            continue
        verdict = expected(kernel.operator.name, name, dtype).verdict_on(results)
        yield name, "" if verdict.problem is None else str(verdict.problem)


@contextmanager
def applied(wrong: Wrong) -> Iterator[list[str]]:
    """Every call of the vendor's operator with the change; the list tells of each that was changed."""
    right, changed = VendorCall.__call__, []

    def call(self: VendorCall, **arguments: Any) -> Any:
        if not any(name.partition("::")[2] == wrong.call for name in self.names):
            return right(self, **arguments)
        changed.append(wrong.call)
        results = right(self, **(wrong.change(arguments) if wrong.change else arguments))
        return wrong.result(results) if wrong.result else results

    VendorCall.__call__ = call
    try:
        yield changed
    finally:
        VendorCall.__call__ = right


def without(cut: Cut) -> Kernel:
    """The kernel of the module compiled anew, with the text replaced."""
    spec = importlib.util.find_spec(f"isolith_backends.ascend.{cut.module}")
    text = Path(str(spec and spec.origin)).read_text()
    if text.count(cut.before) != 1:
        raise ValueError(f"{cut.name}: {cut.before!r} stands {text.count(cut.before)} times in {cut.module}.py")
    made = types.ModuleType(f"isolith_backends.ascend.{cut.module}")
    exec(compile(text.replace(cut.before, cut.after), f"{cut.module}.py of {cut.name}", "exec"), vars(made))
    kernel: Kernel = getattr(made, cut.kernel.partition(".")[2])
    return kernel


def why_found(kernels: dict[str, Kernel], wrong: Wrong | Cut) -> str:
    """What the judge says of the first sample that shows a wrong adapter; empty where it lives."""
    if wrong.kernel not in kernels:
        return ""
    if isinstance(wrong, Cut):
        found = problems(without(wrong), wrong.dtype)
        return next((f"{sample}: {problem}" for sample, problem in found if problem), "")
    with applied(wrong):
        found = problems(kernels[wrong.kernel], wrong.dtype)
        return next((f"{sample}: {problem}" for sample, problem in found if problem), "")


def loaded() -> dict[str, Kernel]:
    """The kernels that are available on the twin, by "operator.kernel"."""
    importlib.import_module("isolith_backends.ascend.twin")
    (row,) = (row for row in plugins.discover() if row.name == "ascend")
    registry = Registry(operators=OPERATORS, plugins=(plugins.load(row),))
    backend = registry.backend("ascend")
    found = (kernel for name in OPERATORS for kernel in registry.kernels(backend, name))
    here = (kernel for kernel in found if kernel.requires.why_not_here(backend) is None)
    return {f"{kernel.operator.name}.{kernel.name}": kernel for kernel in here}


def main(words: list[str]) -> None:
    """Print JSON: "wrong [NAME..]" what was found of each of this chip, "right [KERNEL..]", "kernels" available."""
    kernels = loaded()
    what, *names = words
    if what == "wrong":
        twin = (config.from_environment().twin or "a3").partition("-")[0]
        here = [wrong for wrong in (*WRONG, *CUTS) if wrong.twin == twin]
        result: Any = {w.name: why_found(kernels, w) for w in here if not names or w.name in names}
    elif what == "right":
        chosen = names or list(kernels)
        every = {f"{name} {dtype}": problems(kernels[name], dtype) for name in chosen for dtype in DTYPES}
        result = {name: [f"{s}: {p}" for s, p in found if p] for name, found in every.items()}
    else:
        result = sorted(kernels)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
