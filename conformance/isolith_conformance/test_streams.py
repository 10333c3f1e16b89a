"""Calls may run side by side, wait for work that is still under way, and leave nothing running behind."""

from isolith_conformance.case import check
from isolith_conformance.trial import Inapplicable, Trial

CALLS = 4


@check("side by side", "few", empty=False, takes=lambda operator: not operator.mutates)
def test_calls_on_several_threads_do_not_disturb_each_other(trial: Trial) -> None:
    response = trial.run(together=CALLS)
    for call in range(CALLS - 1):
        others = response.late[call * len(response.results) :][: len(response.results)]
        trial.agree(response.results, others, "four calls at once")
    trial.accept(response.results, when="four calls at once")


@check("nothing left running", "few", empty=False)
def test_nothing_changes_after_the_call_has_returned(trial: Trial) -> None:
    response = trial.run(settle=0.05)
    trial.agree(response.results, response.late, "50 ms after the call", exactly=True)
    if response.left_running:
        trial.fail(f"leaves {response.left_running} threads running", "left running")


@check("streams", "few", empty=False)
def test_a_call_waits_for_the_work_before_it_on_its_stream(trial: Trial) -> None:
    if trial.case.unit.on_a_host:
        raise Inapplicable("neither a host nor a simulated device has streams")
    trial.accept(trial.run(side_stream=True).results, when="on a stream with work before it")
