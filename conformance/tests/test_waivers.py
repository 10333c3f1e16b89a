"""A waiver excuses what it names, for a while, and nothing else."""

import datetime

import pytest

from isolith_conformance.waivers import WaiverError, parse

TEXT = """
[[waiver]]
id = "rope-far"
cases = "acme/rope/*/far/*"
reason = "known bug"
link = "https://example.org/1"
approver = "A. Engineer"
date = 2026-11-01
expires = 2027-02-01
observed = "R3 is 6.1"
"""


def test_a_waiver_is_read():
    (waiver,) = parse(TEXT, "file")
    assert (waiver.id, waiver.expires) == ("rope-far", datetime.date(2027, 2, 1))


@pytest.mark.parametrize(
    ("case", "excused"),
    [("acme/rope/rope/far/float32/accuracy", True), ("acme/rope/rope/near/float32/accuracy", False)],
)
def test_a_waiver_excuses_the_cases_that_it_names(case, excused):
    assert parse(TEXT, "file")[0].excuses(case, "acme 1.0") == excused


def test_a_waiver_for_a_device_excuses_no_other():
    (waiver,) = parse(TEXT + 'device = "acme 1.*"', "file")
    assert [waiver.excuses("acme/rope/x/far/y", device) for device in ("acme 1.5", "acme 2.0")] == [True, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("2027-02-01", "2027-06-01"), "at most 180 days"),
        (("2027-02-01", "2026-10-01"), "at most 180 days"),
        (('reason = "known bug"', 'reason = "tired"'), "reason must be one of"),
        (('link = "https://example.org/1"', ""), "a known bug has a link"),
        (('approver = "A. Engineer"', ""), "lacks approver"),
        (('observed = "R3 is 6.1"', 'observed = "R3 is 6.1"\nlimit = 9'), "does not take limit"),
        (('"acme/rope/*/far/*"', '"*"'), "cases must name something"),
        (('"acme/rope/*/far/*"', "7"), "cases must be a str"),
        (("[[waiver]]", "[[waivers]]"), "a waivers file is a list of"),
        (("[[waiver]]", "[[waiver"), "file: "),
    ],
)
def test_a_bad_waiver_is_refused(change, says):
    with pytest.raises(WaiverError, match=says):
        parse(TEXT.replace(*change), "file")


def test_two_waivers_of_one_id_are_refused():
    with pytest.raises(WaiverError, match="two waivers have one id"):
        parse(TEXT + TEXT, "file")
