import json
from dataclasses import replace
from importlib.resources import files

import pytest
from benches import TIME, a_bench, a_row

from isolith_conformance.bench.compare import compare, compare_command
from isolith_conformance.bench.record import Bench, BenchError, read, write
from isolith_conformance.report_json import schema

HEAD = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A record of the Isolith benchmark, version 2",
}


@pytest.fixture
def written(tmp_path):
    write(a_bench(a_row(), a_row(context=8192)), tmp_path / "a.json")
    return tmp_path / "a.json"


def test_record_comes_back_as_it_was_written(written):
    assert read(written) == a_bench(a_row(), a_row(context=8192))


def test_shipped_schema_is_that_of_the_record():
    shipped = json.loads(files("isolith_conformance.bench").joinpath("bench.schema.json").read_text())
    assert shipped == json.loads(json.dumps(HEAD | schema(Bench)))


def test_row_has_a_line_of_its_own(written):
    assert sum(line.startswith('{"bound"') for line in written.read_text().splitlines()) == 2


def tampered(path, change):
    made = json.loads(path.read_text())
    change(made)
    path.write_text(json.dumps(made))
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda made: made.update(schema=1), "schema must be one of 2", id="version"),
        pytest.param(lambda made: made.update(kind="report"), "kind must be one of bench", id="kind"),
        pytest.param(lambda made: made.pop("limits"), "lacks 'limits'", id="missing"),
        pytest.param(lambda made: made.update(more=1), "unknown key, 'more'", id="unknown"),
        pytest.param(lambda made: made["rows"][0].update(percent="fast"), "must be a finite number", id="type"),
        pytest.param(lambda made: made["rows"][0].update(percent=99.0), "has the hash", id="hash"),
        pytest.param(lambda made: made["rows"][0]["time"].update(median=-1.0), "a time that is none", id="time"),
        pytest.param(lambda made: made["rows"][0].update(time=None), "the state RIGHT, and a time or none", id="state"),
        pytest.param(lambda made: made["rows"][1].update(context=4096), "two rows are of one call", id="twice"),
        pytest.param(lambda made: made["rows"][0].update(flops=-1), "a cost below 0", id="cost"),
    ],
)
def test_changed_file_is_refused(written, change, says):
    with pytest.raises(BenchError, match=says):
        read(tampered(written, change))


def test_cut_file_is_refused(written):
    written.write_text(written.read_text()[:-30])
    with pytest.raises(BenchError, match="this is not JSON"):
        read(written)


def test_row_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(BenchError, match="a time that is none"):
        write(a_bench(a_row(time=replace(TIME, median=0.0))), tmp_path / "a.json")


def test_wrong_row_is_not_all_right():
    assert not a_bench(a_row(), a_row(context=1, state="WRONG")).all_right


def test_unfinished_run_is_not_all_right():
    assert not a_bench(complete=False).all_right


def faster():
    return a_row(time=replace(TIME, median=1e-3), percent=100.0, kernel="cuda.rms_norm")


def test_pair_says_how_many_times_as_fast_the_second_is():
    assert compare(a_bench(), a_bench(faster())).pairs[0].faster == 2.0


def test_pair_compares_percents_of_each_machines_limit():
    assert compare(a_bench(), a_bench(faster())).pairs[0].gain == 2.0


def test_calls_of_other_contexts_are_no_pair():
    found = compare(a_bench(), a_bench(a_row(context=1)))
    assert (found.only_a, found.only_b) == (
        ("rms_norm (hidden, context 4096, 1 tokens)",),
        ("rms_norm (hidden, context 1, 1 tokens)",),
    )


def test_fewer_experts_are_another_call():
    assert compare(a_bench(), a_bench(a_row(note="8 of 256 experts"))).pairs == ()


def test_other_verdict_is_a_change():
    assert compare(a_bench(), a_bench(a_row(state="WRONG"))).changed == 1


def test_comparison_prints_both_limits(written, capsys):
    compare_command(written, written)
    assert capsys.readouterr().out.count("reads 10.0 GB/s, copies 8.0 GB/s") == 2


def test_comparison_with_itself_ends_with_0(written):
    assert compare_command(written, written) == 0


def test_comparison_with_other_rows_ends_with_1(written, tmp_path):
    write(a_bench(), tmp_path / "b.json")
    assert compare_command(written, tmp_path / "b.json") == 1


def test_comparison_with_nothing_ends_with_2(written, tmp_path):
    assert compare_command(written, tmp_path / "none.json") == 2


def test_comparison_as_json_has_the_ratio(written, capsys):
    compare_command(written, written, as_json=True)
    assert json.loads(capsys.readouterr().out)["pairs"][0]["faster"] == 1.0
