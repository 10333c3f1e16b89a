"""The lower steps of the ladder, on a simulated device in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import warnings, torch, isolith
import simulated_device
x, w = torch.randn(4, 8), torch.randn(8)
on_sim = lambda *tensors: [simulated_device.SimTensor(t.clone()) for t in tensors]
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parent), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_call_without_any_kernel_is_copied_to_the_host_and_back():
    code = "y = isolith.rms_norm(*on_sim(x, w)); print(y.device, torch.equal(y.cpu(), isolith.rms_norm(x, w)))"
    assert run(code, ISOLITH_FALLBACK="allow") == "sim:0 True"


def test_copies_to_the_host_are_warned_and_counted_with_every_reason():
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2): isolith.rms_norm(*on_sim(x, w))
print(len([c for c in caught if c.category is isolith.FallbackWarning and "cpu with copies" in str(c.message)]))
for r in isolith.fallbacks(): print(r.operator, r.device, r.ran, r.count, "|", r.reason)
"""
    counted = run(code).splitlines()
    assert counted[0] == "1"
    assert counted[1].startswith("rms_norm sim cpu with copies 2 | reference: the device lacks a torch operator: ")


def test_reference_runs_on_the_device_where_torch_can():
    code = """
y = isolith.swiglu(*on_sim(torch.randn(3, 8)))
print(y.device, [r.ran for r in isolith.fallbacks()])
"""
    assert run(code, ISOLITH_FALLBACK="allow") == "sim:0 ['reference']"


def test_written_argument_is_copied_back_from_the_host():
    code = """
simulated_device.LACKS = "aten::index_put_"
cache, x, slots = torch.zeros(2, 4, 8), torch.randn(3, 8), torch.tensor([1, 6, -1])
there = on_sim(cache, x, slots)
isolith.kv_cache_write(*there)
isolith.kv_cache_write(cache, x, slots)
print(torch.equal(there[0].cpu(), cache), cache.abs().sum() > 0)
"""
    assert run(code, ISOLITH_FALLBACK="allow") == "True tensor(True)"


def test_fallback_error_names_the_device():
    code = """
try: isolith.rms_norm(*on_sim(x, w))
except isolith.NoKernelError as error: print(error)
"""
    assert run(code, ISOLITH_FALLBACK="error") == (
        "rms_norm: no kernel on 'sim' takes this call, and ISOLITH_FALLBACK=error.\n"
        "  no backend here has a kernel for rms_norm on 'sim'\n"
        "Set ISOLITH_FALLBACK=warn to run reference instead."
    )


@pytest.mark.parametrize("value", ["cpu", "chip"])
def test_backend_of_another_device_is_an_error(value):
    code = """
try: isolith.rms_norm(*on_sim(x, w))
except isolith.IsolithError as error: print(error)
"""
    says = {
        "cpu": "rms_norm: ISOLITH_BACKEND=cpu serves 'cpu' tensors; got 'sim' tensors.",
        "chip": "there is no backend 'chip'; did you mean cpu?",
    }
    assert run(code, ISOLITH_BACKEND=value).startswith(says[value].split(";")[0])


def test_values_are_checked_on_a_device_under_debug_alone():
    code = """
table = torch.zeros(2, 4)
call = on_sim(torch.zeros(1, 8), torch.tensor([7]), table, table)
try: isolith.rope(*call)
except isolith.ArgumentError as error: print(error)
except Exception: print("not checked")
"""
    assert "positions" in run(code, ISOLITH_FALLBACK="allow", ISOLITH_DEBUG="1")
    assert "positions" not in run(code, ISOLITH_FALLBACK="allow")


def test_values_are_checked_on_the_host_where_the_device_lacks_what_that_takes():
    code = """
simulated_device.LACKS = "aten::_unique2"
call = on_sim(torch.zeros(2, 4, 8), torch.randn(3, 8), torch.tensor([1, 1, -1]))
try: isolith.kv_cache_write(*call)
except isolith.ArgumentError as error: print(error, call[0].cpu().abs().sum().item())
"""
    said = run(code, ISOLITH_FALLBACK="allow", ISOLITH_DEBUG="1")
    assert said.startswith("kv_cache_write: slot_mapping")
    assert said.endswith(" 0.0")
