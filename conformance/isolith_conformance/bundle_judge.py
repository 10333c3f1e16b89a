"""Results that somebody else made of a golden bundle, judged with the same limits as everybody's."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from isolith_conformance.bundle import (
    BundleCase,
    Manifest,
    manifest_hash,
    read_expectation,
    read_manifest,
    write_bundle,
)
from isolith_conformance.bundle_tensors import BundleError, read_tensors
from isolith_conformance.bundle_values import DTYPES
from isolith_conformance.judge import Expectation, Verdict
from isolith_conformance.layers import UNITS
from isolith_conformance.report import Case, How, Outcome, Profile
from isolith_conformance.report_json import canonical, encode, shown
from isolith_conformance.report_standing import counts
from isolith_conformance.report_text import in_words, inert

CHECK = "bundle"


def judge_bundle(
    folder: Path,
    results: Path,
    *,
    backend: str = "results",
    profile: Profile = "standard",
    how: How = "hardware",
    sha256: str | None = None,
) -> tuple[Case, ...]:
    """A verdict on each case of a bundle.

    Args:
        folder: The bundle.
        results: What somebody made of it; a missing file is an ERROR, never a pass.
        backend: What the cases name as their backend.
        profile: Of the limits.
        how: How the results were obtained, as whoever ran it says.
        sha256: The manifest's, where it is known from elsewhere.

    Raises:
        BundleError: where the bundle itself cannot be believed.
    """
    manifest = read_manifest(folder, sha256)
    return tuple(judged(folder, results, manifest, case, backend, profile, how) for case in manifest.cases)


def judged(
    folder: Path, results: Path, manifest: Manifest, case: BundleCase, backend: str, profile: Profile, how: How
) -> Case:
    """The record of one case."""
    expectation = read_expectation(folder, case)
    record = Case(
        id=f"{backend}/{case.operator}/results/{case.sample}/{case.dtype}/{CHECK}",
        check=CHECK,
        backend=backend,
        operator=case.operator,
        family=expectation.operator.family,
        kernel="results",
        sample=case.sample,
        dtype=case.dtype,
        verdict="PASS",
        seed=manifest.seed,
        input_hash=case.inputs.sha256,
        how=how,
    )
    try:
        tensors = read_tensors(results / case.id / "results.safetensors")
    except BundleError as error:
        return replace(record, verdict="ERROR", problem=str(error))
    due = [result.name for result in case.results]
    unknown, missing = sorted(tensors.keys() - set(due)), [name for name in due if name not in tensors]
    if missing or unknown:
        said = f"lacks {', '.join(missing)}" if missing else f"has {shown(unknown[0])}, which is no result"
        return replace(record, verdict="ERROR", problem=f"results.safetensors {said}.")
    found = verdict(expectation, case, [tensors[name] for name in due], profile)
    outcome: Outcome = "PASS" if found.passed else "FAIL"
    return replace(
        record,
        verdict=outcome,
        problem=found.problem,
        rule=found.check if not found.passed else "",
        statistics=dict(found.statistics),
        limits=dict(found.limits),
    )


def verdict(expectation: Expectation, case: BundleCase, results: list[Tensor], profile: Profile) -> Verdict:
    """The judge's verdict, or BundleError where the parts of the expectation do not fit each other."""
    try:
        return expectation.verdict_on(results, profile)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError) as error:
        # The judge raises for no result; a bundle with hashes made anew may hold tensors of any shape.
        said = shown(str(error).partition("\n")[0])
        raise BundleError(f"The expectation of {case.id} does not fit together: {said}.") from error


def bundle_command(folder: Path, operators: tuple[str, ...] = (), dtypes: tuple[str, ...] = (), seed: int = 0) -> int:
    """Write a bundle of these operators, or of all, in these dtypes, or in all.

    Returns:
        0, or 2 where it cannot be written.
    """
    try:
        unknown = sorted(set(dtypes) - DTYPES.keys())
        if unknown:
            raise BundleError(f"There is no dtype {shown(unknown[0])}.")
        manifest = write_bundle(folder, operators or tuple(UNITS), [DTYPES[name] for name in dtypes], seed)
    except BundleError as error:
        print(error)
        return 2
    size = sum(case.inputs.bytes + case.expected.bytes for case in manifest.cases)
    print(f"{folder}: {len(manifest.cases)} cases, {size / 2**20:.1f} MiB; manifest SHA-256 {manifest_hash(manifest)}")
    return 0


def judge_bundle_command(
    folder: Path, results: Path, profile: Profile = "standard", sha256: str | None = None, as_json: bool = False
) -> int:
    """Judge results of a bundle, and print what is wrong.

    Returns:
        0 where every case passed, 1 where not, 2 where the bundle cannot be believed.
    """
    try:
        cases = judge_bundle(folder, results, profile=profile, sha256=sha256)
    except BundleError as error:
        print(inert(str(error)))
        return 2
    if as_json:
        print(canonical(encode(cases)))
    else:
        for case in cases:
            if case.verdict != "PASS":
                print(inert(f"{case.id}: {case.verdict}: {case.problem}"))
        print(f"{in_words(counts(cases))}; a bundle is not sufficient for conformance")
    return 0 if all(case.verdict == "PASS" for case in cases) and cases else 1
