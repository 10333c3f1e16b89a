"""Every wrong adapter is found on the twin by the samples of its operator; the twin runs in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from wrong_adapters import WRONG

HERE = Path(__file__).parent
SOME = (
    "epsilon_is_the_default",
    "cos_and_sin_exchanged",
    "index_k_major",
    "bias_is_the_default",
    "counts_as_group_list",
)


def trials(*words: str) -> dict[str, object]:
    """What `trials.py` prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / "trials.py"), *words], capture_output=True, text=True, check=True, timeout=1200
    )
    return json.loads(done.stdout)


def test_there_are_at_least_forty():
    assert len({wrong.name for wrong in WRONG}) == len(WRONG) >= 40


def test_every_one_changes_a_call_that_the_vendor_has():
    schemas = json.loads((HERE.parents[1] / "isolith_backends" / "ascend" / "schemas.json").read_text())
    known = {entry["name"].partition("::")[2].partition(".")[0] for entry in schemas["ops"]}
    assert {wrong.call for wrong in WRONG} <= known


def test_some_are_found():
    assert [name for name, found in trials("wrong", *SOME).items() if not found] == []


@pytest.mark.slow
def test_all_are_found():
    assert [name for name, found in trials("wrong").items() if not found] == []


@pytest.mark.slow
def test_the_right_adapters_are_not():
    assert {name: found for name, found in trials("right").items() if found} == {}
