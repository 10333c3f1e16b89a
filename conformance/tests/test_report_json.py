import pytest

from isolith_conformance.report_json import (
    JsonError,
    as_text,
    canonical,
    decode,
    encode,
    parse,
    read_bytes,
    read_lines,
    shown,
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e999]", "the number 1e999 is too large"),
        ("[" * 17 + "]" * 17, "values are nested deeper than 16"),
        ("[" * 10**6, "values are nested deeper than 16"),
        ("[1] 2", "this is not JSON: Extra data: line 1 column 5 (char 4)"),
        ("", "this is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" + "9" * 5000 + "]", "this is not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
    ],
    ids=["duplicate", "nan", "infinity", "overflow", "deep", "very deep", "trailing", "empty", "digits"],
)
def test_parser_refuses(text, says):
    with pytest.raises(JsonError) as caught:
        parse(text)
    assert str(caught.value).startswith(says)


def test_brackets_in_a_text_are_not_nesting():
    assert parse('["' + "[" * 50 + '\\"]"]') == ["[" * 50 + '"]']


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (int, True, "x must be a whole number of 64 bits; got True"),
        (int, 2**63, "x must be a whole number of 64 bits; got 9223372036854775808"),
        (float, "1", "x must be a finite number; got '1'"),
        (bool, 1, "x must be true or false; got 1"),
        (str, None, "x must be text; got None"),
        (str, "\ud800", "x has half a surrogate pair"),
        (str, "a" * 65537, "x is longer than 65536 characters"),
        (tuple[str, ...], {}, "x must be a list; got {}"),
        (dict[str, int], {"k": "v"}, "x.'k' must be a whole number of 64 bits; got 'v'"),
    ],
    ids=str,
)
def test_value_of_another_kind_is_refused(kind, value, says):
    with pytest.raises(JsonError) as caught:
        decode(kind, value, "x")
    assert str(caught.value) == says


def test_a_whole_number_does_for_a_number():
    assert decode(float, 3, "x") == 3


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), 0.1, -0.0])
def test_statistic_is_the_same_after_a_file(number, make_case):
    case = make_case(statistics={"r1": number})
    assert decode(type(case), parse(canonical(encode(case)))) == case


def test_no_number_is_no_number_after_a_file(make_case):
    case = make_case(statistics={"r1": float("nan")})
    assert decode(type(case), parse(canonical(encode(case)))).statistics["r1"] != 0


def test_file_larger_than_the_limit_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(JsonError, match="the file has 5 bytes, at most 4 are due"):
        read_bytes(tmp_path / "a", 4)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(JsonError, match="can't decode byte 0xff"):
        as_text(b"\xff")


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"one\ntwo")
    assert list(read_lines(tmp_path / "a", 7)) == [b"one\n", b"two"]


def test_folder_is_no_file(tmp_path):
    with pytest.raises(JsonError, match="this is not a file"):
        read_bytes(tmp_path, 4)


def test_message_shows_no_control_character():
    assert shown("\x1b[31m") == "'\\x1b[31m'"
