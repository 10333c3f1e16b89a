"""What selection chooses for every operator's samples, chip by chip, where every operator is registered.

An installation registers its operators whatever the chip, so the SoC number alone must decide here: torch_npu, with
both extensions beside it, on a twin whose number is then made to be another chip's. Prints JSON: by SoC number and
operator, what is chosen over its samples, in order of preference, and why kernels are not for this chip.
"""

import importlib
import json
import sys

import torch

from isolith import OPERATORS, Make, config, plugins
from isolith.registry import Registry
from isolith.select import select


def calls_of(operator):
    """The arguments of the operator's samples, in two dtypes."""
    for dtype in {torch.bfloat16, torch.float32} & set(operator.sample_dtypes):
        for sample in operator.samples(Make(dtype, seed=0)):
            if not {"slow", "device"} & sample.tags:
                yield operator.arguments(**sample.arguments)


def chosen(registry, operator, calls):
    """Names of what is chosen for the calls, in order of preference."""
    explanations = [select(registry, config.Settings(), operator, call, "npu") for call in calls]
    names = {explanation.chosen.name for explanation in explanations}
    return [row.name for row in explanations[0].candidates if row.name in names]


def main(numbers):
    """Sweep the SoC numbers."""
    importlib.import_module("isolith_backends.ascend.twin")
    vendor = sys.modules["torch_npu"]
    (row,) = (row for row in plugins.discover() if row.name == "ascend")
    registry = Registry(operators=OPERATORS, plugins=(plugins.load(row),))
    backend = registry.backend("ascend")
    calls = {name: list(calls_of(operator)) for name, operator in OPERATORS.items()}
    found = {}
    for number in map(int, numbers):
        vendor._C._npu_get_soc_version = lambda number=number: number
        found[number] = {}
        for name, operator in OPERATORS.items():
            kernels = {kernel.name: kernel.requires.why_not_here(backend) for kernel in registry.kernels(backend, name)}
            refused = {kernel: reason for kernel, reason in kernels.items() if reason}
            found[number][name] = [chosen(registry, operator, calls[name]), refused]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
