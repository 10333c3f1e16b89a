"""Claims hold from both sides: what is claimed runs, what is not is refused with a reason, and nothing else runs."""

from collections.abc import Iterator

from isolith.dtypes import dtype_name
from isolith_conformance.case import arguments_of, check, labels
from isolith_conformance.execute import Values
from isolith_conformance.trial import Finding, Trial


@check("claims", "one")
def test_a_call_is_claimed_and_runs_or_is_refused_with_a_reason(trial: Trial) -> None:
    response = trial.ask()
    if response.status == "refused" and not response.message.strip():
        trial.fail("refuses without a reason", "claims")
    if response.status == "refused" and response.executed:
        trial.fail(f"refuses, but ran {', '.join(response.executed)}", "claims")
    if response.status == "refused":
        raise Finding("NOT-CLAIMED", response.message)
    if response.status != "ran":
        trial.fail(f"claims the call, but: {response.message}", "claims")


@check("claims something", "none")
def test_a_kernel_takes_some_call(trial: Trial) -> None:
    for dtype in trial.case.operator.sample_dtypes:
        if any(trial.ask(arguments).status != "refused" for arguments in calls(trial, dtype_name(dtype))):
            return
    if trial.case.unit.kernel == "composition":
        raise Finding("NOT-CLAIMED", "no sample has kernels of the backend for all its parts")
    trial.fail("refuses every sample of its operator in every dtype", "claims")


@check("unclaimed", "none", unclaimed=True)
def test_an_operator_without_a_kernel_is_refused(trial: Trial) -> None:
    response = trial.ask(next(calls(trial, trial.case.dtype)))
    if response.status != "refused":
        trial.fail(f"has no kernel, yet: {response.status}: {', '.join(response.executed)}", "claims")
    raise Finding("NOT-CLAIMED", "no kernel")


def calls(trial: Trial, dtype: str) -> Iterator[Values]:
    """The arguments of the operator's samples that a host can afford, in a dtype."""
    operator, seed = trial.case.operator.name, trial.case.seed
    for sample, tags, _ in labels(operator, seed):
        if not tags & {"device", "slow", "invariants"}:
            yield arguments_of(operator, sample, dtype, seed)
