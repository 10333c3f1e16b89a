"""Kernels are compiled as for a GPU, in a process of their own: here they are made for the interpreter."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from isolith import OPERATORS
from isolith.plugins import kernels_of
from isolith_backends import cuda
from isolith_backends.cuda.build import calls, loops_in, spills_in

KERNELS = kernels_of(cuda.isolith_backend())[0]
OURS = sorted(
    name for name in KERNELS if any(".libraries." not in kernel.fn.__module__ for kernel in KERNELS.get(name, ()))
)
"""Operators that a kernel of ours computes."""


def built(operator):
    """The rows of the build's report."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "isolith_backends.cuda.build", "--operator", operator, "--report", str(report)]
        environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert report.is_file(), done.stderr
        return json.loads(report.read_text())["kernels"]


SAMPLE = ("rms_norm", "act_quant_fp8", "swiglu")
"""Operators whose kernels CI compiles; the slow sweep compiles all."""


def operators():
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in OURS]


@pytest.mark.parametrize("operator", operators())
def test_every_kernel_compiles_for_every_architecture_and_fits_without_spills_in_loops(operator):
    rows = built(operator)
    refused = [row for row in rows if row["problem"] or row["spills_in_loops"]]
    assert ({row["arch"] for row in rows}, refused) == ({80, 90, 100}, [])


CODE = """
        /*0000*/ STL [R1], R2 ;
    .L_x_0:
        /*0010*/ LDL R2, [R1] ;
        /*0020*/ @P0 BRA `(.L_x_1) ;
        /*0030*/ @!P1 BRA `(.L_x_0) ;
    .L_x_1:
        /*0040*/ EXIT ;
    """.splitlines()


def test_a_loop_is_what_a_branch_goes_back_over():
    assert loops_in(CODE) == [(2, 5)]


def test_spills_in_loops_are_counted_apart():
    assert spills_in(CODE) == (2, 1)


@pytest.mark.parametrize("name", OURS)
def test_a_call_of_more_tokens_is_a_legal_call(name):
    made = [(label, arguments) for label, arguments in calls(OPERATORS[name]) if label.endswith(" tokens")]
    for _, arguments in made:
        OPERATORS[name].validate(arguments)
    assert made or name == "block_dequant", "which is called on weights"


def test_every_operator_has_a_kernel():
    assert sorted(KERNELS) == sorted(OPERATORS)
