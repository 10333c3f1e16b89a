"""Certificates: which kernels a conformance run has shown to be right on this machine, and with what software.

A conformance run that leaves nothing of a kernel out writes one for it when every case passed. It holds for the same
device, architecture, versions, isolith and source: under ISOLITH_REQUIRE=certified, selection takes no kernel without
one. Sources are pinned by their hashes; a certificate has room for a signature that nothing asks for yet.
"""

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isolith.config import state_folder
from isolith.dtypes import dtype_name
from isolith.kernel import Kernel, WhyNot
from isolith.machine import device_name
from isolith.simulated import is_simulated

if TYPE_CHECKING:
    from isolith.backend import Backend

AnyKernel = Kernel[..., Any]  # Any: kernels of every signature

SCHEMA = 1
LARGEST = 1 << 20
NARROW = (torch.bfloat16, torch.float16)
LEFT_OUT = (".pyc", ".pyo")


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a conformance run has shown of one kernel.

    Args:
        kernel: Its full name: "cpu.sparse_attn".
        operator: What it is a kernel of.
        dtypes: Dtypes of the samples that passed.
        passed: How many cases passed.
        profile: The limits' profile.
        how: "hardware", "interpreter" or "twin".
        isolith: The version of the suite and of the contract.
        device: What the device calls itself.
        arch: What the backend calls its architecture.
        versions: Of torch and of what the backend names: driver, SDK.
        source: A hash of the package that the kernel is in.
        contract: A hash of the operator's own file.
        report: The hash of the report.
        written: When, as ISO 8601.
        signature: Room for one.
    """

    kernel: str
    operator: str
    dtypes: tuple[str, ...]
    passed: int
    profile: str
    how: str
    isolith: str
    device: str
    arch: str
    versions: Mapping[str, str]
    source: str
    contract: str
    report: str
    written: str
    schema: int = SCHEMA
    signature: str = ""


def folder() -> Path:
    """Where this user's certificates are."""
    return state_folder() / "certificates"


def write(certificate: Certificate) -> Path:
    """Keep a certificate; one of an earlier run under the same conditions is replaced."""
    text = json.dumps(asdict(certificate), indent=2, sort_keys=True)
    pinned = [getattr(certificate, name) for name in ("kernel", "how", "device", "arch", "source", "profile")]
    pinned.append(sorted(certificate.versions.items()))
    mark = hashlib.sha256(json.dumps(pinned).encode()).hexdigest()[:16]
    path = folder() / f"{certificate.kernel}.{mark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
    known.cache_clear()
    return path


