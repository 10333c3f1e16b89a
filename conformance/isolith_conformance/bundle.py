"""Golden bundles: inputs, and all that is needed to judge what a machine without our references makes of them.

    manifest.json                                        what there is, with the SHA-256 and the size of every file
    <operator>/<sample>/<dtype>/inputs.safetensors       tensor arguments by name; the others stand in the manifest
    <operator>/<sample>/<dtype>/expected.safetensors     gold in float64, the legal errors, the reference's results

Whoever ran the inputs writes `<operator>/<sample>/<dtype>/results.safetensors` into a folder of their own, by the
names of the manifest: outputs, then the arguments written in place as they are after the call.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from isolith.dtypes import dtype_name
from isolith.operator import AnyOperator
from isolith_conformance.bundle_tensors import BundleError, tensor_bytes, tensors_of
from isolith_conformance.bundle_values import Packer, Unpacker
from isolith_conformance.case import arguments_of, expectation_of, samples_of
from isolith_conformance.judge import Expectation
from isolith_conformance.layers import UNITS
from isolith_conformance.report_json import (
    Hex,
    JsonError,
    Tree,
    as_text,
    canonical,
    decode,
    encode,
    parse,
    read_bytes,
    shown,
)

LARGEST_MANIFEST = 64 * 2**20
LARGEST_TENSORS = 2**32
NEVER_BUNDLED = frozenset({"device"})

Word = Annotated[str, "^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$"]
"""Part of a path: no dot, no slash."""


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """A file's size and hash."""

    bytes: int
    sha256: Hex


@dataclass(frozen=True, kw_only=True)
class ResultName:
    """One result: what it is called in a file of results, and what it must be."""

    name: Word
    dtype: Word
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BundleCase:
    """One call.

    Args:
        signature: Over the operator's name, shapes and signature: what the call means.
        arguments: All by name; a tensor as {"tensor": name}.
        expectation: The judge's record, its tensors by name.
    """

    operator: Word
    sample: Word
    dtype: Word
    tags: tuple[str, ...]
    signature: Hex
    arguments: Mapping[str, Tree]
    results: tuple[ResultName, ...]
    expectation: Mapping[str, Tree]
    inputs: Pinned
    expected: Pinned

    @property
    def id(self) -> str:
        """operator/sample/dtype: also the folder of its files."""
        return f"{self.operator}/{self.sample}/{self.dtype}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle holds."""

    bundle: Literal[1]
    suite: str
    torch: str
    seed: int
    cases: tuple[BundleCase, ...]


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """The manifest's file: the manifest, and the SHA-256 of its canonical JSON."""

    manifest: Manifest
    sha256: Hex


