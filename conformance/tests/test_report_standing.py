import pytest

from isolith_conformance.report import BackendRecord
from isolith_conformance.report_standing import first_to_fix


def test_full_run_of_passes_is_conformant(make_report):
    assert make_report().summary.conformant


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"scope": "quick"}, "the run was quick, not full: not sufficient for conformance"),
        ({"scope": "selected"}, "the run was selected, not full: not sufficient for conformance"),
        ({"complete": False}, "the run did not come to its end"),
        ({"how": "twin"}, "results come from twin, not from hardware"),
        ({"how": "interpreter"}, "results come from interpreter, not from hardware"),
        ({"clean": False}, "the suite has changes that its commit does not have"),
    ],
    ids=str,
)
def test_run_is_not_conformant(make_report, run, says):
    assert make_report(**run).summary.why_not == (says,)


@pytest.mark.parametrize("verdict", ["FAIL", "ERROR", "CRASH", "TIMEOUT", "INFRA"])
def test_one_bad_case_is_not_conformant(make_report, make_case, verdict):
    report = make_report(make_case(), make_case(dtype="float16", verdict=verdict))
    assert report.summary.why_not == (f"1 case ended as {verdict}",)


def test_unclaimed_cases_do_not_hinder(make_report, make_case):
    assert make_report(make_case(), make_case(dtype="float16", verdict="NOT-CLAIMED")).summary.conformant


def test_run_that_claims_nothing_is_not_conformant(make_report, make_case):
    assert make_report(make_case(verdict="NOT-CLAIMED")).summary.why_not == ("no case passed",)


def test_backend_that_claims_nothing_is_not_conformant(make_report, make_case):
    report = make_report(make_case(), make_case(backend="cuda", verdict="NOT-CLAIMED"))
    assert report.summary.why_not == ("no case of the backend cuda passed",)


@pytest.fixture
def waived(make_report, make_case):
    """A report with so many passes, and one waived case of a check."""

    def make(passes, check):
        many = [make_case(sample=f"s{number}") for number in range(passes)]
        return make_report(*many, make_case(check=check, verdict="WAIVED"))

    return make


def test_one_waiver_in_a_hundred_is_conformant(waived):
    assert waived(99, "aliasing").summary.conformant


def test_one_waiver_in_ninety_nine_is_too_many(waived):
    assert waived(98, "aliasing").summary.why_not == ("1 of 99 claimed cases are waived, at most 1% may be",)


def test_no_waiver_excuses_the_core_set(waived):
    says = "1 waived case is of the core set, first cpu.rms_norm/one_row/bfloat16/accuracy"
    assert waived(99, "accuracy").summary.why_not == (says,)


def test_case_from_a_twin_is_not_conformant(make_report, make_case):
    report = make_report(make_case(), make_case(dtype="float16", how="twin"))
    assert report.summary.why_not == ("some cases ran on twin, not on hardware",)


def test_backend_stands_by_itself(make_report, make_case):
    report = make_report(make_case(), make_case(backend="cuda", verdict="FAIL"))
    assert {name: one.conformant for name, one in report.summary.by_backend.items()} == {"cpu": True, "cuda": False}


def test_operators_are_counted_by_backend(make_report, make_case):
    report = make_report(make_case(), make_case(backend="cuda", verdict="FAIL"))
    assert report.summary.by_operator["cuda.rms_norm"]["FAIL"] == 1


def test_unavailable_backend_does_not_hinder(make_report):
    gone = BackendRecord(name="cuda", distribution="", version="", device="cuda", why_unavailable="no CUDA device")
    assert make_report(backends=(gone,)).summary.conformant


def test_crash_is_fixed_before_a_wrong_shape(make_case):
    crash = make_case(sample="z", verdict="CRASH")
    assert first_to_fix([make_case(), make_case(verdict="FAIL", rule="shape"), crash]) == crash


def test_wrong_shape_is_fixed_before_a_large_error(make_case):
    shape = make_case(sample="z", verdict="FAIL", rule="shape")
    assert first_to_fix([make_case(verdict="FAIL", rule="R1"), shape]) == shape


def test_nothing_is_to_fix_where_all_passed(make_case):
    assert first_to_fix([make_case(), make_case(verdict="WAIVED")]) is None
