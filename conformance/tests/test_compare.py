import json

import pytest

from isolith_conformance.compare import compare, compare_command, comparison_text


def test_report_equals_itself(make_report):
    assert compare(make_report(), make_report()).same


def test_changed_verdict_is_found(make_report, make_case):
    found = compare(make_report(make_case()), make_report(make_case(verdict="FAIL"))).changed
    assert [(pair.a.verdict, pair.b.verdict) for pair in found] == [("PASS", "FAIL")]


def test_cases_of_two_chips_are_paired(make_report, make_case):
    b = make_report(make_case(backend="cuda", kernel="cuda.rms_norm_fused"))
    assert compare(make_report(), b).pairs == 1


def test_two_kernels_of_one_backend_are_not_mixed_up(make_report, make_case):
    slow, fast = make_case(kernel="cpu.slow", id="1"), make_case(kernel="cpu.fast", id="2", verdict="FAIL")
    assert compare(make_report(slow, fast), make_report(fast, slow)).same


def test_cases_of_one_report_alone_are_listed(make_report, make_case):
    found = compare(make_report(make_case(), make_case(sample="x")), make_report(make_case(), make_case(sample="y")))
    assert (found.only_a, found.only_b) == (
        ("cpu.rms_norm/x/bfloat16/accuracy",),
        ("cpu.rms_norm/y/bfloat16/accuracy",),
    )


def test_ratio_is_of_b_to_a(make_report, make_case):
    pair = compare(
        make_report(make_case(statistics={"r1": 0.5})), make_report(make_case(statistics={"r1": 1.0}))
    ).moved[0]
    assert pair.moved[0].ratio == 2


@pytest.mark.parametrize(("a", "b", "ratio"), [(0.0, 1.0, "inf"), (1.0, 0.0, "0.0"), (1.0, float("inf"), "inf")])
def test_ratio_to_nothing_is_infinite(make_report, make_case, a, b, ratio):
    pair = compare(make_report(make_case(statistics={"r1": a})), make_report(make_case(statistics={"r1": b}))).moved[0]
    assert str(pair.moved[0].ratio) == ratio


def test_two_times_no_number_has_not_moved(make_report, make_case):
    lost = make_report(make_case(statistics={"r1": float("nan")}))
    assert compare(lost, lost).moved == ()


def test_largest_change_comes_first(make_report, make_case):
    a = make_report(*(make_case(sample=s, statistics={"r1": 1.0}) for s in "xyz"))
    b = make_report(*(make_case(sample=s, statistics={"r1": r}) for s, r in zip("xyz", (1.1, 0.2, 2.0), strict=True)))
    assert [pair.a.id.split("/")[1] for pair in compare(a, b).moved] == ["y", "z", "x"]


def test_results_are_compared_to_the_bit(make_report, make_case):
    a, b = make_report(make_case(result_hash="1" * 64)), make_report(make_case(result_hash="2" * 64))
    assert compare(a, b).results == {"equal": 0, "different": 1, "unknown": 0}


def test_results_of_different_inputs_are_not_compared(make_report, make_case):
    a = make_report(make_case(result_hash="1" * 64))
    b = make_report(make_case(result_hash="1" * 64, input_hash="b" * 64))
    assert compare(a, b).results == {"equal": 0, "different": 0, "unknown": 1}


def test_text_says_that_inputs_are_equal(make_report):
    assert "Their inputs are the same bytes." in comparison_text(compare(make_report(), make_report()))


def test_text_says_that_inputs_differ(make_report, make_case):
    text = comparison_text(compare(make_report(), make_report(make_case(input_hash="b" * 64))))
    assert "across different inputs only verdicts and sizes of errors compare" in text


def test_text_tells_both_problems(make_report, make_case):
    b = make_report(make_case(verdict="FAIL", problem="R1 is 2"))
    assert "    b: R1 is 2" in comparison_text(compare(make_report(), b)).splitlines()


def test_text_steers_no_terminal(make_report, make_case):
    evil = make_case(verdict="FAIL", problem="\x1b[2J", id="\x1b[1m", statistics={"\x1b": 3.0})
    text = comparison_text(compare(make_report(evil), make_report(make_case(verdict="FAIL"))))
    assert "\x1b" not in text


@pytest.fixture
def files(make_report, make_case, tmp_path):
    make_report().write(tmp_path / "a.json")
    make_report(make_case(verdict="FAIL", problem="R1 is 2")).write(tmp_path / "b.json")
    return tmp_path / "a.json", tmp_path / "b.json"


def test_command_ends_with_0_where_nothing_changed(files):
    assert compare_command(files[0], files[0]) == 0


def test_command_ends_with_1_where_a_verdict_changed(files):
    assert compare_command(*files) == 1


def test_command_ends_with_2_where_a_report_is_missing(files, tmp_path):
    assert compare_command(files[0], tmp_path / "none") == 2


def test_json_has_the_changed_verdict(files, capsys):
    compare_command(*files, as_json=True)
    assert json.loads(capsys.readouterr().out)["changed"][0]["b"]["problem"] == "R1 is 2"
