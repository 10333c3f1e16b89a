"""A simulated accelerator for tests: device type `sim`, memory apart from the host's, host tensors refused.

Run as a script: it takes the process's one Python device. It lacks one torch operator, aten::rsqrt, so that the
reference of rms_norm cannot run on it.
"""

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

backend_registration._setup_privateuseone_for_python_backend("sim")
LACKS = "aten::rsqrt"


class SimTensor(torch.Tensor):
    """A tensor on the device: metadata outside, its memory inside."""

    @staticmethod
    def __new__(cls, memory):
        return torch.Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), dtype=memory.dtype, device=torch.device("sim:0")
        )

    def __init__(self, memory):
        self.memory = memory

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.name() == LACKS:
            raise NotImplementedError(f"Could not run '{LACKS}' on 'sim'.")
        if function.name() == "aten::_to_copy" and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
            copied = function(memory_of(args[0]), **{**kwargs, "device": "cpu"})
            return SimTensor(copied) if target == "sim" else copied
        if function.name() == "aten::copy_":
            memory_of(args[0]).copy_(memory_of(args[1]))
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(torch.Tensor, on_device_only, (args, kwargs))
        return tree_map_only(torch.Tensor, SimTensor, function(*args, **kwargs))


def memory_of(tensor):
    return tensor.memory if isinstance(tensor, SimTensor) else tensor


def on_device_only(tensor):
    if not isinstance(tensor, SimTensor) and tensor.dim():
        raise RuntimeError("a host tensor was passed to the device")
    return memory_of(tensor)


library = torch.library.Library("aten", "IMPL")
library.impl(
    "empty.memory_format", lambda size, **kw: SimTensor(torch.empty(size, dtype=kw.get("dtype"))), "PrivateUse1"
)
library.impl(
    "empty_strided",
    lambda size, stride, **kw: SimTensor(torch.empty_strided(size, stride, dtype=kw.get("dtype"))),
    "PrivateUse1",
)


def copy_from(source, target, non_blocking=False):
    memory_of(target).copy_(memory_of(source))
    return target


library.impl("_copy_from", copy_from, "PrivateUse1")
