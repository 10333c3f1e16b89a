from xml.etree import ElementTree

import pytest
from benches import a_bench, a_row

from isolith_conformance.bench.page import page
from isolith_conformance.bench.picture import picture
from isolith_conformance.bench.record import PeerTime
from isolith_conformance.bench.text import number, seconds, table

EVIL = "<script>alert(1)</script>\x1b[2J"


def evil():
    peer = PeerTime(name=EVIL, computes=EVIL, time=None, ratio=None, why_not=EVIL)
    return a_bench(a_row(label=EVIL, kernel=EVIL, note=EVIL, state="WRONG", problem=EVIL, peers=(peer,)))


def words(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_page_escapes_what_a_record_holds():
    assert "<script>" not in page(evil())


def test_page_loads_nothing():
    assert "default-src &#39;none&#39;" in page(a_bench())


def test_page_says_that_every_result_is_right():
    assert "EVERY RESULT IS RIGHT" in page(a_bench())


def test_page_says_what_is_wrong():
    assert "R1 is 7" in page(a_bench(a_row(state="WRONG", problem="R1 is 7")))


def test_picture_is_xml_whatever_a_record_holds():
    assert not [word for word in words(picture(evil())) if "\x1b" in (word or "")]


def test_picture_has_the_limits():
    assert {"reads 10 GB/s", "bfloat16 100", "float32 50"} <= set(words(picture(a_bench())))


def test_picture_has_no_growth_for_one_context():
    assert "Median time by context" not in words(picture(a_bench()))


def test_picture_has_growth_for_two_contexts():
    assert "Median time by context" in words(picture(a_bench(a_row(), a_row(context=8192))))


def test_wrong_row_is_drawn_as_wrong():
    assert '<circle class="wrong"' in picture(a_bench(a_row(state="WRONG"))).partition("by compute")[0]


def test_row_without_flops_is_named_below_the_picture():
    found = picture(a_bench(a_row(), a_row(operator="moe_permute", flops=0)))
    assert "Without FLOPs, not in the roofline: 2" in words(found)


def test_nothing_measured_is_drawn_too():
    assert "Roofline" in picture(a_bench(a_row(time=None, state="ERROR", percent=None, ratio=None)))


def test_table_steers_no_terminal():
    assert "\x1b" not in table(evil())


def test_table_says_what_is_wrong():
    assert "WRONG: rms_norm (hidden): R1 is 7" in table(a_bench(a_row(state="WRONG", problem="R1 is 7")))


def test_table_says_what_a_peer_computes():
    assert "torch, for rms_norm: the same." in table(a_bench())


def test_table_says_which_format_has_no_rate():
    assert "float8 counts with bfloat16's rate: no product" in table(a_bench())


def test_step_down_is_said():
    assert "reference (step down)" in table(a_bench(a_row(kernel="reference", fallback=True)))


@pytest.mark.parametrize(("value", "says"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 us"), (7e-8, "70 ns")])
def test_times_have_a_unit(value, says):
    assert seconds(value) == says


@pytest.mark.parametrize(
    ("value", "says"), [(None, "–"), (0.0, "0"), (12345.6, "12346"), (1.234, "1.23"), (1e-5, "1.0e-05")]
)
def test_figures_have_three_digits(value, says):
    assert number(value) == says