def read(path: Path) -> Certificate:
    """A certificate's file; ValueError says what is wrong with it."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    given = json.loads(path.read_text())
    names = {field.name for field in fields(Certificate)}
    if not isinstance(given, dict) or set(given) != names:
        raise ValueError(f"it is no certificate: its fields must be {', '.join(sorted(names))}")
    if given["schema"] != SCHEMA:
        raise ValueError(f"it has schema {given['schema']!r}; this isolith reads {SCHEMA}")
    text = [name for name in names - {"schema", "passed", "dtypes", "versions"} if not isinstance(given[name], str)]
    dtypes, versions = given["dtypes"], given["versions"]
    whole = isinstance(given["passed"], int) and isinstance(dtypes, list) and isinstance(versions, dict)
    if text or not whole or not all(isinstance(one, str) for one in (*dtypes, *versions.values())):
        raise ValueError("it is no certificate: a field has another type")
    return Certificate(**{**given, "dtypes": tuple(dtypes)})


def files() -> Iterator[tuple[Path, Certificate | str]]:
    """Every certificate of this user, or what is wrong with its file."""
    for path in sorted(folder().glob("*.json")):
        try:
            yield path, read(path)
        except (OSError, ValueError) as error:
            yield path, str(error)


@cache
def known() -> Mapping[str, tuple[Certificate, ...]]:
    """The certificates that can be read, by kernel; looked for once a process."""
    found: dict[str, tuple[Certificate, ...]] = {}
    for _, one in files():
        if isinstance(one, Certificate):
            found[one.kernel] = (*found.get(one.kernel, ()), one)
    return found


def why_uncertified(kernel: AnyKernel, backend: "Backend", arguments: Mapping[str, Any]) -> WhyNot:
    """Why a kernel may not take a call where certificates are asked for; None where one covers it.

    Args:
        kernel: As its backend or pack brought it.
        backend: On whose device it runs.
        arguments: The call's own values.
    """
    have = known().get(kernel.full_name, ())
    if not have:
        return "it has no certificate on this machine; run python -m isolith_conformance"
    reasons = [why_not_valid(one, kernel, backend) or why_not_covered(one, arguments) for one in have]
    return None if None in reasons else reasons[-1]


def why_not_valid(certificate: Certificate, kernel: AnyKernel, backend: "Backend") -> WhyNot:
    """What has changed since the run."""
    now = facts(backend)
    checks: tuple[tuple[str, str, str], ...] = (
        ("how", certificate.how, "twin" if is_simulated(torch.device(backend.device_type)) else "hardware"),
        ("isolith", certificate.isolith, now["isolith"]),
        ("the device", certificate.device, now["device"]),
        ("arch", certificate.arch, now["arch"]),
        *(
            (name, certificate.versions.get(name, "unknown"), now["versions"].get(name, "unknown"))
            for name in sorted({*certificate.versions, *now["versions"]})
        ),
        ("the kernel's source", certificate.source, source_hash(kernel)),
        ("the operator's contract", certificate.contract, contract_hash(kernel)),
    )
    for name, then, today in checks:
        if then != today:
            return f"its certificate is for another state: {name} was {then[:40]}, is {today[:40]}"
    return None


def why_not_covered(certificate: Certificate, arguments: Mapping[str, Any]) -> WhyNot:  # Any: a call's own values
    """Whether the dtype of a call is one that passed: its 16-bit float dtypes, or else float32."""
    found = {value.dtype for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()}
    narrow = {dtype_name(dtype) for dtype in found if dtype in NARROW}
    wanted = narrow or ({"float32"} if torch.float32 in found else set())
    missing = sorted(wanted - set(certificate.dtypes))
    if not missing:
        return None
    return f"its certificate is for {', '.join(certificate.dtypes)}; the call is in {', '.join(missing)}"


def facts(backend: "Backend") -> dict[str, Any]:  # Any: JSON
    """What a certificate of this machine says of device and software."""
    from isolith import __version__  # isolith itself is made of this module

    return {
        "isolith": __version__,
        "device": device_name(backend.device_type),
        "arch": (backend.arch() if backend.arch else None) or "",
        "versions": {"torch": str(torch.__version__), **(backend.versions() if backend.versions else {})},
    }


def source_hash(kernel: AnyKernel) -> str:
    """A hash of all files of the package that the kernel is in: what a function calls may be anywhere in it."""
    return hash_of_package(kernel.fn.__module__.partition(".")[0])


@cache
def hash_of_package(name: str) -> str:
    """A hash over the names and bytes of a package's files, or of a module's one file."""
    module = sys.modules.get(name) or importlib.import_module(name)
    places = [Path(place) for place in getattr(module, "__path__", ())]
    found = [
        (str(path.relative_to(place)), path)
        for place in places
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.suffix not in LEFT_OUT
    ]
    if not places and (file := getattr(module, "__file__", None)):
        found = [(Path(file).name, Path(file))]
    if not found:
        return "no source"
    made = hashlib.sha256()
    for relative, path in found:
        made.update(f"{relative}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return made.hexdigest()


def contract_hash(kernel: AnyKernel) -> str:
    """A hash of the file that the operator's reference, samples and rules are in."""
    path = inspect.getsourcefile(inspect.unwrap(kernel.operator.reference))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else "no source"
