"""What a call costs beyond the kernel's own function, against a direct call and against the mechanisms of others.

    python benchmarks/call_overhead.py [--json]

Every row times a kernel that does nothing, on CPU tensors, round robin with the others; least and median of `--repeats`
rounds in nanoseconds, and what a call executes: Python frames, look-ups in dictionaries, in module globals, and of
attributes. Budgets: a bound handle 100 ns over the direct call; a full call 500 ns + 300 ns per tensor argument over
it; `import isolith` 50 ms over `import torch`.

direct          the function itself
bound           isolith.bind
call            the operator, eagerly
node            the operator as a graph of torch.export or torch.compile calls it, torch.ops.isolith
compiled        the operator in a function under torch.compile (aot_eager), a tenth of ten in a row
torch.library   Library.define and impl: how FlagGems replaces ATen's operators, and engines register their own
custom_op       torch.library.custom_op
vllm ir         an operator of vllm.ir with one provider, through torch, where vllm is installed
vllm ir eager   the same without torch's dispatcher
"""

import argparse
import dis
import importlib.util
import inspect
import json
import statistics
import subprocess
import sys
import timeit
from collections import Counter
from collections.abc import Callable
from types import FrameType
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


KEPT: list[Any] = []  # Any: what lives as long as what it has registered


def compiled(operator: AnyOperator) -> Callable[..., Any]:
    """A compiled function that calls the operator as often as CHAIN says."""

    def chain(*args: Any) -> Any:
        return [operator(*args) for _ in range(CHAIN)]

    return torch.compile(chain, backend="aot_eager", fullgraph=True)


def vllm_ir(operator: AnyOperator, answer: Any) -> Any:
    """An operator of vllm.ir whose first provider does nothing."""
    from vllm.ir.op import register_op

    made = register_op(operator.reference, name=f"isolith_{operator.name}")

    def idle(*args: Any, **kwargs: Any) -> Any:
        return answer

    idle.__signature__ = inspect.signature(operator.reference)  # type: ignore[attr-defined]  # read by inspect alone
    made.register_impl("idle")(idle)
    priority = made.set_priority(["idle"])
    priority.__enter__()
    KEPT.append(priority)
    return made


def vllm_ir_eager(operator: AnyOperator) -> Callable[..., Any]:
    """The same, without torch's dispatcher: what enable_torch_wrap(False) makes of a call."""
    from vllm.ir.op import IrOp

    found: Callable[..., Any] = IrOp.registry[f"isolith_{operator.name}"]._inner_call
    return found


CHAIN = 10
WAYS = ("direct", "bound", "call", "node", "compiled", "torch.library", "custom_op", "vllm ir", "vllm ir eager")
LOOK_UPS = {"LOAD_GLOBAL": "globals", "LOAD_NAME": "globals", "LOAD_ATTR": "attributes", "LOAD_METHOD": "attributes"}


def executed(function: Callable[..., Any], args: tuple[Any, ...]) -> Counter[str]:
    """What a warm call executes in Python: frames, and look-ups in dictionaries, of globals and of attributes."""
    counted: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            counted["frames"] += 1
            frame.f_trace_opcodes = True
        if event == "opcode":
            kind = LOOK_UPS.get(dis.opname[frame.f_code.co_code[frame.f_lasti]])
            counted.update([kind] if kind else [])
        return trace

    def profile(_: FrameType, event: str, called: Any) -> None:
        counted["dictionaries"] += event == "c_call" and isinstance(getattr(called, "__self__", None), dict)

    function(*args)
    # sys.settrace sees the frames of Python alone, sys.setprofile what they call in C.
    for start, look in ((sys.settrace, trace), (sys.setprofile, profile)):
        start(look)
        try:
            function(*args)
        finally:
            start(None)
    return counted


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
        "node": lambda: operator.torch_op,
        "compiled": lambda: compiled(operator),
        "torch.library": lambda: library_op(operator, answer),
        "custom_op": lambda: custom_op(operator, answer),
        "vllm ir": lambda: vllm_ir(operator, answer),
        "vllm ir eager": lambda: vllm_ir_eager(operator),
    }
    if importlib.util.find_spec("vllm") is None:
        ways = tuple(name for name in ways if not name.startswith("vllm"))
    functions = {name: makers[name]() for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with using(dispatcher), torch.inference_mode():
        for _ in range(repeats):
            for name, function in functions.items():
                seconds = timeit.timeit("f(*a)", globals={"f": function, "a": args}, number=number)
                times[name].append(seconds / number * 1e9 / (CHAIN if name == "compiled" else 1))
        counts = {name: executed(function, args) for name, function in functions.items() if name != "compiled"}
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
        "executed": {name: dict(counted) for name, counted in counts.items()},
    }


def import_ms(repeats: int) -> dict[str, float]:
    """Milliseconds that `import isolith` takes after `import torch`, each in a fresh process.

    Without the garbage collector, whose pass over all that torch has made falls into one import or another.
    """
    code = "import gc, torch, time; gc.disable(); s = time.perf_counter(); import isolith; "
    code += "print((time.perf_counter() - s) * 1e3)"
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
    print("nanoseconds a call: least of the rounds (median), over direct; frames, look-ups in dictionaries, globals,")
    print("attributes that Python executes for it")
    for row in rows:
        print(f"\n{row['operator']}, {row['tensors']} tensors; call budget {row['call_budget_ns']} ns over direct")
        for name, least in row["least_ns"].items():
            counted = row["executed"].get(name, {})
            kinds = [counted.get(kind, 0) for kind in ("frames", "dictionaries", "globals", "attributes")]
            told = "  ".join(f"{count:4}" for count in kinds) if counted else ""
            median = f"({row['median_ns'][name]:.0f})"
            print(f"  {name:14}{least:8.0f} {median:>8} {row['over_direct_ns'][name]:+8.0f}   {told}")
    print(
        f"\nimport isolith after torch: {imports['least_ms']:.0f} ms least, {imports['median_ms']:.0f} ms median of 7"
    )


if __name__ == "__main__":
    main()
