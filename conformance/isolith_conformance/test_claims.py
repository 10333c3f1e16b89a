"""Claims hold from both sides: what is claimed runs, what is not is refused with a reason, and nothing else runs."""

from isolith_conformance.case import arguments_of, check, dtype_name, labels
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
    case = trial.case
    operator = case.operator
    for sample, tags, _ in labels(operator.name, case.seed):
        if tags & {"device", "slow", "invariants"}:
            continue
        for dtype in operator.sample_dtypes:
            arguments = arguments_of(operator.name, sample, dtype_name(dtype), case.seed)
            if trial.ask(arguments).status != "refused":
                return
    trial.fail("refuses every sample of its operator in every dtype", "claims")


@check("unclaimed", "none", unclaimed=True)
def test_an_operator_without_a_kernel_is_refused(trial: Trial) -> None:
    case = trial.case
    for sample, tags, _ in labels(case.operator.name, case.seed):
        if not tags & {"device", "slow", "invariants"}:
            response = trial.ask(arguments_of(case.operator.name, sample, case.dtype, case.seed))
            if response.status != "refused":
                trial.fail(f"has no kernel, yet: {response.status}: {', '.join(response.executed)}", "claims")
            raise Finding("NOT-CLAIMED", "no kernel")
