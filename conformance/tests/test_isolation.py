"""A plugin can do nothing to the suite, to other plugins or to the next case, whatever it does to its own process."""

import os
import time

import pytest
import torch

import isolith
from isolith_conformance import plan
from isolith_conformance import runner as runners
from isolith_conformance.execute import Options
from isolith_conformance.plan import Plan, PlanError
from isolith_conformance.runner import Trouble

CALL = isolith.rms_norm.arguments(torch.ones(2, 8), torch.ones(8))
RIGHT = """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return isolith.rms_norm.reference(x, weight, eps, round_before_weight)
"""

BROKEN = {
    "raises": ("raise RuntimeError('broken')", "RuntimeError: broken"),
    "import_error": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "system_exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "keyboard_interrupt": (
        "raise KeyboardInterrupt",
        "CRASH: the process was ended by SIGINT|CRASH: .*KeyboardInterrupt",
    ),
    "exit_0": ("import os; os._exit(0)", "CRASH: the process exited with 0"),
    "exit_3": ("import os; os._exit(3)", "CRASH: the process exited with 3"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "CRASH: the process was ended by SIGSEGV"),
    "abort": ("import os; os.abort()", "CRASH: the process was ended by SIGABRT"),
    "hang": ("import time; time.sleep(1000)", "TIMEOUT: no answer within 4 s"),
    "endless": ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", "TIMEOUT: no answer"),
    "closes_everything": ("import os; os.closerange(0, 64)", "CRASH: "),
    "wrong_version": ("_made = backend\ndef backend(): return _made(api_version=99)", "written for plugin API 99"),
}


def listing():
    """The installed plugins as the suite finds them."""
    return {one.name: one for one in plan.find(Plan(backends=()))}


SLOW = {"import_error", "exit_0", "abort", "endless", "wrong_version"}  # like another, in CI


def each_broken_plugin():
    return [pytest.param(*row, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, row in BROKEN.items()]


@pytest.mark.parametrize(("source", "reason"), each_broken_plugin())
def test_a_broken_plugin_is_unavailable_with_its_reason(plugin, runner, monkeypatch, source, reason):
    monkeypatch.setattr(runners, "START_TIMEOUT_S", 4.0 if "TIMEOUT" in reason else 60.0)
    plugin("broken", source)
    found = runner("broken").describe()["why_unavailable"]
    assert any(part in found or __import__("re").search(part, found) for part in reason.split("|"))


def test_a_hanging_plugin_is_ended_within_a_second_of_its_time(plugin, runner, monkeypatch):
    monkeypatch.setattr(runners, "START_TIMEOUT_S", 3.0)
    plugin("hangs", "import time; time.sleep(1000)")
    start = time.monotonic()
    runner("hangs").describe()
    assert time.monotonic() - start < 4.5


def test_the_other_plugins_run_as_they_do_without_the_broken_one(plugin, runner):
    alone = runner("cpu").run("rms_norm", "reference", CALL, Options()).results
    plugin("broken", "import os; os._exit(3)")
    runner("broken").describe()
    assert torch.equal(runner("cpu").run("rms_norm", "reference", CALL, Options()).results[0], alone[0])


def test_what_a_plugin_prints_does_not_disturb_the_answers(plugin, runner):
    plugin("loud", f"print('x' * 100000)\n{RIGHT}")
    assert runner("loud").run("rms_norm", "loud.rms_norm", CALL, Options()).status == "ran"


CRASHES = {
    "segfault": ("import ctypes; ctypes.string_at(0)", "CRASH"),
    "exit": ("import os; os._exit(0)", "CRASH"),
    "hang": ("import time; time.sleep(1000)", "TIMEOUT"),
}
UNSTEADY = """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    if x.shape[0] == 3:
        {act}
    return isolith.rms_norm.reference(x, weight, eps, round_before_weight)
"""


@pytest.mark.parametrize(("act", "verdict"), CRASHES.values(), ids=CRASHES)
def test_a_crash_is_a_verdict_and_the_next_case_gets_a_fresh_process(plugin, runner, act, verdict):
    plugin("unsteady", UNSTEADY.format(act=act))
    bench = runner("unsteady", timeout_s=5.0)
    bench.run("rms_norm", "unsteady.rms_norm", CALL, Options())
    with pytest.raises(Trouble) as caught:
        bench.run("rms_norm", "unsteady.rms_norm", CALL | {"x": torch.ones(3, 8)}, Options())
    assert (caught.value.verdict, bench.run("rms_norm", "unsteady.rms_norm", CALL, Options()).status) == (
        verdict,
        "ran",
    )


def test_memory_beyond_the_limit_is_an_error_and_not_the_end(plugin, runner):
    plugin("hungry", UNSTEADY.format(act="import torch; torch.ones(1 << 40)"))
    bench = runner("hungry", memory=8 << 30)
    greedy = bench.run("rms_norm", "hungry.rms_norm", CALL | {"x": torch.ones(3, 8)}, Options())
    assert (greedy.status, bench.run("rms_norm", "hungry.rms_norm", CALL, Options()).status) == ("raised", "ran")


def test_a_plugin_sees_no_variable_that_is_not_allowed(plugin, runner, monkeypatch):
    monkeypatch.setenv("CANARY_TOKEN", "secret")
    plugin("curious", f"import os\nif 'CANARY_TOKEN' in os.environ: raise RuntimeError('seen')\n{RIGHT}")
    assert runner("curious").describe()["why_unavailable"] is None


def test_a_variable_that_the_user_names_is_passed_on(plugin, runner, monkeypatch):
    monkeypatch.setenv("VENDOR_HOME", "/opt/vendor")
    plugin("vendor", f"import os\nassert os.environ['VENDOR_HOME'] == '/opt/vendor'\n{RIGHT}")
    assert runner("vendor", environment=("VENDOR_*",)).describe()["why_unavailable"] is None


def test_a_plugin_works_in_a_home_of_its_own(plugin, runner):
    plugin("writer", f"from pathlib import Path\nPath.home().joinpath('mark').write_text('x')\n{RIGHT}")
    runner("writer").describe()
    assert not os.path.exists(os.path.expanduser("~/mark"))


def test_the_suite_never_imports_a_backend(plugin):
    import sys

    plugin("quiet", RIGHT)
    found = listing()
    for one in found.values():
        one.runner.close()
    assert found["quiet"].reason is None
    assert "plugin_quiet" not in sys.modules


def test_two_distributions_of_one_name_are_refused_until_one_is_named(plugin):
    plugin("twice", RIGHT)
    plugin("twice", RIGHT, distribution="other-twice")
    with pytest.raises(PlanError, match=r"isolith-twice 1\.0 and other-twice 1.0 both offer the backend 'twice'"):
        plan.find(Plan(backends=("twice",)))
    (found,) = plan.find(Plan(backends=("other-twice:twice",)))
    found.runner.close()
    assert found.reason is None


def test_a_backend_asked_for_by_name_that_is_not_available_ends_the_run(plugin):
    plugin(
        "absent",
        RIGHT,
        hook="@hookimpl\ndef isolith_backend():\n    return backend(why_unavailable=lambda: 'no device')",
    )
    with pytest.raises(PlanError, match=r"backend absent \(isolith-absent 1\.0\) is not available: no device"):
        plan.find(Plan(backends=("absent",)))
