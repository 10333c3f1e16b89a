"""Calls that were compared while a program ran: the judge that `isolith.shadow` asks, and what it keeps of a wrong one.

    call.json              what was called, by which kernel, and what was found
    inputs.safetensors     the tensor arguments by name, as they were before the call
    results.safetensors    what the kernel gave: outputs, then mutated arguments, by number

`isolith_conformance.shadow_reproduce` runs the kernel on the inputs again.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from isolith.dispatch import using
from isolith.operator import AnyOperator
from isolith_conformance.bundle import Pinned, signature_of, suite_version, write_file
from isolith_conformance.bundle_tensors import NAMES, BundleError, tensor_bytes
from isolith_conformance.bundle_values import Packer
from isolith_conformance.family import Arguments, evaluate, only_references
from isolith_conformance.judge import expect, judge_beside
from isolith_conformance.report_json import Tree, canonical, encode

MOST_FOR_GOLD = 2**27
"""Operations of a call that gold must find wrong too: gold and the legal family are some fifty runs of the reference,
those in float64 and with sums in order slow ones."""
MOST_KEPT = 8
"""Calls of one kernel that are kept on a machine; they may hold what users have typed, and a disk is not endless."""
RECORD = "call.json"

CallHow = Literal["hardware", "interpreter", "twin"]


@dataclass(frozen=True, kw_only=True)
class KeptCall:
    """One call of a kernel.

    Args:
        operator: What was called.
        kernel: What ran it, as `explain` spells it.
        how: Whether its device was a real one.
        signature: Over the operator's name, shapes and signature: what the call means.
        problem: What was found.
        arguments: All by name; a tensor as {"tensor": name}.
        strides: Of each tensor argument, as the copies on the host had them.
        inputs: The file of tensors.
        results: The file of results; None where they are of kinds that no file holds.
    """

    call: Literal[1]
    suite: str
    torch: str
    operator: str
    kernel: str
    how: CallHow
    signature: str
    problem: str
    arguments: Mapping[str, Tree]
    strides: Mapping[str, tuple[int, ...]]
    inputs: Pinned
    results: Pinned | None


def problem(
    operator: AnyOperator, arguments: Arguments, results: list[Tensor], declares: tuple[str, ...] = ()
) -> str | None:
    """What is wrong with a call's results, or None.

    The reference's own result is the measure; a call that is small enough is wrong only where gold says so too, with
    whatever is legal for the kernel, as in a run of the suite.

    Args:
        operator: What was called.
        arguments: As they were before the call, on the host.
        results: What the kernel made of them, on the host: outputs, then mutated arguments after the call.
        declares: Numerics that the kernel has declared.

    Raises:
        ArgumentError: where the values are illegal, so that nothing is due.
    """
    with using(only_references()), torch.no_grad():
        if operator.check_values:
            operator.check_values(**arguments)
        found = judge_beside(operator, arguments, evaluate(operator, operator.reference, arguments), results)
        if not found.passed and operator.cost(**arguments).flops <= MOST_FOR_GOLD:
            found = expect(operator, arguments, declared=declares).verdict_on(results)
        return found.problem


def keep(
    folder: Path,
    operator: AnyOperator,
    kernel: str,
    how: CallHow,
    problem: str,
    arguments: Arguments,
    results: list[Tensor],
) -> Path:
    """Keep a call in a folder of its own, named by kernel and inputs, that this user alone can read.

    Raises:
        BundleError: where enough calls of the kernel are kept.
    """
    packer = Packer()
    packed = packer.pack(arguments)
    inputs = tensor_bytes(packer.tensors)
    # Whoever writes a kernel chooses its name, and a name may hold what is no part of a path.
    name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in f"{operator.name}-{kernel}")
    mark = hashlib.sha256(canonical(encode(packed)).encode() + inputs).hexdigest()[:16]
    place = folder / f"{name}-{mark}"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if len(known := sorted(folder.glob(f"{name}-*"))) >= MOST_KEPT:
        raise BundleError(f"{len(known)} earlier calls of it are kept in {folder}")
    part = folder / f".{mark}-{secrets.token_hex(4)}"
    part.mkdir(mode=0o700)
    try:
        numbered = {str(number): result for number, result in enumerate(results)}
        storable = all(result.dtype in NAMES and result.layout == torch.strided for result in results)
        call = KeptCall(
            call=1,
            suite=suite_version(),
            torch=torch.__version__,
            operator=operator.name,
            kernel=kernel,
            how=how,
            signature=signature_of(operator),
            problem=problem,
            arguments=packed,
            strides={name: value.stride() for name, value in arguments.items() if isinstance(value, Tensor)},
            inputs=write_file(part / "inputs.safetensors", inputs),
            results=write_file(part / "results.safetensors", tensor_bytes(numbered)) if storable else None,
        )
        write_file(part / RECORD, f"{canonical(encode(call))}\n".encode())
        os.rename(part, place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if not place.exists():  # else another process was first
            raise
    return place
