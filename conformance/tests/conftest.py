"""Backends built for a test, and runners for them."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "proof")]

from distributions import build  # noqa: E402  # it lies in the folder that was just added
from records import make_case, make_report  # noqa: E402, F401  # fixtures

from isolith_conformance.runner import Runner, Setup  # noqa: E402


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a plugin with this source, for this test alone; further arguments as `distributions.build` takes them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def install(name, source, **more):
        return build(tmp_path, name, source, **more)

    return install


@pytest.fixture
def runner():
    """Make runners that are closed after the test."""
    made = []

    def make(backend, **more):
        made.append(Runner(Setup(backend=backend, **more)))
        return made[-1]

    yield make
    for one in made:
        one.close()
