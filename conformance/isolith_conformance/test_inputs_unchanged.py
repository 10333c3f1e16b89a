"""No argument changes that the operator does not declare to write."""

import torch

from isolith_conformance import bits
from isolith_conformance.buffers import place_all
from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("inputs unchanged", "one")
def test_arguments_keep_their_bytes(trial: Trial) -> None:
    response = trial.run(buffers=True)
    before, _ = place_all(trial.case.arguments, 0xFF, "as_is", torch.device("cpu"))
    for name, buffer in response.buffers.items():
        if name in trial.case.operator.mutates:
            continue
        if buffer.shape != before[name].shape or bool(bits.unequal_rows(buffer, before[name]).any()):
            trial.fail(f"changes {name}", "inputs unchanged")
