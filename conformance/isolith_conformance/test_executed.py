"""What runs is what was asked for: no reference in its place, no other device."""

from isolith import OPERATORS
from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("executed", "one", empty=False)
def test_the_kernel_itself_does_the_work(trial: Trial) -> None:
    unit = trial.case.unit
    response = trial.run(watch=True)
    if (
        unit.kernel not in ("reference", "composition", "")
        and f"{unit.operator} {unit.kernel}" not in response.executed
    ):
        trial.fail(f"{unit.kernel} was asked for; {', '.join(response.executed) or 'nothing'} ran", "executed")
    # For what the backend lacks, a layer may have references, on the host too.
    a_layer = unit.operator not in OPERATORS
    if response.references and not unit.native and not a_layer:
        trial.fail(f"runs the reference of {', '.join(response.references)}", "executed")
    if a_layer and any(name.endswith(" cpu with copies") for name in response.executed):
        return
    most = max((tensor.numel() for tensor in response.results), default=0) // 2
    if unit.device != "cpu" and response.on_host > max(64, most):
        trial.fail(f"computes {response.on_host} numbers on the host", "executed")
