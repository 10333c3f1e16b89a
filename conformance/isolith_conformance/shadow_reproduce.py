"""A call that a shadow run has kept, run again: `python -m isolith_conformance reproduce FOLDER`.

The kernel runs in a backend's process as in a run of the suite. What it gives now is judged by gold, and so is what it
gave then: a kernel that was mended passes now, one that is wrong at times may too.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from isolith import OPERATORS
from isolith_conformance.bundle import pinned_tensors, signature_of
from isolith_conformance.bundle_tensors import BundleError
from isolith_conformance.bundle_values import Unpacker
from isolith_conformance.execute import Options
from isolith_conformance.judge import Verdict, expect
from isolith_conformance.plan import memory_limit
from isolith_conformance.report_json import JsonError, as_text, decode, parse, read_bytes, shown
from isolith_conformance.report_text import first_line, inert
from isolith_conformance.runner import Runner, Setup, Trouble
from isolith_conformance.shadow import RECORD, CallHow, KeptCall
from isolith_conformance.wire import strided

LARGEST_RECORD = 2**20


def read_call(folder: Path) -> tuple[KeptCall, dict[str, Any], list[Tensor] | None]:  # Any: a call's own values
    """(the record, the arguments with their strides, the results) of a kept call.

    Raises:
        BundleError: where it is not whole, or of another operator than there is here.
    """
    path = folder / RECORD
    try:
        call: KeptCall = decode(KeptCall, parse(as_text(read_bytes(path, LARGEST_RECORD))))
        if call.operator not in OPERATORS:
            raise JsonError(f"there is no operator {shown(call.operator)}")
        if signature_of(OPERATORS[call.operator]) != call.signature:
            raise JsonError(f"the call was kept for another signature of {call.operator}")
        tensors = pinned_tensors(folder / "inputs.safetensors", call.inputs)
        unpacker = Unpacker(tensors, {})
        arguments = {name: unpacker.argument(value, name) for name, value in call.arguments.items()}
        OPERATORS[call.operator].validate(OPERATORS[call.operator].arguments(**arguments))
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                strides = list(call.strides.get(name, value.stride()))
                if len(strides) != value.dim():
                    raise JsonError(f"{name} has {value.dim()} axes and {len(strides)} strides")
                arguments[name] = strided(value.clone(), strides)
    except (JsonError, ValueError) as error:
        raise BundleError(f"{path}: {error}".rstrip(".") + ".") from error
    results = None
    if call.results is not None:
        kept = pinned_tensors(folder / "results.safetensors", call.results)
        results = [kept[name] for name in sorted(kept, key=int)]
    return call, arguments, results


def reproduce_call(
    folder: Path, backend: str = "", how: CallHow | None = None, timeout_s: float = 120.0
) -> tuple[bool, str]:
    """Run a kept call again: (whether it is right, sentences on what the kernel gave then and gives now).

    Args:
        folder: Where the call is kept.
        backend: Another backend to run it on, by the kernel that it selects; "" for the kernel that was wrong.
        how: Another way to run it than it ran in.
        timeout_s: How long the call may take.

    Raises:
        BundleError: where the call cannot be believed, or there is no such backend or kernel.
    """
    call, arguments, kept = read_call(folder)
    owner = call.kernel.rpartition(".")[0]
    name = backend or owner
    runner = Runner(Setup(backend=name, how=how or call.how, timeout_s=timeout_s, memory=memory_limit()))
    try:
        known = runner.describe()
        if known["why_unavailable"]:
            raise BundleError(f"Backend {shown(name)} is not available: {known['why_unavailable']}.")
        rows = {row["name"]: row for row in known["kernels"].get(call.operator, [])}
        kernel = call.kernel if name == owner else ""
        if kernel and kernel not in rows:
            raise BundleError(f"{call.operator} has no kernel {kernel} here; known: {', '.join(rows) or 'none'}.")
        declares = tuple(rows[kernel]["declares"]) if kernel else ()
        expectation = expect(OPERATORS[call.operator], arguments, declared=declares)
        lines = [f"{call.operator} by {call.kernel}, found then: {call.problem}"]
        if kept is not None:
            lines.append(f"the results kept: {in_words(expectation.verdict_on(kept))}")
        try:
            response = runner.run(call.operator, kernel, arguments, Options())
        except Trouble as trouble:
            return False, "\n".join([*lines, f"run again: {trouble.verdict}: {first_line(str(trouble))}"])
        if response.status != "ran":
            said = "NOT-CLAIMED" if response.status == "refused" else "ERROR"
            return False, "\n".join([*lines, f"run again: {said}: {first_line(response.message)}"])
        verdict = expectation.verdict_on(response.results)
        lines.append(f"run again, {', '.join(response.executed)}: {in_words(verdict)}")
        return verdict.passed, "\n".join(lines)
    finally:
        runner.close()


def in_words(verdict: Verdict) -> str:
    """PASS, or FAIL and why."""
    return "PASS" if verdict.passed else f"FAIL: {verdict.problem}"


def reproduce_command(folder: Path, backend: str = "", how: CallHow | None = None, timeout_s: float = 120.0) -> int:
    """Run a kept call again, and print what comes of it.

    Returns:
        0 where it is right now, 1 where not, 2 where it cannot be run.
    """
    try:
        right, text = reproduce_call(folder, backend, how, timeout_s)
    except BundleError as error:
        print(inert(str(error)))
        return 2
    print("\n".join(map(inert, text.splitlines())))
    return 0 if right else 1
