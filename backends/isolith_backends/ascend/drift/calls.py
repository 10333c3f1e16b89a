"""The adapters' calls through the vendor's own meta kernels: shapes and dtypes of the results against the operators'.

Runs in the environment of torch_npu, on fake tensors of an NPU, and with "twin" behind the target in ours, on the twin,
whose results of each of the vendor's operators must look as the meta kernels'. A meta kernel tells shapes and dtypes;
it checks few of the vendor's rules, and numbers, layouts and aliases not at all.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from isolith import OPERATORS, Make
from isolith.dtypes import dtype_name
from isolith.plugins import AnyKernel, kernels_of
from isolith.select import refusal
from isolith_backends import ascend
from isolith_backends.vendor_calls import VendorCall

Row = dict[str, Any]  # Any: JSON
Run = Callable[[AnyKernel, dict[str, Any]], Any]  # Any: a call's own values and results
Metadata = list[tuple[tuple[int, ...], str]]
METAS = "torch_npu.op_plugin.meta._meta_registrations"
AGREES, NO_META = "agrees", "has no meta kernel"


class NoMetaKernelError(Exception):
    """A call that nobody says the results of."""


class Seen:
    """The vendor's operators called since it was emptied, with what they gave; VendorCall tells it of each."""

    def __init__(self, needs_meta: bool) -> None:
        self.needs_meta = needs_meta
        self.made: list[tuple[str, Metadata]] = []
        self.right = VendorCall.__call__

    def call(self, vendor_call: VendorCall, arguments: dict[str, Any]) -> Any:  # Any: the vendor's own signature
        """Note the operator and call it, or say that it has no meta kernel."""
        function = vendor_call.found()
        if function is None:
            return self.right(vendor_call, **arguments)
        has_meta = torch._C._dispatch_has_kernel_for_dispatch_key(function.name, "Meta")
        if self.needs_meta and not has_meta:
            self.made.append((function.name, []))
            raise NoMetaKernelError(f"{function.name} {NO_META}")
        results = self.right(vendor_call, **arguments)
        self.made.append((function.name, metadata(results)))
        return results


def metadata(results: Any) -> Metadata:  # Any: what an operator returns
    """Shape and dtype of every result."""
    tensors: Sequence[Tensor] = () if results is None else (results,) if isinstance(results, Tensor) else results
    return [(tuple(result.shape), dtype_name(result.dtype)) for result in tensors]


def between(metas: Sequence[Row], twins: Sequence[Row]) -> tuple[int, list[str]]:
    """(results of the vendor's operators compared, a line for each whose shape or dtype is another on the twin).

    The samples are the same ones. On the twin, operators within a kernel run kernels too; an operator of the vendor
    that was not called as often is not compared.
    """
    by_name = {(row["kernel"], row["sample"], row["dtype"]): row["made"] for row in twins}
    count, lines = 0, set()
    for row in metas:
        theirs = by_name.get((row["kernel"], row["sample"], row["dtype"]), [])
        for name in dict.fromkeys(name for name, _ in row["made"]):
            pairs = [[results for each, results in made if each == name] for made in (row["made"], theirs)]
            if len(pairs[0]) != len(pairs[1]):
                continue
            count += len(pairs[0])
            for due, got in zip(*pairs, strict=True):
                if found := difference(got, due):
                    lines.add(f"{name} ({row['kernel']} {row['sample']} {row['dtype']}): {found}")
    return count, sorted(lines)


def difference(got: Metadata, due: Metadata) -> str:
    """What the results through the vendor's meta kernels have that the operator's have not; empty where they agree."""
    if len(got) != len(due):
        return f"{len(got)} results instead of {len(due)}"
    said = [
        f"result {place} is {a[1]} {list(a[0])} instead of {b[1]} {list(b[0])}"
        for place, (a, b) in enumerate(zip(got, due, strict=True))
        if a != b
    ]
    return "; ".join(said)


def with_metas(kernel: AnyKernel, arguments: dict[str, Any]) -> Any:  # Any: a call's own values and results
    """A kernel's results on fake tensors of the device."""
    # Without fallback: it would run what has no meta kernel on a device that is not there.
    with FakeTensorMode(allow_fallback_kernels=False):
        return kernel.fn(**{name: of_device(value) for name, value in arguments.items()})


def on_twin(kernel: AnyKernel, arguments: dict[str, Any]) -> Any:  # Any: a call's own values and results
    """A kernel's results on the twin."""
    given = {name: of_device(value) for name, value in arguments.items()}
    for name, value in given.items():
        if isinstance(value, Tensor):
            value.copy_(arguments[name])
    return kernel.fn(**given)


def outcome(kernel: AnyKernel, arguments: dict[str, Any], run: Run) -> str:  # Any: a call's own values
    """What comes of a kernel's call."""
    try:
        results = run(kernel, arguments)
    except NoMetaKernelError as error:
        return str(error)
    except Exception as error:  # a meta kernel may raise anything
        return f"raises {type(error).__name__}: {error}"
    found = difference(metadata(results), metadata(kernel.operator.fake(**arguments)))
    return f"differs: {found}" if found else AGREES


def of_device(value: Any) -> Any:  # Any: a call's own value
    """A tensor of the device with the same shape, strides and dtype, not yet written."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")


def rows(kernel: AnyKernel, seen: Seen, run: Run) -> Iterator[Row]:
    """A row for each sample that the kernel takes and that calls the vendor."""
    for dtype in kernel.operator.sample_dtypes:
        for sample in kernel.operator.samples(Make(dtype, seed=0)):
            arguments = kernel.operator.arguments(**sample.arguments)
            if {"slow", "device"} & sample.tags or refusal(kernel, arguments) is not None:
                continue
            seen.made.clear()
            result = outcome(kernel, arguments, run)
            if seen.made or result != AGREES:
                name = f"{kernel.operator.name}.{kernel.name}"
                told = {"sample": sample.name, "dtype": dtype_name(dtype), "made": list(seen.made)}
                yield {"kernel": name, **told, "outcome": result}


def prepare() -> None:
    """Let the metas that differ by chip, which ask a device that is not there, know it."""
    metas = importlib.import_module(METAS)
    number = ascend.soc_number(ascend.vendor_module())
    metas.get_soc_version = lambda: number  # type: ignore[attr-defined]  # the name is the vendor's


def main(target: str, where: str = "metas") -> None:
    """Run every kernel that this installation has the operators for, and write what came of it."""
    if where == "twin":
        importlib.import_module("isolith_backends.ascend.twin")
    else:
        prepare()
    seen = Seen(needs_meta=where != "twin")
    run = on_twin if where == "twin" else with_metas
    VendorCall.__call__ = lambda self, **arguments: seen.call(self, arguments)  # type: ignore[method-assign]
    backend = ascend.isolith_backend()
    found, reason = kernels_of(backend)
    if reason is not None:
        raise SystemExit(reason)
    result: dict[str, Any] = {"arch": ascend.arch(), "not_here": {}, "rows": []}
    for kernel in (kernel for name in OPERATORS for kernel in found.get(name, ())):
        missing = kernel.requires.why_not_here(backend)
        if missing is not None:
            result["not_here"][f"{kernel.operator.name}.{kernel.name}"] = missing
        else:
            result["rows"] += rows(kernel, seen, run)
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
