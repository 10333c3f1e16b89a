"""The command line: what a person types, what they read, and what the exit code says."""

import subprocess
import sys

import pytest
from distributions import RIGHT_RMS_NORM

from isolith_conformance import report

WRONG = RIGHT_RMS_NORM.replace("+ eps", "+ 2 * eps")
REFUSED = """
@implements(isolith.rms_norm, why_not=lambda x, **_: "x has no rows; needs one" if x.numel() == 0 else None)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return _rms_norm(x, weight, eps, round_before_weight)
""" + RIGHT_RMS_NORM.replace("@implements(isolith.rms_norm)\ndef rms_norm", "def _rms_norm")


@pytest.fixture
def suite(tmp_path):
    """Run the command line in an empty folder."""

    def run(*words):
        command = [sys.executable, "-m", "isolith_conformance", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


QUICK = ("--quick", "--op", "rms_norm", "--seed", "5")


def test_a_right_kernel_passes_with_exit_code_0(suite, plugin):
    plugin("good", RIGHT_RMS_NORM)
    run = suite(*QUICK, "--backend", "good")
    assert run.returncode == 0, run.stdout
    assert "not sufficient for conformance" in run.stdout.lower()


def test_a_wrong_kernel_fails_and_the_summary_says_what_to_fix_first(suite, plugin, tmp_path):
    plugin("bad", WRONG)
    run = suite(*QUICK, "--backend", "bad", "--report", "report.json", "--page", "page.html")
    assert run.returncode == 1
    assert "Fix first: bad/rms_norm/rms_norm/" in run.stdout
    made = report.read(tmp_path / "report.json")
    failed = [case for case in made.cases if case.verdict == "FAIL" and case.check == "accuracy"]
    assert failed
    assert failed[0].statistics["r1"] > failed[0].limits["r1"]
    again = suite("reproduce", failed[0].id, "--seed", "5", "--backend", "bad")
    assert again.returncode == 1
    assert failed[0].problem in again.stdout
    assert "1 failed" in again.stdout


def test_a_refused_call_is_not_claimed_and_no_failure(suite, plugin, tmp_path):
    plugin("picky", REFUSED)
    run = suite("--op", "rms_norm", "--backend", "picky", "-k", "accuracy", "--report", "report.json")
    assert run.returncode == 0, run.stdout
    refused = [case for case in report.read(tmp_path / "report.json").cases if case.verdict == "NOT-CLAIMED"]
    assert {case.problem for case in refused if case.kernel} == {"picky.rms_norm: x has no rows; needs one"}


def test_operators_that_a_backend_has_nothing_for_are_listed_as_not_claimed(suite, plugin, tmp_path):
    plugin("good", RIGHT_RMS_NORM)
    suite("--quick", "--op", "rope", "--backend", "good", "--report", "report.json")
    (case,) = report.read(tmp_path / "report.json").cases
    assert (case.check, case.verdict) == ("unclaimed", "NOT-CLAIMED")


TF32 = """
from isolith.ops.residual.hc_pre import multiplied_in_tf32

@implements(isolith.hc_pre, declares={})
def hc_pre(streams, fn, scale, base, sinkhorn_iters=20, norm_eps=1e-6, hc_eps=1e-6):
    return multiplied_in_tf32(streams, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps)
"""


@pytest.mark.parametrize(("declares", "code"), [(("tf32",), 0), ((), 1)])
def test_numerics_that_an_operator_allows_are_right_where_they_are_declared(suite, plugin, declares, code):
    plugin("rounding", TF32.format(declares))
    run = suite("--quick", "--op", "hc_pre", "--dtype", "bfloat16", "-k", "accuracy", "--backend", "rounding")
    assert run.returncode == code, run.stdout


SWIGLU = """
@implements(isolith.swiglu)
def swiglu(x, limit=0.0, row_weight=None):
    return isolith.swiglu.reference(x, limit, row_weight)
"""


def test_a_composition_of_parts_that_a_backend_lacks_is_not_claimed(suite, plugin, tmp_path):
    plugin("good", SWIGLU)
    run = suite("--quick", "--op", "fused_moe", "-k", "claim", "--backend", "good", "--report", "report.json")
    assert run.returncode == 0, run.stdout
    cases = report.read(tmp_path / "report.json").cases
    assert {(case.check, case.verdict) for case in cases} == {
        ("claims", "NOT-CLAIMED"),
        ("claims something", "NOT-CLAIMED"),
    }


TWIN = (
    """
made = backend
def backend(): return made(device_type="sim", twin="sim_twin")
"""
    + SWIGLU
)


@pytest.mark.slow
def test_a_layer_may_have_references_on_the_host_for_the_rest(suite, plugin, tmp_path):
    (tmp_path / "sim_twin.py").write_text("from isolith.simulated import simulate\nsimulate('sim', ['aten::sort'])\n")
    plugin("toy", TWIN)
    words = ("--op", "decoder_block", "-k", "executed", "--backend", "toy", "--how", "twin", "--report", "report.json")
    run = suite("--quick", *words)
    assert run.returncode == 0, run.stdout
    (case,) = report.read(tmp_path / "report.json").cases
    assert {"swiglu toy.swiglu", "moe_permute cpu with copies"} <= set(case.executed)


def test_a_layer_is_of_what_a_backend_has_and_of_references_for_the_rest(suite, plugin, tmp_path):
    plugin("good", RIGHT_RMS_NORM)
    run = suite("--quick", "--op", "swa_layer", "-k", "accuracy", "--backend", "good", "--report", "report.json")
    assert run.returncode == 0, run.stdout
    for case in report.read(tmp_path / "report.json").cases:
        assert {"rms_norm good.rms_norm", "rope reference"} <= set(case.executed)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--op", "rms_nrom"), "there is no operator 'rms_nrom'"),
        (("--backend", "nobody"), "there is no backend 'nobody'"),
        pytest.param(("--quick", "--full"), "--quick and --full exclude each other", marks=pytest.mark.slow),
        pytest.param(("--profile", "lenient"), "invalid choice: 'lenient'", marks=pytest.mark.slow),
        pytest.param(("--dtype", "float17"), "there is no dtype 'float17'", marks=pytest.mark.slow),
        (("--waivers", "no.toml"), "no.toml"),
        (("judge",), "there is no command 'judge'"),
        (("reproduce",), "reproduce needs the id of a case"),
        (("reproduce", "cpu/rms_norm/reference/none/float32/accuracy"), "there is no case"),
    ],
    ids=str,
)
def test_a_run_that_cannot_start_says_why_with_exit_code_2(suite, words, says):
    run = suite(*words)
    assert says in run.stdout + run.stderr
    assert run.returncode == 2


