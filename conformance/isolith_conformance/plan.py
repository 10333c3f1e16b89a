"""What a run is asked to do, and what it found on this machine."""

import contextlib
import os
import platform
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import isolith
from isolith import config, plugins
from isolith.machine import processor
from isolith.operator import AnyOperator
from isolith_conformance.case import Unit
from isolith_conformance.execute import Values
from isolith_conformance.layers import UNITS
from isolith_conformance.report import BackendRecord, Environment, How, Profile, Scope, Suite
from isolith_conformance.runner import Runner, Setup
from isolith_conformance.waivers import Waiver, WaiverError, parse
from isolith_conformance.wire import DTYPES


class PlanError(Exception):
    """A run that cannot start; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for; empty tuples mean everything."""

    backends: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    case: str = ""
    scope: Scope = "full"
    profile: Profile = "standard"
    how: How = "hardware"
    seed: int = 0
    timeout_s: float = 120.0
    waivers: str = ""
    environment: tuple[str, ...] = ()

    @property
    def selected(self) -> bool:
        """Whether the run leaves cases out that its scope has."""
        return bool(self.operators or self.dtypes or self.case)


@dataclass(kw_only=True)
class Found:
    """A backend as its process describes it."""

    name: str
    runner: Runner
    description: Values
    waivers: tuple[Waiver, ...] = ()

    @property
    def reason(self) -> str | None:
        """Why it cannot run."""
        reason: str | None = self.description["why_unavailable"]
        return reason

    @property
    def device(self) -> str:
        """Device and architecture, as waivers name them."""
        return f"{self.description.get('device') or ''} {self.description.get('arch') or ''}".strip()

    def units(self, plan: Plan) -> list[Unit]:
        """Every candidate of the backend; one without a kernel for an operator that it has nothing for."""
        if self.reason is not None:
            return []
        wanted = [name for name in UNITS if not plan.operators or name in plan.operators]
        return [unit for name in wanted for unit in self.units_of(name)]

    def units_of(self, name: str) -> list[Unit]:
        """The candidates for one operator."""
        operator, native = UNITS[name], bool(self.description["native"])
        rows = self.kernels_here(name)
        if operator.composed_of and (native or (not rows and self.has_part_of(operator))):
            rows.append({"name": "composition"})
        elif native:
            rows.append({"name": "reference"})
        return [
            Unit(
                backend=self.name,
                operator=name,
                kernel=row["name"],
                device=self.description["device"],
                simulated=self.description.get("simulated", False),
                native=native,
                nondeterministic=row.get("nondeterministic", False),
                batch_invariant=row.get("batch_invariant", False),
                declares=tuple(row.get("declares", ())),
            )
            for row in rows or [{"name": ""}]
        ]

    def kernels_here(self, name: str) -> list[Values]:
        """The kernels that it has for an operator and that can run here."""
        return [dict(row) for row in self.kernels(name) if not row.get("why_unavailable")]

    def has_part_of(self, operator: AnyOperator) -> bool:
        """Whether it has a kernel for anything that a composition is made of, on whatever level."""
        return any(self.kernels_here(part) or self.has_part_of(UNITS[part]) for part in operator.composed_of)

    def kernels(self, name: str) -> list[Values]:
        """The kernels that it has for an operator, whether or not they can run here."""
        rows: list[Values] = self.description["kernels"].get(name, [])
        return rows

    def record(self) -> BackendRecord:
        """For the report."""
        known = self.description
        here = {
            name: tuple(r["name"] for r in rows if not r.get("why_unavailable"))
            for name, rows in known["kernels"].items()
        }
        absent = {r["name"]: r.get("why_unavailable") for rows in known["kernels"].values() for r in rows}
        return BackendRecord(
            name=self.name,
            distribution=known.get("distribution", ""),
            version=known.get("version", ""),
            device=known.get("device", ""),
            arch=known.get("arch"),
            versions=known.get("versions", {}),
            why_unavailable=known["why_unavailable"],
            kernels={name: rows for name, rows in here.items() if rows},
            unavailable_kernels={name: reason for name, reason in absent.items() if reason},
        )


