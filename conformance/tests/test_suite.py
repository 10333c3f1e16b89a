"""The suite is whole: what a vendor imports by one line is every check there is, and each is documented."""

import importlib
import inspect
from pathlib import Path

from harness import CHECKS

import isolith_conformance
from isolith_conformance import suite
from isolith_conformance.case import MARK

PACKAGE = Path(isolith_conformance.__file__).parent
README = PACKAGE.parent / "README.md"


def test_the_suite_has_every_check_of_every_module():
    found = set()
    for path in PACKAGE.glob("test_*.py"):
        module = importlib.import_module(f"isolith_conformance.{path.stem}")
        found |= {name for name, value in vars(module).items() if inspect.isfunction(value) and hasattr(value, MARK)}
    assert set(suite.__all__) == found


def test_no_two_checks_have_one_name():
    assert len(CHECKS) == len(suite.__all__)


def test_the_readme_names_every_check():
    rows = [line.split("|")[1] for line in README.read_text().splitlines() if line.startswith("| ")]
    named = {name.strip() for row in rows for name in row.split(",")}
    assert set(CHECKS) <= named