@pytest.mark.slow
def test_two_runs_of_one_seed_give_the_same_report(suite, tmp_path):
    for name in ("a.json", "b.json"):
        suite("--quick", "--op", "swiglu", "--seed", "7", "--backend", "cpu", "--report", name)
    made = [report.timeless(report.read(tmp_path / name)) for name in ("a.json", "b.json")]
    assert made[0].cases == made[1].cases


@pytest.mark.slow
def test_xdist_runs_the_same_cases(suite, tmp_path):
    for name, words in (("a.json", ()), ("b.json", ("-n", "2"))):
        suite("--quick", "--op", "swiglu", "--seed", "7", "--backend", "cpu", "--report", name, *words)
    made = [report.timeless(report.read(tmp_path / name)) for name in ("a.json", "b.json")]
    assert made[0].cases == made[1].cases


def test_one_line_in_a_vendor_s_repository_is_the_whole_suite(plugin, tmp_path):
    plugin("good", RIGHT_RMS_NORM)
    (tmp_path / "test_conformance.py").write_text("from isolith_conformance.suite import *\n")
    words = ["-m", "pytest", "-q", "-p", "isolith_conformance.plugin", "--backend", "good", *QUICK, "-k", "accuracy"]
    run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert "CONFORMANT" in run.stdout


WAIVER = """
[[waiver]]
id = "eps"
cases = "{cases}"
reason = "known bug"
link = "https://example.org/1"
approver = "A. Engineer"
date = {date}
expires = {expires}
observed = "R1 is 2"
"""


@pytest.mark.parametrize(
    ("source", "cases", "days", "code"),
    [
        (WRONG, "bad/rms_norm/*", 30, 0),
        (WRONG, "bad/rms_norm/*", -1, 1),
        pytest.param(WRONG, "bad/rope/*", 30, 1, marks=pytest.mark.slow),
        (RIGHT_RMS_NORM, "bad/rms_norm/*", 30, 1),
    ],
    ids=["excused", "expired", "another_case", "passes"],
)
def test_a_waiver_excuses_failures_alone_and_not_for_ever(suite, plugin, tmp_path, source, cases, days, code):
    import datetime

    today = datetime.date.today()
    made, ends = today - datetime.timedelta(30), today + datetime.timedelta(days)
    (tmp_path / "waivers.toml").write_text(WAIVER.format(cases=cases, date=made, expires=ends))
    plugin("bad", source)
    run = suite("--op", "rms_norm", "--seed", "5", "--backend", "bad", "-k", "accuracy and eps_dominates")
    assert run.returncode == code, run.stdout


PACK = """
from isolith import KernelPack

@hookimpl
def isolith_kernels():
    return KernelPack(name=NAME, api_version=1, kernels=(__name__,))
"""


@pytest.mark.parametrize(("source", "code"), [(RIGHT_RMS_NORM, 0), (RIGHT_RMS_NORM.replace("+ eps", "- eps"), 1)])
def test_a_kernel_pack_is_checked_by_its_own_name_on_the_backend_that_it_adds_to(suite, plugin, tmp_path, source, code):
    plugin("cpu.fast", source, hook=PACK)
    run = suite(
        *("--quick", "--op", "rms_norm", "--op", "swiglu", "-k", "accuracy or claim"),
        *("--backend", "cpu.fast", "--report", "report.json"),
    )
    assert run.returncode == code, run.stdout
    cases = report.read(tmp_path / "report.json").cases
    assert {case.kernel for case in cases if case.operator == "rms_norm"} == {"cpu.fast.rms_norm"}
    assert {case.verdict for case in cases if case.operator == "swiglu"} == {"NOT-CLAIMED"}
    assert {case.executed for case in cases if case.verdict == "PASS"} == {("rms_norm cpu.fast.rms_norm",)}
