"""Triton kernels of another backend, called as on an MLU, in Triton's interpreter and in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def said():
    """What `interpreted.py` prints."""
    command = [sys.executable, str(Path(__file__).parent / "interpreted.py")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)


def test_kernels_are_right_in_the_interpreter(said):
    assert {name: problem for name, problem in said["samples"].items() if problem} == {}


def test_a_program_is_one_warp_on_an_mlu_alone(said):
    assert [options["num_warps"] for options in said["options"]] == [1, 8]
