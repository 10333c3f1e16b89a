"""The simulated device. torch has room for one in a process, so every fact is looked at in the same child process."""

import json
import subprocess
import sys

import pytest

START = """
import json, sys, torch
from torch.nn import functional as F
from isolith import PluginError, simulated
simulated.simulate("sim", lacks=["aten::logcumsumexp"])
simulated.simulate("sim")
library = torch.library.Library("sim_vendor", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.define("add_in_place(Tensor(a!) x, Tensor? y=None, *, int k=4) -> (Tensor, Tensor)")
library.define("plan(str device, Tensor? lengths=None, int size=3) -> Tensor")

def add_in_place(x, y, k):
    x.add_(k)
    return x * 0, x if y is None else y

simulated.offer("sim_vendor", "twice", lambda x: x * 2)
simulated.offer("sim_vendor", "add_in_place", add_in_place)
simulated.offer("sim_vendor", "plan", lambda device, lengths, size: torch.full((size,), 7))
E4M3 = torch.float8_e4m3fn
vendor = torch.ops.sim_vendor
both = simulated.on_device(lambda x, y: (x.add_(1), x + y))

host = torch.arange(12.0).reshape(3, 4)
def dev(): return host.to("sim")
def ids(*values): return torch.tensor(values, device="sim")
def error(function, *args, **kwargs):
    try: function(*args, **kwargs)
    except Exception as caught: return f"{type(caught).__name__}: {caught}"
    return "no error"
def written(function):
    tensor = dev()
    function(tensor)
    return tensor.cpu()
def same(one, other):
    return one.device.type == "sim" and one.dtype == other.dtype and bool(torch.equal(one.cpu(), other))
"""

TRUE = {
    "a tensor says where it is": "str(dev().device) == 'sim:0' and dev().is_sim",
    "memory is apart": "(lambda h, d: (h.zero_(), d.sum().item() == 66)[1])(host.clone(), dev())",
    "a copy to the host is apart": "(lambda d: (d.cpu(), d.zero_())[0].sum().item() == 66)(dev())",
    "zeros": "same(torch.zeros(2, 3, device='sim'), torch.zeros(2, 3))",
    "full": "same(torch.full((3,), 255, dtype=torch.uint8, device='sim'), torch.full((3,), 255, dtype=torch.uint8))",
    "arange": "same(torch.arange(1, 9, 2, device='sim'), torch.arange(1, 9, 2))",
    "empty_strided": "torch.empty_strided((2, 3), (8, 1), device='sim').stride() == (8, 1)",
    "empty_like on the host": "torch.empty_like(dev(), device='cpu').device.type == 'cpu'",
    "tensor": "same(torch.tensor([1, 2], device='sim'), torch.tensor([1, 2]))",
    "to another dtype": "same(dev().to(E4M3).view(torch.uint8), host.to(E4M3).view(torch.uint8))",
    "to the host and another dtype": "dev().to('cpu', torch.bfloat16).equal(host.bfloat16())",
    "a view is the same memory": "written(lambda d: d[1:, ::2].zero_()).sum().item() == 66 - 28",
    "as_strided": "same(dev().as_strided((2, 2), (1, 4), 1), host.as_strided((2, 2), (1, 4), 1))",
    "transposed strides": "dev().T.stride() == (1, 4) and not dev().T.is_contiguous()",
    "an item": "dev()[2, 3].item() == 11.0 and bool(dev()[0, 1] > 0)",
    "a list": "dev()[0].tolist() == [0.0, 1.0, 2.0, 3.0]",
    "written in place": "written(lambda d: d.mul_(2)).equal(host * 2)",
    "written by slices": "written(lambda d: d.__setitem__((slice(1), slice(2)), 9.0))[0, :2].tolist() == [9.0, 9.0]",
    "written by an index": "written(lambda d: d.__setitem__(ids(2, 0), 5.0)).sum().item() == 22 + 40",
    "written from the host by copy_": "written(lambda d: d.copy_(host + 1)).equal(host + 1)",
    "copied to the host by copy_": "torch.empty(3, 4).copy_(dev()).equal(host)",
    "the output given comes back": "(lambda d: torch.add(d, 1, out=d) is d and d.add_(1) is d)(dev())",
    "matmul": "same(dev() @ dev().T, host @ host.T)",
    "einsum": "same(torch.einsum('ij,kj->ik', dev(), dev()), host @ host.T)",
    "index_add_": "written(lambda d: d.index_add_(0, ids(0, 0), dev()[:2])).sum().item() == 66 + 28",
    "sort with names": "same(torch.sort(dev(), dim=1, descending=True, stable=True).values, host.flip(1))",
    "topk": "same(dev().topk(2).indices, host.topk(2).indices)",
    "silu": "same(F.silu(dev()), F.silu(host))",
    "a number of the host": "same(dev() + torch.tensor(2.0), host + 2)",
    "the device module": "torch.sim.is_available() and torch.sim.device_count() == 1",
    "the accelerator": "torch.accelerator.current_accelerator().type == 'sim'",
    "an offered operator": "same(vendor.twice(dev()), host * 2)",
    "an offered operator writes": "written(lambda d: vendor.add_in_place(d, k=1)).equal(host + 1)",
    "defaults are the schema's": "written(vendor.add_in_place).equal(host + 4)",
    "an offered operator gives back what it got": "(lambda d, y: vendor.add_in_place(d, y)[1] is y)(dev(), dev())",
    "an offered operator without tensors": "same(vendor.plan('sim', None, 2), torch.tensor([7, 7]))",
    "a function on the device": "(lambda d: both(d, d)[0] is d and same(both(d, d)[1], host * 2 + 4))(dev())",
}

