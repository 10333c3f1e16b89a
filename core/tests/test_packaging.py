"""What the wheel and the source distribution hold."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


def test_wheel_has_the_three_import_roots_and_nothing_else(wheel):
    roots = {name.split("/")[0] for name in wheel.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {
        "isolith",
        "isolith_backends",
        "isolith_conformance",
    }


def test_wheel_is_typed(wheel):
    typed = {name for name in wheel.namelist() if name.endswith("py.typed")}
    assert typed == {f"{root}/py.typed" for root in ("isolith", "isolith_backends", "isolith_conformance")}


def test_wheel_offers_the_in_tree_backends_and_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    names = ("ascend", "cambricon", "cpu")
    assert "[isolith]\n" + "\n".join(f"{name} = isolith_backends.{name}" for name in names) in text
    assert "[console_scripts]\nisolith = isolith.__main__:main" in text


def test_wheel_needs_torch_and_pluggy_alone(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    needs = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in needs if "extra ==" not in line] == [
        "Requires-Dist: pluggy>=1.5",
        "Requires-Dist: torch<2.14,>=2.8",
    ]


def test_source_distribution_can_build_the_wheel_and_run_the_tests(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "core/isolith/__init__.py", "core/tests/conftest.py"} <= names
