"""Every kernel of the backend passes the suite in Triton's interpreter; CI takes one check of a quick run."""

import json
import subprocess
import sys

import pytest

from isolith import OPERATORS


def passed(folder, *options):
    """Operators with a case that passed; nothing else may have happened but refusals."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "isolith_conformance", "--backend", "cuda", "--how", "interpreter"]
    done = subprocess.run([*command, *options, "--report", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(report.read_text())["cases"]
    assert {case["verdict"] for case in cases} <= {"PASS", "NOT-CLAIMED"}
    return {case["operator"] for case in cases if case["verdict"] == "PASS"}


def test_every_operator_is_accurate_in_the_interpreter(tmp_path):
    assert passed(tmp_path, "--quick", "--seed", "5", "-k", "accuracy") >= set(OPERATORS)


@pytest.mark.slow
def test_every_operator_passes_the_suite_in_the_interpreter(tmp_path):
    assert passed(tmp_path, "--seed", "5") >= set(OPERATORS)
