import json
import re
from dataclasses import replace
from importlib.resources import files

import jsonschema
import pytest

from isolith_conformance.report import (
    Document,
    Report,
    ReportError,
    read,
    timeless,
)
from isolith_conformance.report_json import canonical, schema


@pytest.fixture
def written(make_report, tmp_path):
    """The path of a written report, and what it holds."""
    path = tmp_path / "report.json"
    make_report().write(path)
    return path, json.loads(path.read_text())


def rehashed(path, document):
    """Write the document with the hash that it should have."""
    import hashlib

    rest = {name: value for name, value in document.items() if name != "sha256"}
    document["sha256"] = hashlib.sha256(canonical(rest).encode()).hexdigest()
    path.write_text(json.dumps(document))
    return path


def refusal(path):
    """What a reader says of the file."""
    with pytest.raises(ReportError) as caught:
        read(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_what_is_written_is_read(make_report, make_case, tmp_path):
    report = make_report(make_case(), make_case(dtype="float16", verdict="FAIL", problem="R1 is 2", rule="R1"))
    report.write(tmp_path / "a.json")
    assert read(tmp_path / "a.json") == report


def test_indented_file_is_the_same_report(written):
    path, document = written
    before = read(path)
    path.write_text(json.dumps(document, indent=3))
    assert read(path) == before


def test_equal_runs_give_equal_bytes(make_report, make_case, tmp_path):
    first = make_report(make_case(seconds=1.0), make_case(dtype="float16"), started="now", seconds=3.0)
    second = make_report(make_case(dtype="float16"), make_case(seconds=2.0), started="then", seconds=4.0)
    timeless(first).write(tmp_path / "a")
    timeless(second).write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_time_is_in_the_bytes(make_report, tmp_path):
    make_report(seconds=1.0).write(tmp_path / "a")
    make_report(seconds=2.0).write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_changed_content_has_another_hash(written):
    path, document = written
    document["cases"][0]["seed"] = 8
    path.write_text(json.dumps(document))
    assert re.fullmatch(r"its content has the hash \w{64}, its sha256 is \w{64}\.", refusal(path))


def test_edited_summary_is_refused_with_a_right_hash(written):
    path, document = written
    document["summary"]["counts"]["PASS"] = 1000
    assert refusal(rehashed(path, document)) == "its summary is not what its cases say."


def test_edited_verdict_is_refused_with_a_right_hash(written):
    path, document = written
    document["cases"][0]["verdict"] = "FAIL"
    assert refusal(rehashed(path, document)) == "its summary is not what its cases say."


def test_duplicate_case_is_refused(written):
    path, document = written
    document["cases"] *= 2
    says = "the case 'cpu.rms_norm/one_row/bfloat16/accuracy' stands 2 times."
    assert refusal(rehashed(path, document)) == says


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema must be one of 1; got 2."),
        ({"schema": True}, "schema must be one of 1; got True."),
        ({"more": 1}, "the file has an unknown key, 'more'."),
        ({"cases": {}}, "cases must be a list; got {}."),
        ({"sha256": "A" * 64}, f"sha256 must be text that matches ^[0-9a-f]{{64}}$; got '{'A' * 64}'."),
    ],
    ids=["version", "version is true", "unknown key", "cases", "hash"],
)
def test_document_of_another_form_is_refused(written, change, says):
    path, document = written
    path.write_text(json.dumps(document | change))
    assert refusal(path) == says


def test_missing_key_is_named(written):
    path, document = written
    del document["run"]["command"]
    path.write_text(json.dumps(document))
    assert refusal(path) == "run lacks 'command'."


def test_unknown_verdict_is_named(written):
    path, document = written
    document["cases"][0]["verdict"] = "XFAIL"
    path.write_text(json.dumps(document))
    assert "verdict must be one of PASS, FAIL, ERROR, CRASH," in refusal(path)


def test_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "none.json") == "there is no such file."


def test_report_that_could_not_be_read_is_not_written(make_report, make_case, tmp_path):
    with pytest.raises(ReportError, match="seconds must be a finite number; got 'nan'"):
        make_report(make_case(seconds=float("nan"))).write(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("problem", "kept"), [("a\ud800b", "a\\ud800b"), ("é" * 70000, "é" * 65536)], ids=["surrogate", "long"]
)
def test_no_text_of_a_plugin_keeps_a_report_from_being_written(make_report, make_case, tmp_path, problem, kept):
    make_report(make_case(verdict="FAIL", problem=problem)).write(tmp_path / "a.json")
    assert read(tmp_path / "a.json").cases[0].problem == kept


def test_shipped_schema_is_that_of_the_records():
    shipped = json.loads(files("isolith_conformance").joinpath("report.schema.json").read_text())
    del shipped["$schema"], shipped["title"]
    assert shipped == json.loads(json.dumps(schema(Document)))


def test_written_report_satisfies_the_shipped_schema(written):
    shipped = json.loads(files("isolith_conformance").joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator(shipped).validate(written[1])


def test_unknown_case_is_refused(make_report):
    with pytest.raises(ReportError, match=r"The report has no case 'nobody'\."):
        make_report().case("nobody")


def test_report_holds_no_summary_of_its_own(make_report, make_case):
    report: Report = make_report()
    assert not replace(report, cases=(make_case(verdict="FAIL"),)).summary.conformant
