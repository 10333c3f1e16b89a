"""What a call costs beyond the kernel's own function, against a direct call and against torch's own mechanisms.

    python benchmarks/call_overhead.py [--json]

Every row times a kernel that does nothing, on CPU tensors, round robin with the others; least and median of `--repeats`
rounds in nanoseconds. Budgets: a bound handle 100 ns over the direct call; a full call 500 ns + 300 ns per tensor
argument over it; `import isolith` 50 ms over `import torch`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import isolith
from isolith.config import Settings
from isolith.dispatch import Dispatcher, Handle, using
from isolith.operator import AnyOperator
from isolith.registry import Registry

BUDGET = {"bound_ns": 100, "call_ns": 500, "call_ns_per_tensor": 300, "import_ms": 50}
NUMBER = 2000


def idle_dispatcher(
    operator: AnyOperator, example: dict[str, Any], answer: Any
) -> tuple[Dispatcher, Callable[..., Any]]:
    """A dispatcher that has already chosen, for this call, a kernel that does nothing."""
    parameters = ", ".join(
        name if p.default is p.empty else f"{name}=None" for name, p in operator.signature.parameters.items()
    )
    kernel: Callable[..., Any] = eval(f"lambda {parameters}: answer", {"answer": answer})
    dispatcher = Dispatcher(Registry(operators=isolith.OPERATORS, plugins=()), Settings())
    dispatcher.memo[operator.metadata_key(**example)] = kernel
    return dispatcher, kernel


def custom_op(operator: AnyOperator, answer: Any) -> Callable[..., Any]:
    """The same call through torch.library.custom_op."""
    schema = torch.library.infer_schema(operator.reference, mutates_args=())
    made: Callable[..., Any] = torch.library.custom_op(
        f"isolith_bench::{operator.name}", lambda *_: answer, mutates_args=(), schema=schema
    )
    return made


def library_op(operator: AnyOperator, answer: Any) -> Callable[..., Any]:
    """The same call through torch.library.Library: define + impl."""
    library = torch.library.Library("isolith_bench_raw", "FRAGMENT")
    library.define(operator.name + torch.library.infer_schema(operator.reference, mutates_args=()))
    library.impl(operator.name, lambda *_: answer, "CompositeExplicitAutograd")
    KEPT.append(library)
    found: Callable[..., Any] = getattr(torch.ops.isolith_bench_raw, operator.name).default
    return found


KEPT: list[torch.library.Library] = []


WAYS = ("direct", "bound", "call", "torch.library", "custom_op")


def measure(
    operator: AnyOperator, repeats: int, number: int = NUMBER, ways: tuple[str, ...] = WAYS
) -> dict[str, Any]:  # Any: JSON
    """Nanoseconds of each way to make one call, measured in turn: `repeats` rounds of `number` calls."""
    sample = next(iter(operator.samples(isolith.Make(torch.float32))))
    example = operator.arguments(**sample.arguments)
    args = tuple(example.values())
    answer = operator.reference(**example)
    dispatcher, kernel = idle_dispatcher(operator, example, answer)
    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        "direct": lambda: kernel,
        "bound": lambda: Handle(kernel),
        "call": lambda: operator,
        "torch.library": lambda: library_op(operator, answer),
        "custom_op": lambda: custom_op(operator, answer),
    }
    functions = {name: makers[name]() for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with using(dispatcher), torch.inference_mode():
        for _ in range(repeats):
            for name, function in functions.items():
                seconds = timeit.timeit("f(*a)", globals={"f": function, "a": args}, number=number)
                times[name].append(seconds / number * 1e9)
    tensors = sum(isinstance(value, Tensor) for value in args)
    medians = {name: statistics.median(values) for name, values in times.items()}
    # The quietest round is what the code costs; the median is what a busy machine makes of it.
    least = {name: min(values) for name, values in times.items()}
    over = {name: least[name] - least["direct"] for name in ways}
    allowed = BUDGET["call_ns"] + BUDGET["call_ns_per_tensor"] * tensors
    return {
        "operator": operator.name,
        "tensors": tensors,
        "median_ns": medians,
        "least_ns": least,
        "over_direct_ns": over,
        "call_budget_ns": allowed,
    }


def import_ms(repeats: int) -> dict[str, float]:
    """Milliseconds that `import isolith` takes after `import torch`, each in a fresh process."""
    code = "import torch, time; s = time.perf_counter(); import isolith; print((time.perf_counter() - s) * 1e3)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return {"median_ms": statistics.median(runs), "least_ms": min(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("rms_norm", "hc_post", "sparse_attn")
    rows = [measure(isolith.OPERATORS[name], options.repeats) for name in names if name in isolith.OPERATORS]
    imports = import_ms(7)
    if options.json:
        print(json.dumps({"calls": rows, "import": imports, "budget": BUDGET}, indent=2))
        return
    print("nanoseconds a call, least of the rounds (median)")
    for row in rows:
        print(f"\n{row['operator']}, {row['tensors']} tensors; call budget {row['call_budget_ns']} ns over direct")
        for name, least in row["least_ns"].items():
            print(f"  {name:14}{least:8.0f} ({row['median_ns'][name]:.0f})   {row['over_direct_ns'][name]:+8.0f}")
    print(
        f"\nimport isolith after torch: {imports['least_ms']:.0f} ms least, {imports['median_ms']:.0f} ms median of 7"
    )


if __name__ == "__main__":
    main()
