"""Sets the twin up: importing this module makes the device "mlu" and both packages in this process.

Which card and which release they stand for says the setting `twin`: mlu590 (the default), mlu370 or mtp613, with
-1.12.1 (the default) or -day0 behind. torch has room for one such device in a process.
"""

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from isolith.config import from_environment
from isolith.simulated import on_device, simulate
from isolith_backends.cambricon.vendor.library import functions
from isolith_backends.cambricon.vendor.profile import Profile, named


def set_up(profile: Profile) -> None:
    """Simulate the device, and put both packages among the modules."""
    simulate("mlu")
    device: Any = torch.mlu  # type: ignore[attr-defined]  # Any: torch has it since the line above
    describe_device(device, profile)
    runtime = types.ModuleType("torch_mlu", "A stand-in for Cambricon's torch_mlu.")
    runtime.__dict__.update(__version__=profile.torch_mlu_version, mlu=device)
    library = types.ModuleType("torch_mlu_ops", "A stand-in for Cambricon's torch_mlu_ops.")
    library.__dict__["__version__"] = profile.tmo_version
    library.__dict__.update({name: on_device(function) for name, function in functions(profile).items()})
    for module in (runtime, library):
        module.__spec__ = ModuleSpec(module.__name__, None)  # others look for it
        sys.modules[module.__name__] = module


def describe_device(runtime: Any, profile: Profile) -> None:  # Any: torch.mlu is a module that torch does not know
    """What torch.mlu tells of the card, beside what every device of torch tells."""
    major, minor = profile.capability
    properties = types.SimpleNamespace(name=profile.device_name, major=major, minor=minor)
    runtime.get_device_name = lambda _=None: profile.device_name
    runtime.get_device_capability = lambda _=None: profile.capability
    runtime.get_device_properties = lambda _=None: properties
    runtime.is_bf16_supported = lambda: major >= 5


PROFILE = named(from_environment().twin)
set_up(PROFILE)