ERRORS = {
    "a sum with the host's": ("error(lambda: dev() + host)", "RuntimeError: aten::add.Tensor: every tensor must be on"),
    "a host's indices": ("error(lambda: dev()[torch.tensor([0])])", "RuntimeError: aten::index.Tensor: every tensor"),
    "a host's arange": ("error(lambda: dev() * torch.arange(4))", "got one of shape (4,) on 'cpu'."),
    "written into the host's": ("error(lambda: host.clone().add_(dev()))", "RuntimeError: aten::add_.Tensor: every"),
    "numpy": ("error(lambda: dev().numpy())", "RuntimeError"),
    "an offered operator on the host": (
        "error(vendor.twice, host)",
        "NotImplementedError: Could not run 'sim_vendor::twice'",
    ),
    "a plan of the host": ("error(vendor.plan, 'sim', host)", "NotImplementedError: Could not run 'sim_vendor::plan'"),
    "an optional of the host": ("error(vendor.add_in_place, dev(), host)", "every tensor must be on 'sim'; got one"),
    "a function given the host's": (
        "error(both, dev(), host)",
        "RuntimeError: <lambda>: every tensor must be on 'sim'",
    ),
    "a function given a scalar of the host": ("error(both, dev(), torch.tensor(1.0))", "RuntimeError: <lambda>: every"),
    "another device": (
        "error(simulated.simulate, 'other')",
        "PluginError: this process simulates 'sim' already; got 'other'.",
    ),
}


@pytest.fixture(scope="module")
def found():
    """What the child made of every expression."""
    expressions = {**TRUE, **{name: expression for name, (expression, _) in ERRORS.items()}}
    code = (
        START
        + """
answers = {}
for name, text in json.loads(sys.stdin.read()).items():
    try: answers[name] = eval(text)
    except Exception as caught: answers[name] = f"{type(caught).__name__}: {caught}"
print(json.dumps(answers))
"""
    )
    child = [sys.executable, "-c", code]
    done = subprocess.run(child, input=json.dumps(expressions), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TRUE)
def test_device_works(found, name):
    assert found[name] is True


@pytest.mark.parametrize("name", ERRORS)
def test_mistake_is_an_error(found, name):
    assert ERRORS[name][1] in found[name]
