"""Small registries, built in the test that needs them."""

import itertools
import sys
import types

import pytest

from isolith import OPERATORS, Backend
from isolith.config import Settings
from isolith.dispatch import Dispatcher
from isolith.plugins import Plugin
from isolith.registry import Registry

number = itertools.count()


@pytest.fixture
def backend():
    """Make a Backend whose kernels are the given `implements`-marked functions, best first."""

    def make(*kernels, name="test", device_type="cpu", **fields):
        module = types.ModuleType(f"isolith_test_kernels_{next(number)}")
        for kernel in kernels:
            kernel.fn.__module__ = module.__name__
            setattr(module, f"kernel_{next(number)}", kernel)
        sys.modules[module.__name__] = module
        given = {"why_unavailable": lambda: None, "api_version": 1, "kernels": (module.__name__,), **fields}
        return Backend(name=name, device_type=device_type, **given)

    return make


@pytest.fixture
def registry():
    """Make a Registry of every operator and the given backends."""

    def make(*backends):
        rows = tuple(
            Plugin(name=b.name, distribution=f"isolith-{b.name}", version="1.0", target="test", backend=b)
            for b in backends
        )
        return Registry(operators=OPERATORS, plugins=rows)

    return make


@pytest.fixture
def dispatcher(registry):
    """Make a Dispatcher over the given backends."""

    def make(*backends, **settings):
        return Dispatcher(registry(*backends), Settings(**settings))

    return make
