"""What the twin refuses by card, and the device that it makes."""

import subprocess
import sys

import pytest
import torch


def test_mlu370_has_no_bfloat16(tmo_370):
    with pytest.raises(RuntimeError, match="x is bfloat16; capability 3 has none"):
        tmo_370.scaled_quantize(torch.ones(1, 4, dtype=torch.bfloat16))


def test_mlu370_has_no_bfloat16_output(tmo_370):
    codes, scale = torch.ones(1, 4, dtype=torch.int8), torch.ones(1)
    with pytest.raises(RuntimeError, match="output_dtype is bfloat16"):
        tmo_370.scaled_matmul(codes, codes, scale, scale, torch.bfloat16)


def test_mlu590_has_no_fp8(tmo):
    with pytest.raises(RuntimeError, match="capability 5 has no fp8"):
        tmo.scaled_quantize(torch.ones(1, 4), quant_type=torch.float8_e4m3fn)


def test_capability_6_has_fp8(tmo_fp8):
    _, scale = tmo_fp8.scaled_quantize(torch.full((1, 4), 448.0), quant_type=torch.float8_e4m3fn)
    assert scale.tolist() == [1.0]


def test_float64_is_nowhere(tmo):
    with pytest.raises(RuntimeError, match="x is float64"):
        tmo.scaled_quantize(torch.ones(1, 4, dtype=torch.float64))


def test_a_strided_argument_is_refused(tmo):
    with pytest.raises(RuntimeError, match=r"x must be contiguous, but has strides \(8, 1\)"):
        tmo.scaled_quantize(torch.ones(2, 8)[:, :4])


DEVICE = """
import torch
from isolith_backends.cambricon import twin
import torch_mlu, torch_mlu_ops as tmo
x = torch.ones(1, 4).to("mlu")
out = tmo.fused_rms_norm(x, None, None, None, None, 0.0, False)
try: tmo.fused_rms_norm(torch.ones(1, 4), None, None, None, None, 0.0, False)
except RuntimeError as error: refused = "must be on 'mlu'" in str(error)
print(out.device, out.tolist(), refused, torch.mlu.get_device_capability(), torch.mlu.get_device_name(),
      torch_mlu.__version__, tmo.__version__)
rows = torch.ones(2, 1, 4).to("mlu")
table = torch.zeros(1, 4).to("mlu")
back = tmo.apply_rotary(rows, table, table, torch.zeros(2, dtype=torch.int32).to("mlu"), None, True, True, False, 2)
print(back is rows, rows.tolist())
"""


@pytest.fixture(scope="module")
def lines():
    """What a process of its own prints: torch has room for one simulated device."""
    done = subprocess.run(
        [sys.executable, "-c", DEVICE],
        env={"ISOLITH_TWIN": "mlu370", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_device_is_that_of_the_setting(lines):
    assert lines[0] == "mlu:0 [[1.0, 1.0, 1.0, 1.0]] True (3, 7) MLU370-X8 1.33.1+torch2.11.0 1.12.1+torch2.11.0"


def test_what_is_written_in_place_comes_back(lines):
    assert lines[1] == "True [[[0.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]]"
