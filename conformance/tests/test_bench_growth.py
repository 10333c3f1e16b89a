"""The exponents of a benchmark's times and bytes."""

import pytest
from benches import a_bench, a_row

from isolith_conformance.bench.growth import growths
from isolith_conformance.bench.page import page
from isolith_conformance.bench.record import Timing
from isolith_conformance.bench.text import table


def row(context=4096, tokens=1, experts=256, seconds=1e-3, **more):
    time = Timing(median=seconds, lower=seconds, upper=seconds, repeats=3)
    return a_row(context=context, tokens=tokens, experts=experts, time=time, **more)


def test_time_and_bytes_that_grow_by_a_power_have_it_for_an_exponent():
    contexts = (4096, 65536, 1048576)
    rows = [
        row(
            context, seconds=1e-6 * context**0.5, roofline_s=1e-9 * context, extra_bytes=context * 1024, bytes_written=8
        )
        for context in contexts
    ]
    (found,) = growths(a_bench(*rows))
    assert (found.axis, found.low, found.high) == ("context", 4096, 1048576)
    assert [found.time, found.least, found.memory, found.written] == pytest.approx([0.5, 1.0, 1.0, 0.0])


def test_each_axis_stands_by_itself_with_the_others_at_their_largest():
    rows = [
        row(tokens=tokens, experts=experts, seconds=tokens * experts**2 * 1e-6)
        for tokens in (1, 4)
        for experts in (8, 64)
    ]
    found = {each.axis: each.time for each in growths(a_bench(*rows))}
    assert found == pytest.approx({"tokens": 1.0, "experts": 2.0})


def test_memory_that_is_too_little_has_no_exponent():
    (found,) = growths(a_bench(row(4096, extra_bytes=4096), row(8192, extra_bytes=2**22)))
    assert found.memory is None


def test_one_value_of_an_axis_has_none():
    assert list(growths(a_bench(row()))) == []
    assert "Exponents" not in table(a_bench(row()))


def test_table_and_page_show_the_exponents():
    bench = a_bench(row(4096), row(8192, seconds=4e-3))
    assert "rms_norm  hidden  context  4096  8192  2.00" in table(bench)
    assert "<td>2.00</td>" in page(bench)


def test_a_row_that_has_raised_is_left_out():
    bench = a_bench(row(4096), row(8192), a_row(context=16384, time=None, percent=None, state="ERROR", ratio=None))
    (found,) = growths(bench)
    assert found.high == 8192
