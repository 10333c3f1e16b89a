"""A NaN or an infinity in one row's input reaches that row alone."""

import torch
from torch import Tensor

from isolith_conformance import bits
from isolith_conformance.case import check
from isolith_conformance.family import evaluate
from isolith_conformance.rows import Rows, rows_of
from isolith_conformance.trial import Inapplicable, Trial


@check("NaN containment", "one", empty=False, without="model")
def test_a_nan_stays_in_its_row(trial: Trial) -> None:
    operator = trial.case.operator
    rows = rows_of(operator, trial.case.arguments)
    if rows is None:
        raise Inapplicable("the call has no rows")
    sick = rows.count // 2
    others = [row for row in range(rows.count) if row != sick]
    healthy = rows.take(others)
    clean = rows.pick(evaluate(operator, operator.reference, trial.case.arguments), others)
    looked = False
    for value in (torch.nan, torch.inf):
        arguments = infected(trial, rows, sick, value)
        if arguments is None:
            continue
        infectious = rows.pick(evaluate(operator, operator.reference, arguments), others)
        if bits.differing(operator, healthy, clean, infectious):
            continue  # the operator itself lets rows meet
        response = trial.run_if_claimed(arguments)
        if response is not None:
            trial.accept(rows.pick(response.results, others), healthy, f"{value} in row {sick}")
            looked = True
    if not looked:
        raise Inapplicable("the operator itself lets rows meet, a row has no float input, or the call is not claimed")


def infected(trial: Trial, rows: Rows, sick: int, value: float) -> dict[str, object] | None:
    """The arguments with a value in every float argument's part of a row; None where there is none."""
    arguments = dict(trial.case.arguments)
    parts = rows.take([sick])
    changed = False
    for name in rows.names:
        tensor = arguments[name]
        if (
            isinstance(tensor, Tensor)
            and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and parts[name].numel()
        ):
            whole = [parts_of(rows, name, row) for row in range(rows.count)]
            whole[sick] = torch.full_like(whole[sick], value)
            arguments[name], changed = torch.cat(whole), True
    return arguments if changed else None


def parts_of(rows: Rows, name: str, row: int) -> Tensor:
    """A row's part of an argument."""
    part: Tensor = rows.take([row])[name]
    return part
