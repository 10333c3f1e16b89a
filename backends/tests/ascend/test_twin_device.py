"""The twin as a device: set up in processes of their own, one for each chip, since torch has room for one device."""

import functools
import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, sys, torch
import isolith_backends.ascend.twin
import torch_npu
from isolith_backends import ascend
x = torch.randn(2, 8).npu()
def error(function, *args, **kwargs):
    try: function(*args, **kwargs)
    except Exception as caught: return f"{type(caught).__name__}: {caught}"
    return "no error"
has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")
plan = lambda: torch.ops._C_ascend.npu_sparse_attn_sharedkv_metadata(4, 1, 512, device="npu:0")
print(json.dumps({name: eval(text) for name, text in json.loads(sys.stdin.read()).items()}))
"""

FACTS = {
    "a3": {
        "the backend finds its chip": ("[ascend.why_unavailable(), ascend.arch()]", [None, "3"]),
        "versions are told": ("ascend.versions()['torch_npu']", "2.13.0"),
        "the chip has a name": ("torch.npu.get_device_name()", "Ascend910_9391"),
        "functions of torch_npu run on the device": ("str(torch_npu.npu_swiglu(x).device)", "npu:0"),
        "and on no other": ("error(torch_npu.npu_swiglu, x.cpu())[:30]", "NotImplementedError: Could not"),
        "a wrong keyword is answered with the schema": (
            "'npu_rms_norm(Tensor input, Tensor gamma' in error(torch_npu.npu_rms_norm, x, weight=x)",
            True,
        ),
        "metadata needs no tensors": ("[str(plan().device), list(plan().shape)]", ["npu:0", [1024]]),
    },
    "a5-vllm": {
        "the backend finds its chip": ("ascend.arch()", "5"),
        "a schema is there without a kernel": (
            "[hasattr(torch.ops._C_ascend, 'npu_scatter_nd_update_v2'), has('_C_ascend::npu_scatter_nd_update_v2')]",
            [True, False],
        ),
    },
    "a3-recipes-2.10.0.post4": {
        "an older wheel lacks operators": ("hasattr(torch_npu, 'npu_swiglu_group_quant')", False),
        "an older wheel lacks arguments": (
            "[a.name for a in torch.ops.npu.npu_moe_finalize_routing.default._schema.arguments][-2:]",
            ["export_for_source_row", "drop_pad_mode"],
        ),
        "its operators run all the same": ("list(torch_npu.npu_moe_gating_top_k(x, 2)[1].shape)", [2, 2]),
        "an extension that is not installed has no operators": (
            "[hasattr(torch.ops._C_ascend, 'compressor'), has('custom::compressor')]",
            [False, True],
        ),
    },
}


@functools.cache
def answers(chip):
    """What the process of a chip says to its facts."""
    texts = {name: text for name, (text, _) in FACTS[chip].items()}
    environment = {**os.environ, "ISOLITH_TWIN": chip}
    child = [sys.executable, "-c", CODE]
    done = subprocess.run(child, input=json.dumps(texts), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("chip", "fact"), [(chip, fact) for chip, facts in FACTS.items() for fact in facts])
def test_device(chip, fact):
    assert answers(chip)[fact] == FACTS[chip][fact][1]


def test_other_packages_can_look_for_the_stand_in():
    code = "import isolith_backends.ascend.twin, importlib.util; print(importlib.util.find_spec('torch_npu').name)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "torch_npu"
