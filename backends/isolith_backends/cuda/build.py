"""Compile every kernel without a GPU, at the shapes of the released models, and say what it takes.

    python -m isolith_backends.cuda.build [--arch 80 90 100] [--operator NAME] [--report FILE]

Each function of this backend is called on tensors without memory, for every call of `isolith.models` and every sample
tagged "model", as it is and with 4,096 tokens; the launches that it would make are compiled to machine code. A row says
how many registers and how much shared memory a program takes, and how many instructions move spilled registers, in
loops and elsewhere.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isolith import OPERATORS, Make, plugins
from isolith.kernel import Kernel
from isolith.models import MODELS
from isolith.operator import AnyOperator
from isolith.select import refusal
from isolith_backends import cuda
from isolith_backends.cuda.launch import Launch, noting

ARCHS = (80, 90, 100)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB of shared memory that a block can have (CUDA C++ Programming Guide, table of compute capabilities)."""
REGISTERS = 65536  # 32-bit registers of a multiprocessor, the same in all of them
CONTEXT = 65536  # tokens, for the calls of a model
PREFILL = 4096  # tokens of a call that is not a decoding step
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}

Arguments = dict[str, Any]  # Any: a call's own values


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one kernel takes on one architecture, for one call."""

    operator: str
    call: str
    kernel: str
    arch: int
    warps: int
    registers: int
    shared: int
    """Bytes."""
    spills: int
    """Instructions that load or store a spilled register."""
    spills_in_loops: int
    """Those of them that stand in a loop."""
    problem: str | None = None
    """Why it cannot run: it does not compile, or it takes more than a multiprocessor has."""


def calls(operator: AnyOperator) -> Iterator[tuple[str, Arguments]]:
    """The calls at the shapes of released models, on tensors without memory; each also with a prefill's tokens."""
    for name, arguments in calls_of_models(operator):
        yield name, arguments
        longer = of_tokens(operator, arguments, PREFILL)
        if longer is not None:
            yield f"{name}, {PREFILL} tokens", longer


def of_tokens(operator: AnyOperator, arguments: Arguments, count: int) -> Arguments | None:
    """The same call of so many tokens, or rows where it has those; None where it has neither, or has as many."""
    shapes = operator.parsed_shapes
    sizes = shapes.bind(operator.name, arguments)
    listed = [
        arguments[shape.name].shape
        for shape in shapes.inputs
        if shape.axes[0] == "*" and arguments[shape.name] is not None
    ]
    leading = sizes.get("...") or next(iter(listed), None) or (None,)
    now = sizes.get("tokens") or leading[0]
    if not now or now >= count:
        return None
    made = dict(arguments)
    for shape in shapes.inputs:
        tensor, axes = arguments.get(shape.name), shape.axes
        if not isinstance(tensor, Tensor):
            continue
        new = list(tensor.shape)
        if axes[0] in ("*", "...") and new and new[0] % now == 0:
            new[0] = new[0] // now * count
        for place, axis in enumerate(axes):
            if axis in ("tokens", "total"):
                new[place] = new[place] // now * count
        made[shape.name] = tensor.new_empty(new)
    return made


def calls_of_models(operator: AnyOperator) -> Iterator[tuple[str, Arguments]]:
    """The calls of models, and the samples of them."""
    for name in ("v4-flash", "v4-pro"):
        for number, made in enumerate(MODELS[name].calls(CONTEXT)):
            if made.operator is operator:
                yield f"{name} {number}", operator.arguments(**made.arguments)
    dtype = torch.bfloat16 if torch.bfloat16 in operator.sample_dtypes else operator.sample_dtypes[0]
    for sample in operator.samples(Make(dtype, seed="build")):
        if "model" in sample.tags:
            yield sample.name, on_meta(operator.arguments(**sample.arguments))


def on_meta(arguments: Arguments) -> Arguments:
    """The same arguments on tensors without memory."""
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}


def rows(operators: Iterable[AnyOperator], archs: Iterable[int]) -> Iterator[Row]:
    """Compile what every kernel of these operators launches, each launch once."""
    backend = cuda.isolith_backend()
    kernels, problem = plugins.kernels_of(backend)
    if problem:
        raise SystemExit(problem)
    seen = set()
    for operator in operators:
        made = list(calls(operator)) if operator.name in kernels else []
        for kernel in kernels.get(operator.name, ()):
            for arch in archs:
                for name, arguments in made:
                    for launch in launches(kernel, arguments, arch):
                        key = (arch, repr(described(launch)), launch.kernel.__name__)
                        if key not in seen:
                            seen.add(key)
                            yield compiled(launch, arch, kernel.name, name)


