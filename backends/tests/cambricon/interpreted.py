"""The kernels that are the cuda backend's, called as on an MLU, in Triton's interpreter on the host.

Prints, as JSON, what the judge says of every sample, "" for nothing, and with which options a program is launched.
"""

import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

import isolith_backends.cambricon.twin  # noqa: F401  # makes the device
from isolith import Make
from isolith_backends.cambricon import portable
from isolith_backends.cuda.kernels.interpreter import repair
from isolith_backends.cuda.launch import launch
from isolith_conformance.judge import expect


class Noted:
    """A kernel that says how it is launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **options: said.append(options)


said: list[Any] = []
repair()
shown = {}
for kernel in (portable.window_indices, portable.compress_indices, portable.hc_head):
    operator = kernel.operator
    for sample in operator.samples(Make(torch.float32, seed=operator.name)):
        call = operator.arguments(**sample.arguments)
        if {"invariants", "slow", "model"} & set(sample.tags) or call.get("streams", torch.empty(0, 1, 1)).shape[1] > 8:
            continue
        problem = expect(operator, call, "exact" in sample.tags).verdict_on([kernel.fn(**call)]).problem
        shown[f"{operator.name} {sample.name}"] = problem or ""
with portable.one_warp():
    launch(Noted(), (1,), torch.zeros(1, device="mlu"), warps=8)
launch(Noted(), (1,), torch.zeros(1, device="mlu"), warps=8)
print(json.dumps({"samples": shown, "options": said}, indent=1))
