"""Readers of reports and bundles meet files that have been damaged, and files that have been made to deceive.

A reader may refuse, with its own error, or read what was written: nothing else. The slow run has 120,000 files.
"""

import copy
import hashlib
import json
import random
import tracemalloc
from collections import Counter

import pytest
import torch

from isolith_conformance.bundle import read_manifest, write_bundle, write_results
from isolith_conformance.bundle_judge import judge_bundle
from isolith_conformance.bundle_tensors import BundleError, read_tensors, tensor_bytes
from isolith_conformance.case import arguments_of
from isolith_conformance.report import ReportError, read
from isolith_conformance.report_json import JsonError, canonical, check_depth

FAST, SLOW = 500, 30_000
LENGTHS = [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="long", marks=pytest.mark.slow)]
CONSTANT_BYTES = 2**20

TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"NaN", b"-Infinity"),
    *(b"1e999", b"-0", b"1e-999", b"9" * 400, b"9" * 5000, b"18446744073709551616", b"0.1", b"-1", b'"a":1,'),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b'"PASS"',
        b"PASS",
        b"FAIL",
    ),
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four accidents."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = ACCIDENTS[rng.randrange(len(ACCIDENTS))](data, rng)
    return data


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    if out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def drop(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64)) :]


def splice(data: bytes, rng: random.Random) -> bytes:
    first, second, length = (rng.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[second : second + length % 400] + data[first:]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def replace_number(data: bytes, rng: random.Random) -> bytes:
    digits = [at for at, byte in enumerate(data[:20000]) if 48 <= byte <= 57]
    if not digits:
        return data
    at = rng.choice(digits)
    return data[:at] + rng.choice(TOKENS) + data[at + 1 :]


def swap_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    one, two = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one] = lines[two]
    return b"\n".join(lines)


def length_word(data: bytes, rng: random.Random) -> bytes:
    word = rng.choice((0, 1, 7, len(data), len(data) - 8, 2**20 + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**16)))
    return max(word, 0).to_bytes(8, "little") + data[8:]


ACCIDENTS = [flip, cut, drop, splice, insert, replace_number, swap_lines]


def tally(count, seed, attempt):
    """How often an attempt gave which answer, and the most memory that one took."""
    found, most = Counter(), 0
    rng = random.Random(seed)
    for number in range(count):
        if number % 50 == 0:  # tracing every allocation of every file would take hours
            tracemalloc.start()
        found[attempt(rng)] += 1
        if number % 50 == 0:
            most = max(most, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    print(f"\n{count} files: {dict(found)}; most memory of one {most / 2**20:.1f} MiB")
    return found, most


@pytest.fixture
def report_file(make_report, make_case, tmp_path):
    path = tmp_path / "report.json"
    waiver = {"id": "a", "cases": "*", "reason": "hardware limit"}
    cases = [
        make_case(),
        make_case(sample="x", verdict="FAIL", rule="R1", problem="é \u202e", statistics={"r1": float("inf")}),
        make_case(sample="y", verdict="NOT-CLAIMED", statistics={}, limits={}, input_hash=None),
    ]
    make_report(*cases, waivers=(waiver,)).write(path)
    return path


def meaning(text):
    """The value of a report's text, cases in their order; what no two different reports share."""
    value = json.loads(text)
    value["cases"].sort(key=lambda case: case["id"])
    return canonical(value)


@pytest.mark.parametrize("count", LENGTHS)
def test_damaged_report_is_refused_or_unchanged(report_file, count):
    data = report_file.read_bytes()
    whole = meaning(data)

    def attempt(rng):
        report_file.write_bytes(changed := damaged(data, rng))
        try:
            read(report_file)
        except ReportError:
            return "refused"
        return "unchanged" if meaning(changed) == whole else "accepted"

    found, most = tally(count, 1, attempt)
    assert (found["accepted"], most < 2 * len(data) + CONSTANT_BYTES) == (0, True)


def leaves(value, path=()):
    """Where every part of a JSON value stands."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from leaves(part, (*path, key))


VALUES = [None, True, False, 0, -1, 1, 2**63, 2**64, 10**30, 0.5, 1e300, "", "x", "inf", "nan", "PASS", "FAIL", "../x"]
VALUES += [
    [],
    {},
    [[]],
    {"a": {}},
    "\x00",
    "a" * 70000,
    [1] * 300,
    {"tensor": "x"},
    {"number": "inf"},
    {"dtype": "int8"},
]


def edited(value, rng):
    """A copy of a JSON value with some parts exchanged, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice([path for path in leaves(value) if path])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        what = rng.randrange(4)
        if what == 0:
            del holder[path[-1]]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice(["more", "", "x" * 300])] = copy.deepcopy(rng.choice(VALUES))
        elif what == 2 and isinstance(holder, list):
            holder.insert(0, copy.deepcopy(rng.choice(holder)))
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return value