def launches(kernel: Kernel[..., Any], arguments: Arguments, arch: int) -> list[Launch]:  # Any: any kernel
    """What a kernel would launch for a call; nothing where it refuses the call, or its library is not here."""
    missing = kernel.requires.missing
    with noting(arch) as noted:
        if (missing is None or missing() is None) and refusal(kernel, arguments) is None:
            kernel.fn(**arguments)
    return noted


def described(launch: Launch) -> tuple[dict[str, str], Arguments, dict[tuple[int], list[list[Any]]]]:  # Any: Triton's
    """(types by parameter, constants by parameter, which arguments 16 divides), as Triton specialises a launch."""
    types: dict[str, str] = {}
    constants: Arguments = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}  # Any: Triton's attributes
    names = launch.kernel.arg_names
    for place, value in enumerate(launch.args):
        name = names[place]
        if isinstance(value, Tensor):
            types[name] = "*" + TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            types[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    for name, value in launch.constants.items():
        types[name], constants[name] = "constexpr", value
    return types, constants, aligned


def compiled(launch: Launch, arch: int, operator: str, call: str) -> Row:
    """Compile one launch and measure it."""
    types, constants, aligned = described(launch)
    kernel = launch.kernel
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    row = {"operator": operator, "call": call, "kernel": kernel.__name__, "arch": arch, "warps": launch.warps}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler raises many kinds; each is this row's result
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        return Row(**row, registers=0, shared=0, spills=0, spills_in_loops=0, problem=reason)
    registers, spills, spills_in_loops = measured(made.asm["cubin"])
    shared, problem = made.metadata.shared, None
    if shared > SHARED[arch] * 1024:
        problem = f"takes {shared} bytes of shared memory; sm_{arch} has {SHARED[arch] * 1024}"
    elif registers * 32 * launch.warps > REGISTERS:
        problem = f"takes {registers * 32 * launch.warps} registers; a multiprocessor has {REGISTERS}"
    figures = {"registers": registers, "shared": shared, "spills": spills, "spills_in_loops": spills_in_loops}
    return Row(**row, **figures, problem=problem)


def measured(cubin: bytes) -> tuple[int, int, int]:
    """(registers of a thread, instructions that move spilled ones, those of them in loops)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found, "cuobjdump prints the registers of every kernel"
    return int(found[1]), *spills_in(code.splitlines())


def spills_in(lines: list[str]) -> tuple[int, int]:
    """Instructions of a disassembled kernel that move spilled registers: (all, those in loops)."""
    spills = [number for number, line in enumerate(lines) if re.search(r"\b(?:STL|LDL)\b", line)]
    loops = loops_in(lines)
    return len(spills), sum(any(first < at < last for first, last in loops) for at in spills)


def loops_in(lines: list[str]) -> list[tuple[int, int]]:
    """(first, last) line of every loop of a disassembled kernel: from a label to a branch back to it."""
    labels = {line.strip().rstrip(":"): number for number, line in enumerate(lines) if line.strip().startswith(".L_")}
    branches = ((number, re.search(r"\bBRA\b.*?(\.L_\w+)", line)) for number, line in enumerate(lines))
    return [(labels[to[1]], at) for at, to in branches if to and labels.get(to[1], at) < at]


def tool(name: str, *args: str) -> str:
    """The output of a program that Triton brings."""
    return subprocess.run([str(binaries() / name), *args], capture_output=True, text=True, check=True).stdout


@cache
def binaries() -> Path:
    """Where Triton keeps NVIDIA's programs."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main() -> None:
    """Print a row for every kernel; exit 1 where one cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED), default=ARCHS)
    parser.add_argument("--operator", choices=sorted(OPERATORS))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    chosen = [operator for name, operator in OPERATORS.items() if options.operator in (None, name)]
    made = []
    print(f"{'kernel':28} {'call':34} arch warps registers  shared spills in loops")
    for row in rows(chosen, options.arch):
        made.append(row)
        figures = f"{row.arch:4} {row.warps:5} {row.registers:9} {row.shared:7} {row.spills:6} {row.spills_in_loops:8}"
        print(f"{row.kernel:28} {row.operator + ' ' + row.call:34} {figures}  {row.problem or ''}", flush=True)
    if options.report:
        report = {"triton": triton.__version__, "kernels": [asdict(row) for row in made]}
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(row.problem for row in made))


if __name__ == "__main__":
    main()
