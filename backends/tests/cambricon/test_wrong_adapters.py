"""Every wrong adapter is found on the twin by the calls of its operator; the twin runs in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MANY = {"mlu590-1.12.1": 100, "mlu590-day0": 10, "mtp613-1.12.1": 2}


def said(twin, *words):
    """What `trials.py` prints of a card and release."""
    given = [sys.executable, str(HERE / "trials.py"), *words]
    environment = os.environ | {"ISOLITH_TWIN": twin}
    done = subprocess.run(given, capture_output=True, text=True, check=True, timeout=600, env=environment)
    return json.loads(done.stdout)


SOME = (
    "cos_before_sin",
    "minus_one_as_an_expert",
    "rounded_scores",
    "block_0_for_none",
    "row_without_a_block_in_slot_0",
)


def test_some_are_found():
    assert [name for name, shown in said("mlu590-1.12.1", *SOME).items() if not shown] == []


@pytest.mark.slow
@pytest.mark.parametrize("twin", MANY)
def test_all_of_many_wrong_adapters_are_found(twin):
    found = said(twin)
    assert (len(found) >= MANY[twin], [name for name, shown in found.items() if not shown]) == (True, [])


@pytest.mark.parametrize("twin", ["mlu590-1.12.1", "mlu590-day0"])
def test_right_adapters_pass_the_calls_that_are_in_no_sample(twin):
    assert {name: shown for name, shown in said(twin, "right").items() if shown} == {}