def find(plan: Plan) -> list[Found]:
    """Start a process for every backend asked for, or for all there are, and ask what it is.

    Raises:
        PlanError: for an unknown operator or dtype, or a backend asked for by name that is not there.
    """
    if unknown := [name for name in plan.operators if name not in UNITS]:
        raise PlanError(f"there is no operator {unknown[0]!r}; known: {', '.join(sorted(UNITS))}")
    if unknown := [name for name in plan.dtypes if name not in DTYPES]:
        raise PlanError(f"there is no dtype {unknown[0]!r}; known: {', '.join(DTYPES)}")
    rows = plugins.discover()
    found = []
    for name in plan.backends or tuple(dict.fromkeys(row.name for row in rows)):
        offers = [row for row in rows if name in (row.name, f"{row.distribution}:{row.name}")]
        if not offers:
            raise PlanError(f"there is no backend {name!r}; installed: {', '.join(row.name for row in rows)}")
        if len(offers) > 1 or (offers[0].reason and ":" not in name):
            raise PlanError(f"{offers[0].reason}, or name one as DISTRIBUTION:{name}")
        setup = Setup(
            backend=name, how=plan.how, timeout_s=plan.timeout_s, memory=memory_limit(), environment=plan.environment
        )
        runner = Runner(setup)
        one = Found(name=name, runner=runner, description=described(runner))
        if plan.backends and one.reason is not None:
            runner.close()
            raise PlanError(f"backend {name} ({offers[0].origin}) is not available: {one.reason}")
        one.waivers = waivers_of(one, plan)
        found.append(one)
    return found


def described(runner: Runner) -> Values:
    """What a backend's process says of itself, with every part that the suite reads of the kind that it must have."""
    known = runner.describe()
    kinds = {"kernels": dict, "versions": dict, "modules": dict, "native": bool, "device": str, "waivers": str}
    for name, kind in kinds.items():
        if not isinstance(known.setdefault(name, kind()), kind):
            known |= {name: kind(), "why_unavailable": f"its process describes {name} as what is no {kind.__name__}"}
    return known


def waivers_of(found: Found, plan: Plan) -> tuple[Waiver, ...]:
    """The backend's waivers: of the file named, else those that it brings."""
    if found.reason is not None:
        return ()
    try:
        if plan.waivers:
            return parse(Path(plan.waivers).read_text(), plan.waivers)
        return parse(found.description["waivers"], f"{found.name}'s waivers.toml")
    except (WaiverError, OSError, UnicodeDecodeError) as error:
        raise PlanError(str(error)) from None


def memory_limit() -> int:
    """Four fifths of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 4 // 5


def suite() -> Suite:
    """The suite's version, and its commit where it is a checkout."""
    folder, core = Path(__file__).parent, Path(isolith.__file__).parent
    commit = git(folder, "rev-parse", "HEAD")
    # What a run leaves beside them, its own report too, is no change of the suite.
    status = git(folder, "status", "--porcelain", "--", str(folder), str(core)) if commit else None
    return Suite(version=isolith.__version__, commit=commit, clean=None if status is None else not status)


def git(folder: Path, *words: str) -> str | None:
    """What git says of a folder, or None where there is no git, or no checkout of ours."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        top = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=20, check=True)
        return top.stdout.strip()
    return None


def environment(found: list[Found]) -> Environment:
    """Where the run takes place."""
    modules = {name: text for one in found for name, text in one.description.get("modules", {}).items()}
    settings = config.effective(config.from_environment())
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        cores=os.cpu_count() or 0,
        torch=str(torch.__version__),
        modules=modules,
        more={row.variable: str(row.value) for row in settings if row.source != "default"},
    )


def peak_memory() -> int:
    """The most memory that this process, or one of those it has started and ended, has used, in bytes."""
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
