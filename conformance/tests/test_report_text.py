from dataclasses import replace

import pytest

from isolith_conformance.report import BackendRecord
from isolith_conformance.report_text import inert, reproduce_command, summary_text


def test_line_of_an_operator_counts_every_outcome(make_report, make_case):
    report = make_report(make_case(), make_case(dtype="float16", verdict="FAIL"))
    assert " ! rms_norm  1 passed, 1 FAIL" in summary_text(report).splitlines()


def test_operator_without_failures_has_no_sign(make_report):
    assert "   rms_norm  1 passed" in summary_text(make_report()).splitlines()


def test_first_failure_is_told_with_its_command(make_report, make_case):
    failed = make_case(verdict="FAIL", rule="R1", problem="R1 is 2.1, at most 1.4")
    assert summary_text(make_report(failed)).splitlines()[4:7] == [
        "   Fix first: cpu.rms_norm/one_row/bfloat16/accuracy",
        "     FAIL: R1 is 2.1, at most 1.4",
        "     python -m isolith_conformance reproduce cpu.rms_norm/one_row/bfloat16/accuracy --seed 7 --backend cpu",
    ]


def test_traceback_is_not_told_beyond_its_first_line(make_report, make_case):
    failed = make_case(verdict="ERROR", problem="KeyError: 'x'\nTraceback (most recent call last):")
    assert "     ERROR: KeyError: 'x'" in summary_text(make_report(failed)).splitlines()


def test_command_quotes_what_a_shell_would_run(make_case):
    assert "'a; rm -rf ~'" in reproduce_command(make_case(id="a; rm -rf ~"))


def test_command_says_how_the_case_ran(make_case):
    assert reproduce_command(make_case(how="twin")).endswith("--how twin")


def test_conformant_run_ends_with_the_mark(make_report):
    assert summary_text(make_report()).splitlines()[-1] == "CONFORMANT (standard)"


def test_quick_run_says_not_sufficient(make_report):
    assert "not sufficient for conformance" in summary_text(make_report(scope="quick"))


def test_unavailable_backend_is_told_with_its_reason(make_report):
    gone = BackendRecord(name="cuda", distribution="", version="", device="cuda", why_unavailable="no CUDA device")
    assert "Backend cuda: not run: no CUDA device" in summary_text(make_report(backends=(gone,)))


def test_kernel_that_cannot_run_here_is_told_with_its_reason(make_report):
    report = make_report()
    here = replace(report.backends[0], unavailable_kernels={"cpu.fast": "library is not installed"})
    assert "not here: cpu.fast: library is not installed" in summary_text(make_report(backends=(here,)))


def test_conformant_backend_is_told_beside_a_failing_one(make_report, make_case):
    text = summary_text(make_report(make_case(), make_case(backend="cuda", verdict="CRASH")))
    assert "  cpu by itself is conformant (standard)." in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\nc", "a\\x0db\\x0ac"),
        ("\u202eabc", "\\u202eabc"),
        ("\u2066", "\\u2066"),
        ("\x9b", "\\x9b"),
        ("\u2028", "\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("größe ≤ 1, 行", "größe ≤ 1, 行"),
    ],
    ids=ascii,
)
def test_text_that_would_steer_a_terminal_is_spelled(text, shown):
    assert inert(text) == shown


@pytest.mark.parametrize("place", ["id", "operator", "backend", "problem"])
def test_no_field_of_a_case_steers_a_terminal(make_report, make_case, place):
    evil = "\x1b]0;owned\x07\r\u202e"
    case = replace(make_case(verdict="FAIL", problem="no"), **{place: evil})
    assert not set(summary_text(make_report(case))) & set("\x1b\x07\r\u202e")