@pytest.mark.parametrize("count", LENGTHS)
def test_edited_report_with_a_right_hash_is_refused_or_satisfies_the_schema(report_file, count, shipped_schema):
    document = json.loads(report_file.read_text())

    def attempt(rng):
        changed = edited(document, rng)
        rest = {name: value for name, value in changed.items() if name != "sha256"}
        changed["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        report_file.write_text(json.dumps(changed))
        try:
            report = read(report_file)
        except ReportError:
            return "refused"
        legal = shipped_schema.is_valid(changed) and report.summary == read(report_file).summary
        return "another report, legal" if legal else "accepted"

    assert tally(count, 2, attempt)[0]["accepted"] == 0


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "bundle", ["rms_norm"], [torch.bfloat16], 3, ["odd_width"])
    case = read_manifest(tmp_path / "bundle").cases[0]
    y = arguments_of("rms_norm", "odd_width", "bfloat16", 3)["x"]
    write_results(tmp_path / "results", case, [y])
    return tmp_path / "bundle", tmp_path / "results"


@pytest.mark.parametrize("count", LENGTHS)
def test_damaged_tensor_file_is_refused_or_adds_up(bundle, count):
    path = bundle[1] / "rms_norm/odd_width/bfloat16/results.safetensors"
    data = tensor_bytes(
        read_tensors(path) | {"flags": torch.tensor([True, False]), "n": torch.arange(3), "e": torch.ones(0)}
    )

    def attempt(rng):
        changed = length_word(data, rng) if rng.random() < 0.1 else damaged(data, rng)
        path.write_bytes(changed)
        try:
            tensors = read_tensors(path)
        except BundleError:
            return "refused"
        size = sum(tensor.nbytes for tensor in tensors.values())
        return "legal" if 8 + int.from_bytes(changed[:8], "little") + size == len(changed) else "accepted"

    found, most = tally(count, 3, attempt)
    assert (found["accepted"], most < 2 * len(data) + CONSTANT_BYTES) == (0, True)


@pytest.mark.parametrize("count", LENGTHS)
def test_edited_bundle_with_right_hashes_is_refused_or_judged(bundle, count):
    path = bundle[0] / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"]

    def attempt(rng):
        changed = edited(manifest, rng) if rng.random() < 0.5 else edited_case(manifest, rng)
        path.write_text(
            json.dumps({"manifest": changed, "sha256": hashlib.sha256(canonical(changed).encode()).hexdigest()})
        )
        try:
            return f"judged: {sorted({case.verdict for case in judge_bundle(*bundle)})}"
        except BundleError:
            return "refused"

    found = tally(count, 4, attempt)[0]
    assert set(found) <= {"refused", "judged: []", "judged: ['FAIL']", "judged: ['ERROR']", "judged: ['ERROR', 'FAIL']"}


def edited_case(manifest, rng):
    """The manifest with something else in its first case, tensors and all."""
    case = dict(manifest["cases"][0])
    case["expectation"] = edited(case["expectation"], rng)
    return {**manifest, "cases": [case]}


@pytest.fixture
def shipped_schema():
    from importlib.resources import files

    import jsonschema

    schema = json.loads(files("isolith_conformance").joinpath("report.schema.json").read_text())
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_depth_is_refused_before_the_parser_meets_it(opening):
    with pytest.raises(JsonError, match="nested deeper"):
        check_depth((opening * 10**5).decode())


def test_large_report_takes_at_most_twice_its_size(make_report, make_case, tmp_path):
    path = tmp_path / "large.json"
    make_report(*(make_case(sample=f"sample_{number}", seed=number) for number in range(4000))).write(path)
    tracemalloc.start()
    report = read(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"\n{len(report.cases)} cases, {path.stat().st_size / 2**20:.1f} MiB, peak {most / 2**20:.1f} MiB")
    assert most <= 2 * path.stat().st_size + CONSTANT_BYTES


def test_large_tensor_file_takes_at_most_twice_its_size(tmp_path):
    (tmp_path / "x").write_bytes(tensor_bytes({"x": torch.zeros(2**22)}))
    tracemalloc.start()
    read_tensors(tmp_path / "x")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most <= 2 * 2**24 + CONSTANT_BYTES
