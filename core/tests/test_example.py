"""The example runs; with few experts and a short prompt, and at the real layer shapes all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepseek_v4_decoder.py"


@pytest.mark.parametrize(
    ("options", "last_line"),
    [
        ((), "the logits agree"),
        pytest.param(("--quantised",), "differ by at most", marks=pytest.mark.slow),
    ],
    ids=["float", "quantised"],
)
def test_decoder_runs_and_agrees_with_the_references(options, last_line):
    command = [sys.executable, str(EXAMPLE), "--experts", "6", "--prompt", "130", "--new", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line in done.stdout.splitlines()[-1]
    assert "cpu.fused_moe" in done.stdout
