"""Certificates: read, kept, valid or not, and obeyed by selection."""

import json
from dataclasses import asdict, replace

import pytest
import torch

import isolith
from isolith import ConfigError, certificates, implements
from isolith.__main__ import main
from isolith.certificates import Certificate
from isolith.config import Settings, from_environment
from isolith.dispatch import Dispatcher
from isolith.plugins import Plugin
from isolith.registry import Registry

GIVEN = Certificate(
    kernel="test.rms_norm",
    operator="rms_norm",
    dtypes=("bfloat16", "float32"),
    passed=7,
    profile="standard",
    how="hardware",
    isolith=isolith.__version__,
    device="",
    arch="9.0",
    versions={},
    source="",
    contract="",
    report="a" * 64,
    written="2026-01-02T03:04:05+00:00",
)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A folder of certificates for the test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    certificates.known.cache_clear()
    yield tmp_path
    certificates.known.cache_clear()


@pytest.fixture
def made(backend):
    """(dispatcher that asks for certificates, its kernel, its backend)."""

    @implements(isolith.rms_norm)
    def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
        return isolith.rms_norm.reference(x, weight, eps, round_before_weight)

    chip = backend(rms_norm, name="test", arch=lambda: "9.0", versions=lambda: {"driver": "5"})
    row = Plugin(name="test", distribution="d", version="1", target="t", backend=chip)
    registry = Registry(operators=isolith.OPERATORS, plugins=(row,))
    (kernel,) = registry.kernels(chip, "rms_norm")
    return Dispatcher(registry, Settings(require="certified")), kernel, chip


def valid(kernel, chip, **changes):
    """A certificate that holds here, but for the changes."""
    here = certificates.facts(chip)
    found = replace(
        GIVEN,
        device=here["device"],
        versions=here["versions"],
        source=certificates.source_hash(kernel),
        contract=certificates.contract_hash(kernel),
    )
    return replace(found, **changes)


def chosen(dispatcher, dtype=torch.float32):
    """What takes a call, and what rules the kernel out."""
    call = isolith.rms_norm.arguments(torch.ones(2, 8, dtype=dtype), torch.ones(8))
    explanation = dispatcher.explain(isolith.rms_norm, call)
    return explanation.chosen.name, explanation.candidates[0].why_not


def test_without_a_certificate_a_kernel_is_not_taken(made):
    name, reason = chosen(made[0])
    assert name == "reference"
    assert reason == "it has no certificate on this machine; run python -m isolith_conformance"


def test_with_one_it_is(made):
    dispatcher, kernel, chip = made
    certificates.write(valid(kernel, chip))
    assert chosen(dispatcher) == ("test.rms_norm", None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"how": "twin"}, "how was twin, is hardware"),
        ({"isolith": "0.0.1"}, f"isolith was 0.0.1, is {isolith.__version__}"),
        ({"device": "another chip"}, "the device was another chip, is "),
        ({"arch": "8.0"}, "arch was 8.0, is 9.0"),
        ({"versions": {"driver": "4", "torch": str(torch.__version__)}}, "driver was 4, is 5"),
        ({"versions": {"driver": "5"}}, f"torch was unknown, is {torch.__version__}"),
        ({"source": "b" * 64}, f"the kernel's source was {'b' * 40}, is "),
        ({"contract": "c" * 64}, f"the operator's contract was {'c' * 40}, is "),
    ],
)
def test_whatever_has_changed_since_invalidates_it(made, changes, reason):
    dispatcher, kernel, chip = made
    certificates.write(valid(kernel, chip, **changes))
    name, said = chosen(dispatcher)
    assert name == "reference"
    assert said.startswith(f"its certificate is for another state: {reason}")


@pytest.mark.parametrize(
    ("dtype", "dtypes", "name"),
    [
        (torch.float16, ("bfloat16", "float32"), "reference"),
        (torch.float16, ("float16",), "test.rms_norm"),  # its float32 weight is no float32 call
        (torch.float32, ("float16",), "reference"),
        (torch.bfloat16, ("bfloat16",), "test.rms_norm"),
    ],
)
def test_it_covers_the_dtypes_that_passed(made, dtype, dtypes, name):
    dispatcher, kernel, chip = made
    certificates.write(valid(kernel, chip, dtypes=dtypes))
    assert chosen(dispatcher, dtype)[0] == name


def test_one_of_several_is_enough(made):
    dispatcher, kernel, chip = made
    certificates.write(valid(kernel, chip))
    certificates.write(valid(kernel, chip, arch="8.0"))
    assert chosen(dispatcher)[0] == "test.rms_norm"


def test_a_later_run_replaces_the_certificate_of_an_earlier_one(made):
    _, kernel, chip = made
    certificates.write(valid(kernel, chip, passed=1))
    certificates.write(valid(kernel, chip, passed=2))
    assert [one.passed for _, one in certificates.files()] == [2]


def test_a_changed_source_changes_the_hash(tmp_path, monkeypatch):
    package = tmp_path / "plugin_hashed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    hashes = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.so", "2"), ("b.pyc", "2")):
        (package / name).write_text(text)
        certificates.hash_of_package.cache_clear()
        hashes.add(certificates.hash_of_package("plugin_hashed"))
    certificates.hash_of_package.cache_clear()
    assert len(hashes) == 3  # compiled files are no source


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda given: given.pop("source"), "it is no certificate: its fields must be "),
        (lambda given: given.update(more=1), "it is no certificate: its fields must be "),
        (lambda given: given.update(schema=2), "it has schema 2; this isolith reads 1"),
        (lambda given: given.update(passed="7"), "it is no certificate: a field has another type"),
        (lambda given: given.update(versions={"torch": 2}), "it is no certificate: a field has another type"),
    ],
)
def test_a_file_that_is_no_certificate_is_told_and_not_believed(made, capsys, change, problem):
    dispatcher, kernel, chip = made
    path = certificates.write(valid(kernel, chip))
    given = asdict(valid(kernel, chip))
    change(given)
    path.write_text(json.dumps(given))
    assert chosen(dispatcher)[0] == "reference"
    assert main(["certificates", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["certificates"]
    assert (row["valid"], row["file"]) == (False, str(path))
    assert row["reason"].startswith(problem)


def test_the_command_says_which_hold(capsys, made):
    certificates.write(valid(made[1], made[2]))
    assert main(["certificates"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "test.rms_norm does not hold: there is no kernel test.rms_norm here (bfloat16, float32: 7 cases" in text


def test_the_command_without_any(capsys, state):
    assert main(["certificates"]) == 0
    assert str(state) in capsys.readouterr().out


def test_the_setting_is_one_word():
    assert from_environment({"ISOLITH_REQUIRE": "certified"}).require == "certified"
    with pytest.raises(ConfigError, match="ISOLITH_REQUIRE must be certified, or unset; got 'yes'"):
        from_environment({"ISOLITH_REQUIRE": "yes"})
