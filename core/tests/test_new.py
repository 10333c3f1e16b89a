"""What `new-backend` and `new-op` write: accepted by the tools, usable as it is, and never over what is there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isolith.__main__ import main
from isolith.errors import ConfigError
from isolith.new.operator_file import FAMILY_NAMES, new_operator
from isolith.new.repository import FILES, new_backend
from isolith.ops import OPERATORS

ROOT = Path(__file__).parents[2]


def run(*words, folder, **environment):
    """A program of Python's, over the folder; what it printed."""
    command = [sys.executable, "-m", *map(str, words)]
    given = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accepted(*words, place):
    """Let the linter look, from a place that the paths in its rules are relative to."""
    run("ruff", "check", "--no-cache", *words, folder=place)
    run("ruff", "format", "--no-cache", "--check", *words, folder=place)


@pytest.fixture
def repository(tmp_path):
    new_backend("nova", tmp_path)
    return tmp_path / "isolith-nova"


@pytest.fixture
def checkout(tmp_path):
    """The tree's own core, with one operator more."""
    unwanted = shutil.ignore_patterns("__pycache__", "isolith-nova")
    shutil.copytree(ROOT / "core", tmp_path / "core", ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    new_operator("clamp_rows", "attention", tmp_path)
    return tmp_path


def test_a_new_repository_is_accepted_by_the_linter_with_its_own_rules_and_with_ours(repository):
    accepted(".", place=repository)
    accepted("--config", "pyproject.toml", repository, place=ROOT)


@pytest.mark.slow
def test_a_new_repository_is_accepted_by_the_type_checker(repository):
    run("mypy", "--no-incremental", folder=repository, MYPYPATH=str(ROOT / "core"))


def test_a_new_repository_has_the_files_of_the_miniature(repository):
    names = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert names == {name.replace("$name", "nova") for name in FILES}
    assert not any("$" in (repository / name).read_text() for name in names)


def installed(repository):
    """Lay the metadata beside the package, as an installer would."""
    info = repository / "isolith_nova-0.1.0.dev0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: isolith-nova\nVersion: 0.1.0.dev0\n")
    (info / "entry_points.txt").write_text("[isolith]\nnova = isolith_nova\n")


def test_a_new_backend_is_found_and_says_that_its_device_is_not_here(repository):
    installed(repository)
    rows = {row["name"]: row for row in json.loads(run("isolith", "status", "--json", folder=repository))["backends"]}
    assert rows["nova"]["reason"] == "torch has no device type 'nova': the extension that brings it is not loaded"


@pytest.mark.parametrize(
    "words",
    [["--op", "rms_norm", "--op", "fused_moe", "--op", "swa_layer"], pytest.param([], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_new_backend_is_not_claimed_anywhere_which_is_no_failure(repository, words):
    installed(repository)
    run("pytest", "-q", "--report", "report.json", *words, folder=repository)
    verdicts = {case["verdict"] for case in json.loads((repository / "report.json").read_text())["cases"]}
    assert verdicts == {"NOT-CLAIMED"}


NAME = "new-backend: a name has lower-case letters, with single _ between them; got"
TORCH = "is torch's own; choose another name."


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Nova", f"{NAME} 'Nova'."),
        ("nova2", f"{NAME} 'nova2'."),
        ("no-va", f"{NAME} 'no-va'."),
        ("../nova", f"{NAME} '../nova'."),
        ("", f"{NAME} ''."),
        ("class", f"{NAME} 'class'."),
        ("rms_norm", "new-backend: rms_norm is the name of an operator."),
        ("cpu", "new-backend: isolith 0.1.0.dev0 offers a backend 'cpu' already."),
        ("nn", f"new-backend: torch.nn or a device type 'nn' {TORCH}"),
        ("xpu", f"new-backend: torch.xpu or a device type 'xpu' {TORCH}"),
        ("hpu", f"new-backend: torch.hpu or a device type 'hpu' {TORCH}"),
    ],
)
def test_a_name_that_no_backend_can_have_is_refused_before_anything_is_written(tmp_path, name, says):
    with pytest.raises(ConfigError) as caught:
        new_backend(name, tmp_path)
    assert str(caught.value) == says
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_as_it_is(repository):
    (repository / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"isolith-nova exists; nothing was written\.$"):
        new_backend("nova", repository.parent)
    assert (repository / "README.md").read_text() == "mine"


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "nova"]) == 0
    printed = capsys.readouterr().out
    assert "wrote isolith-nova/isolith_nova/norm.py" in printed
    assert "pip install -e ./isolith-nova" in printed
    assert main(["new-backend", "nova"]) == 2


@pytest.mark.slow
def test_a_new_operator_is_accepted_by_the_type_checker(checkout):
    made = "core/isolith/ops/attention/clamp_rows.py"
    run("mypy", "--no-incremental", "--follow-imports=silent", made, folder=checkout)


def test_a_new_operator_runs(checkout):
    code = "import isolith, torch; print(isolith.clamp_rows(torch.ones(2), scale=3.0).tolist(), len(isolith.OPERATORS))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(checkout / "core")}, capture_output=True, text=True
    )
    assert done.stdout == f"[3.0, 3.0] {len(OPERATORS) + 1}\n", done.stderr


@pytest.mark.slow
def test_a_new_operator_passes_the_tests_of_operator_files_and_of_layers(checkout):
    own = ["core/tests/test_operator_files.py", "-k", "clamp_rows", "-p", "no:cacheprovider"]
    path = f"{checkout / 'core'}"
    assert "passed" in run("pytest", "-q", *own, folder=checkout, PYTHONPATH=path)
    layers = ["core/tests/test_layers.py", "-k", "core or folder or environment or files", "-p", "no:cacheprovider"]
    assert "passed" in run("pytest", "-q", *layers, folder=checkout, PYTHONPATH=path)


@pytest.mark.parametrize(
    ("name", "family", "says"),
    [
        ("rms_norm", "norm", "new-op: there is an operator rms_norm already."),
        ("bind", "norm", "new-op: isolith.bind is something else; choose another name."),
        ("cuda", "norm", "new-op: cuda is the name of a backend."),
        ("Clamp", "norm", "new-op: a name has lower-case letters and digits, with single _ between them; got 'Clamp'."),
        ("clamp", "norms", "new-op: there is no family 'norms'; did you mean norm?"),
    ],
)
def test_a_name_that_no_operator_can_have_is_refused(tmp_path, name, family, says):
    with pytest.raises(ConfigError) as caught:
        new_operator(name, family, tmp_path)
    assert str(caught.value) == says


def test_an_operator_is_written_into_a_checkout_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"is not here; run it in the folder of isolith's repository\.$"):
        new_operator("clamp", "norm", tmp_path)


def test_an_operators_file_is_never_overwritten(checkout):
    with pytest.raises(ConfigError, match=r"clamp_rows\.py exists; nothing was written\.$"):
        new_operator("clamp_rows", "attention", checkout)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_new_operator_of_every_family_is_accepted_by_the_linter(tmp_path, family):
    shutil.copytree(ROOT / "core" / "isolith", tmp_path / "core" / "isolith", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    accepted(*new_operator("aaa", family, tmp_path), place=tmp_path)


def test_the_command_names_what_a_new_operator_needs_besides(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    assert main(["new-op", "clamp_columns", "--family", "norm"]) == 0
    printed = capsys.readouterr().out
    assert "exported it in core/isolith/ops/norm/__init__.py" in printed
    assert all(name in printed for name in ("proof/mutants/norm*.py", "proof/right/norm*.py", "CHANGELOG.md"))
