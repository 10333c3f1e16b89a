"""A backend on a simulated device: whole cases run on it, and what a real device would not forgive is found."""

import pytest
import torch

import isolith
from isolith_conformance.buffers import NAN_BYTES
from isolith_conformance.execute import Options

TWIN = """
from isolith import OPERATORS

backend_ = backend
def backend(): return backend_(device_type="sim", twin="sim_twin")

@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    return made.copy_(OPERATORS["rms_norm"].reference(x, weight, eps, round_before_weight))

@implements(isolith.kv_cache_write)
def kv_cache_write(**call):
    OPERATORS["kv_cache_write"].reference(**call)

@implements(isolith.hadamard)
def hadamard(x, *rest, **more):
    return OPERATORS["hadamard"].reference(x, *rest, **more) * torch.ones(x.shape[-1])

@implements(isolith.swiglu)
def swiglu(x, *rest, **more):
    return OPERATORS["swiglu"].reference(x.cpu(), *rest, **more).to(x.device)
"""
CALL = isolith.rms_norm.arguments(torch.randn(2, 8), torch.randn(8))


@pytest.fixture
def twin(plugin, runner, tmp_path):
    """A process with a simulated device."""
    (tmp_path / "sim_twin.py").write_text("from isolith.simulated import simulate\nsimulate('sim')\n")
    plugin("toy", "import torch\n" + TWIN)
    return runner("toy", how="twin")


def test_a_process_says_that_its_device_is_simulated(twin):
    described = twin.describe()
    assert (described["device"], described["simulated"], described["why_unavailable"]) == ("sim", True, None)


def test_a_simulated_device_is_no_hardware(plugin, runner):
    plugin("toy", f"from isolith.simulated import simulate\nsimulate('sim')\n{TWIN}")
    says = "its device 'sim' is simulated here, which is no hardware: run it --how twin"
    assert runner("toy").describe()["why_unavailable"] == says


def test_a_device_that_torch_does_not_know_is_not_there_for_the_backends_own_reason(plugin, runner):
    hook = (
        "@hookimpl\ndef isolith_backend():\n    return backend(device_type='chip', why_unavailable=lambda: 'no chip')"
    )
    plugin("absent", "", hook=hook)
    assert runner("absent").describe()["why_unavailable"] == "no chip"


def test_a_kernel_runs_on_the_device_and_its_results_come_back(twin):
    response = twin.run("rms_norm", "toy.rms_norm", CALL, Options(layout="padded"))
    assert torch.equal(response.results[0], isolith.rms_norm.reference(**CALL))


def test_new_memory_on_the_device_is_guarded_and_poisoned(twin):
    response = twin.run("rms_norm", "toy.rms_norm", CALL, Options(poison=True))
    assert [bool((zone == NAN_BYTES).all()) for zone in response.zones] == [True]


def test_written_arguments_and_their_buffers_come_back(twin):
    call = isolith.kv_cache_write.arguments(torch.zeros(2, 4, 8), torch.randn(2, 8), torch.tensor([1, -1]))
    response = twin.run("kv_cache_write", "toy.kv_cache_write", call, Options(buffers=True, layout="offset"))
    assert (torch.equal(response.results[0][0, 1], call["x"][0]), "cache" in response.buffers) == (True, True)


def test_a_tensor_of_the_host_is_an_error(twin):
    call = isolith.hadamard.arguments(torch.randn(2, 8))
    assert "every tensor must be on 'sim'" in twin.run("hadamard", "toy.hadamard", call, Options()).message


def test_work_on_the_host_is_counted(twin):
    call = isolith.swiglu.arguments(torch.randn(2, 8))
    assert twin.run("swiglu", "toy.swiglu", call, Options()).on_host > 8
