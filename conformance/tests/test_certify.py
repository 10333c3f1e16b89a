"""Certificates of a run."""

import json
import os
import subprocess
import sys
from typing import cast

import pytest
from distributions import RIGHT_RMS_NORM

from isolith_conformance.certify import certificates_of
from isolith_conformance.plan import Found
from isolith_conformance.runner import Runner

FACTS = {"isolith": "0.1", "device": "a chip", "arch": "9.0", "versions": {"driver": "5"}}
ROW = {"name": "cpu.rms_norm", "source": "s" * 64, "contract": "c" * 64}


@pytest.fixture
def certified(make_report, make_case):
    """The certificates of a run of these cases, each (sample, what differs from a passed case)."""

    def make(*cases, why_unavailable=None, **run):
        description = {"why_unavailable": why_unavailable, "kernels": {"rms_norm": [ROW]}, "facts": FACTS}
        found = Found(name="cpu", runner=cast(Runner, None), description=description)
        report = make_report(*(make_case(sample=f"s{n}", **case) for n, case in enumerate(cases)), **run)
        return report, list(certificates_of(report, [found]))

    return make


def test_a_kernel_that_passed_everything_has_one(certified):
    report, (one,) = certified({}, {"dtype": "float32"}, {"dtype": "float16", "check": "layout"})
    assert (one.kernel, one.operator, one.passed) == ("cpu.rms_norm", "rms_norm", 3)
    assert one.dtypes == ("bfloat16", "float32")  # of the checks that look at values
    assert (one.device, one.arch, one.versions) == ("a chip", "9.0", {"driver": "5"})
    assert (one.source, one.contract, one.report) == ("s" * 64, "c" * 64, report.sha256)
    assert (one.how, one.profile) == ("hardware", "standard")


@pytest.mark.parametrize("verdict", ["FAIL", "ERROR", "CRASH", "TIMEOUT", "WAIVED", "INFRA"])
def test_one_case_that_did_not_pass_is_enough_for_none(certified, verdict):
    assert certified({}, {"verdict": verdict, "problem": "x"})[1] == []


def test_what_is_not_claimed_is_left_out(certified):
    assert certified({}, {"verdict": "NOT-CLAIMED", "dtype": "float16"})[1][0].dtypes == ("bfloat16",)
    assert certified({"verdict": "NOT-CLAIMED"})[1] == []


def test_cases_of_another_kernel_do_not_count(certified):
    assert certified({"kernel": "reference"})[1] == []
    assert len(certified({}, {"kernel": "cpu.other", "verdict": "FAIL", "problem": "x"})[1]) == 1


def test_a_backend_that_did_not_run_has_none(certified):
    assert certified({}, why_unavailable="no device")[1] == []


CODE = """
import json, torch, isolith
x, weight = torch.ones(2, 8), torch.ones(8)
with isolith.override(backend="good", fallback="allow"):
    explanation = isolith.explain(isolith.rms_norm, x, weight)
print(json.dumps([explanation.chosen.name, explanation.candidates[0].why_not]))
"""


def chosen(environment):
    """What takes a call in a new process that asks for certificates."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True, timeout=100
    )
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_a_run_certifies_and_selection_obeys(plugin, tmp_path):
    folder = plugin("good", RIGHT_RMS_NORM)
    environment = {**os.environ, "ISOLITH_REQUIRE": "certified", "XDG_STATE_HOME": str(tmp_path / "state")}
    assert chosen(environment)[0] == "reference"
    command = [sys.executable, "-m", "isolith_conformance", "--backend", "good", "--op", "rms_norm"]
    for more in (["--quick"], ["--dtype", "float32"], ["-k", "accuracy"], ["--no-certificates"]):
        ran = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
        assert chosen(environment)[0] == "reference"
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Certificates of 1 kernels:" in ran.stdout
    assert chosen(environment) == ["good.rms_norm", None]
    source = folder / "plugin_good.py"
    source.write_text(source.read_text() + "\n# changed\n")
    name, reason = chosen(environment)
    assert name == "reference"
    assert "another state: the kernel's source was " in reason
