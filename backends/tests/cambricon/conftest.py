"""The twin's functions over tensors of the host, for each card and release."""

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
