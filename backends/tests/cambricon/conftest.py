"""The twin's functions over tensors of the host, for each card and release."""

import sys
import types

import pytest
import torch

from isolith_backends.cambricon.vendor.library import functions
from isolith_backends.cambricon.vendor.profile import named


def library_of(name):
    """The functions of one card and release, to be called as a module's."""
    return types.SimpleNamespace(**functions(named(name)))


@pytest.fixture(scope="session")
def tmo():
    """tmo 1.12.1 on an MLU590."""
    return library_of("mlu590")


@pytest.fixture(scope="session")
def tmo_fp8():
    """tmo 1.12.1 on a card of capability 6."""
    return library_of("mtp613")


@pytest.fixture(scope="session")
def tmo_370():
    """tmo 1.12.1 on an MLU370."""
    return library_of("mlu370")


@pytest.fixture(scope="session")
def day0():
    """The day-0 release on an MLU590."""
    return library_of("mlu590-day0")


@pytest.fixture
def int32():
    """Make an int32 tensor."""
    return lambda values: torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def card(monkeypatch):
    """A torch_mlu that says which card it is on, and a torch_mlu_ops of a release."""

    def install(profile="mlu590-1.12.1", available=True, tmo=None):
        found = named(profile)
        runtime = types.SimpleNamespace(
            is_available=lambda: available,
            get_device_capability=lambda: found.capability,
            get_device_name=lambda: found.device_name,
        )
        monkeypatch.setattr(torch, "mlu", runtime, raising=False)
        made, ops = types.ModuleType("torch_mlu"), types.ModuleType("torch_mlu_ops")
        vars(made)["__version__"] = found.torch_mlu_version
        vars(ops).update(functions(found), __version__=tmo or found.tmo_version)
        monkeypatch.setitem(sys.modules, "torch_mlu", made)
        monkeypatch.setitem(sys.modules, "torch_mlu_ops", ops)

    return install