def write_bundle(
    folder: Path,
    operators: Iterable[str],
    dtypes: Iterable[torch.dtype] = (),
    seed: int = 0,
    samples: Iterable[str] = (),
) -> Manifest:
    """Write a bundle into a new folder.

    Args:
        folder: Must not exist, or be empty.
        operators: Names of operators and layers.
        dtypes: Of those that an operator has samples in; all without any.
        seed: Of the samples.
        samples: Their names; all that fit a host without any.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BundleError(f"{folder} is not empty.")
    wanted, named = set(dtypes), set(samples)
    cases = []
    for name in operators:
        if name not in UNITS:
            raise BundleError(f"There is no operator {shown(name)}.")
        for dtype in UNITS[name].sample_dtypes:
            if wanted and dtype not in wanted:
                continue
            for sample in samples_of(name, dtype_name(dtype), seed).values():
                if not sample.tags & NEVER_BUNDLED and (not named or sample.name in named):
                    cases.append(write_case(folder, name, sample.name, dtype_name(dtype), seed, sample.tags))
    manifest = Manifest(bundle=1, suite=suite_version(), torch=torch.__version__, seed=seed, cases=tuple(cases))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"manifest": encode(manifest), "sha256": manifest_hash(manifest)}, indent=1, allow_nan=False)
    write_file(folder / "manifest.json", f"{text}\n".encode())
    return manifest


def suite_version() -> str:
    """The version of this distribution."""
    from importlib.metadata import version

    return version("isolith")


def write_case(folder: Path, name: str, sample: str, dtype: str, seed: int, tags: Iterable[str]) -> BundleCase:
    """Write the files of one call."""
    operator = UNITS[name]
    given, due = Packer(), Packer()
    arguments = given.pack(arguments_of(name, sample, dtype, seed))
    expectation = expectation_of(name, sample, dtype, seed)
    packed = due.pack(expectation)
    place = folder / name / sample / dtype
    return BundleCase(
        operator=name,
        sample=sample,
        dtype=dtype,
        tags=tuple(sorted(tags)),
        signature=signature_of(operator),
        arguments=arguments,
        results=result_names(operator, [one.reference for one in expectation.due]),
        expectation=packed,
        inputs=write_file(place / "inputs.safetensors", tensor_bytes(given.tensors)),
        expected=write_file(place / "expected.safetensors", tensor_bytes(due.tensors)),
    )


def write_file(path: Path, data: bytes) -> Pinned:
    """Write a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
    return Pinned(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def signature_of(operator: AnyOperator) -> str:
    """What a call of the operator means, as a hash."""
    return hashlib.sha256(f"{operator.name}\n{operator.shapes}\n{operator.signature}".encode()).hexdigest()


def result_names(operator: AnyOperator, results: list[Tensor]) -> tuple[ResultName, ...]:
    """Names of the results, as the operator's shapes line spells them."""
    written = [f"{name}_after" for name in operator.mutates]
    known = [shape.name for shape in operator.parsed_shapes.outputs]
    outputs = len(results) - len(written)
    names = known if len(known) == outputs else [f"output_{place}" for place in range(outputs)]
    return tuple(
        ResultName(name=name, dtype=dtype_name(result.dtype), shape=tuple(result.shape))
        for name, result in zip([*names, *written], results, strict=True)
    )


def manifest_hash(manifest: Manifest) -> str:
    """The SHA-256 of a manifest: who knows it knows every byte of the bundle."""
    return hashlib.sha256(canonical(encode(manifest)).encode()).hexdigest()


def read_manifest(folder: Path, sha256: str | None = None) -> Manifest:
    """A bundle's manifest; BundleError unless it is whole, and, where a hash is given, that one."""
    path = folder / "manifest.json"
    try:
        file: ManifestFile = decode(ManifestFile, parse(as_text(read_bytes(path, LARGEST_MANIFEST))))
        found = manifest_hash(file.manifest)
        for due in (file.sha256, *(() if sha256 is None else (sha256,))):
            if found != due:
                raise JsonError(f"its content has the hash {found}; {due} is due")
        ids = [case.id for case in file.manifest.cases]
        if len(set(ids)) < len(ids):
            raise JsonError(f"the case {next(one for one in ids if ids.count(one) > 1)} stands twice")
    except JsonError as error:
        raise BundleError(f"{path}: {error}.") from error
    return file.manifest


def pinned_tensors(path: Path, pinned: Pinned) -> dict[str, Tensor]:
    """The tensors of a file that must have this size and hash."""
    try:
        data = read_bytes(path, min(pinned.bytes, LARGEST_TENSORS))
        found = hashlib.sha256(data).hexdigest()
        if found != pinned.sha256:
            raise JsonError(f"its content has the hash {found}; {pinned.sha256} is due")
        return tensors_of(data)
    except JsonError as error:
        raise BundleError(f"{path}: {error}.") from error


def read_inputs(folder: Path, case: BundleCase) -> dict[str, Any]:  # Any: a call's own values
    """The arguments of a case, for whoever runs it; tensors that the operator writes in place are not shared."""
    path = folder / case.id / "inputs.safetensors"
    tensors = pinned_tensors(path, case.inputs)
    try:
        unpacker = Unpacker(tensors, {})
        arguments = {name: unpacker.argument(value, name) for name, value in case.arguments.items()}
    except JsonError as error:
        raise BundleError(f"{path}: {error}.") from error
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def read_expectation(folder: Path, case: BundleCase) -> Expectation:
    """What the judge needs for a case."""
    path = folder / case.id / "expected.safetensors"
    tensors = pinned_tensors(path, case.expected)
    try:
        operator = UNITS.get(case.operator)
        if operator is None:
            raise JsonError(f"there is no operator {shown(case.operator)}")
        if signature_of(operator) != case.signature:
            raise JsonError(f"the bundle was made for another signature of {case.operator}")
        expectation: Expectation = Unpacker(tensors, UNITS).unpack(Expectation, dict(case.expectation), "expectation")
        if expectation.operator is not operator:
            raise JsonError(f"the expectation is of {expectation.operator.name}")
        named = result_names(operator, [one.reference for one in expectation.due])
        if named != case.results:
            raise JsonError("its results are not those of the manifest")
    except (JsonError, ValueError) as error:
        raise BundleError(f"{path}: {error}.") from error
    return expectation


def write_results(folder: Path, case: BundleCase, results: list[Tensor]) -> None:
    """Write what was made of a case, for `judge_bundle`."""
    tensors = {due.name: result for due, result in zip(case.results, results, strict=True)}
    write_file(folder / case.id / "results.safetensors", tensor_bytes(tensors))
