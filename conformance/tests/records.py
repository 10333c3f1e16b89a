"""Records that tests of reports are made of."""

import pytest

from isolith_conformance.report import BackendRecord, Case, Environment, Report, Run, Suite

PASSED = {
    "check": "accuracy",
    "backend": "cpu",
    "operator": "rms_norm",
    "family": "norm",
    "kernel": "cpu.rms_norm",
    "sample": "one_row",
    "dtype": "bfloat16",
    "verdict": "PASS",
    "seed": 7,
    "input_hash": "a" * 64,
    "statistics": {"r1": 1.0, "r2": 1.2, "r3": 2.0},
    "limits": {"r1": 1.4, "r2": 2.0, "r3": 3.0},
    "seconds": 0.25,
    "executed": ("cpu.rms_norm",),
}
RUN = {
    "profile": "standard",
    "how": "hardware",
    "seed": 7,
    "scope": "full",
    "started": "2026-01-02T03:04:05Z",
    "seconds": 12.5,
    "command": "python -m isolith_conformance",
    "complete": True,
    "peak_memory_bytes": 123456,
}


@pytest.fixture
def make_case():
    """A passed case with what the test changes; its id follows."""

    def make(**changes):
        values = PASSED | changes
        parts = (f"{values['backend']}.{values['operator']}", values["sample"], values["dtype"], values["check"])
        return Case(**{"id": "/".join(parts)} | values)

    return make


@pytest.fixture
def make_report(make_case):
    """A report of the cases, or of one passed case, with what the test changes in its run."""

    def make(*cases, backends=None, waivers=(), clean=True, **run):
        cpu = BackendRecord(name="cpu", distribution="isolith", version="0.1.0", device="cpu", arch="x86_64")
        return Report(
            suite=Suite(version="0.1.0", commit="0123456789abcdef", clean=clean),
            run=Run(**RUN | run),
            environment=Environment(python="3.11", platform="linux", processor="x86", cores=2, torch="2.13"),
            backends=(cpu,) if backends is None else backends,
            cases=cases or (make_case(),),
            waivers=waivers,
        )

    return make
