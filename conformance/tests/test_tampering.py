"""No trick makes a wrong kernel pass: gold and comparison are where the kernel cannot reach."""

import textwrap

import pytest
from distributions import RIGHT_RMS_NORM
from harness import CHECKS

from isolith_conformance.case import Unit, cases
from isolith_conformance.trial import Finding, Inapplicable, Trial

WRONG = """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    import torch
    return torch.zeros_like(x)
"""

TRICKS = {
    "says_that_all_is_equal": "import torch\ntorch.equal = torch.allclose = lambda *a, **k: True\n" + WRONG,
    "replaces_the_judge": """
        import isolith_conformance.judge, isolith_conformance.limits, isolith_conformance.bits
        isolith_conformance.judge.judge = lambda *a, **k: None
        isolith_conformance.bits.differing = lambda *a, **k: None
        """,
    "replaces_the_reference": """
        import torch
        object.__setattr__(isolith.rms_norm, 'reference', lambda x, weight, eps=1e-6, round_before_weight=False: x * 0)
        """,
    "stops_the_clock": "import time\ntime.perf_counter = time.monotonic = lambda: 0.0\n",
    "fixes_the_seed": "import torch\ntorch.manual_seed(0)\ntorch.Generator.manual_seed = lambda self, seed: self\n",
    "forges_the_response": """
        import isolith_conformance.worker as worker
        import isolith_conformance.execute as execute
        genuine = execute.run
        def forged(operator, function, arguments, options, device, earlier=None):
            response = genuine(operator, function, arguments, options, device, earlier)
            object.__setattr__(response, 'status', 'ran')
            object.__setattr__(response, 'results', [arguments['x']])
            return response
        worker.run = execute.run = forged
        import sys
        sys.modules['__main__'].run = forged
        """,
    "writes_to_every_descriptor": """
        import os
        for number in range(3, 64):
            try: os.write(number, b'ISOLITH1' + bytes(64))
            except OSError: pass
        """,
    "returns_its_input": "",
    "remembers_results_by_address": "",
    "returns_what_memory_holds": "",
    "leaves_the_work_to_a_thread": "",
}
KERNELS = {
    "returns_its_input": """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return x
""",
    "returns_what_memory_holds": """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    import torch
    return torch.empty_like(x)
""",
    "remembers_results_by_address": """
HELD = {}
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    from isolith_conformance.execute import OPERATORS_FOLDER
    key = (x.data_ptr(), x.shape, x.dtype)
    if key not in HELD:
        wide = x.float()
        HELD[key] = ((wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()) * weight.float()).to(x.dtype)
    return HELD[key].clone()
""",
    "leaves_the_work_to_a_thread": """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    import threading, time, torch
    result = torch.zeros_like(x)
    def later():
        time.sleep(0.02)
        result.copy_(isolith.rms_norm.reference(x, weight, eps, round_before_weight))
    threading.Thread(target=later).start()
    return result
""",
}


def verdicts(runner, backend, names):
    """Check -> the first finding that is no pass."""
    found = {}
    unit = Unit(backend=backend, operator="rms_norm", kernel=f"{backend}.rms_norm")
    for name in names:
        for case in list(cases(CHECKS[name].isolith_check, unit, "quick", 3)):
            try:
                CHECKS[name](Trial(case=case, runner=runner))
            except Inapplicable:
                continue
            except Finding as finding:
                found.setdefault(name, finding.verdict)
    return found


SLOW = {"stops_the_clock", "fixes_the_seed", "says_that_all_is_equal", "returns_its_input"}  # like another, in CI


@pytest.mark.parametrize("trick", [pytest.param(trick, marks=[pytest.mark.slow] * (trick in SLOW)) for trick in TRICKS])
def test_a_wrong_kernel_fails_whatever_it_patches(plugin, runner, trick):
    plugin("tricky", textwrap.dedent(TRICKS[trick]) + KERNELS.get(trick, WRONG))
    found = verdicts(runner("tricky"), "tricky", ("accuracy", "fresh values"))
    assert set(found.values()) & {"FAIL", "ERROR", "CRASH", "INFRA"}


def test_a_kernel_that_runs_the_reference_is_found_out(plugin, runner):
    plugin(
        "lazy",
        """
        @implements(isolith.rms_norm)
        def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
            try:
                raise RuntimeError("no device")
            except RuntimeError:
                return isolith.rms_norm.reference(x, weight, eps, round_before_weight)
        """,
    )
    assert verdicts(runner("lazy"), "lazy", ("accuracy", "executed")) == {"executed": "FAIL"}


def test_a_kernel_that_runs_the_operator_again_is_found_out(plugin, runner):
    plugin(
        "round",
        """
        @implements(isolith.rms_norm)
        def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
            with isolith.override(kernels={"rms_norm": "reference"}, fallback="allow"):
                return isolith.rms_norm(x, weight, eps, round_before_weight)
        """,
    )
    assert "executed" in verdicts(runner("round"), "round", ("executed",))


def test_a_right_kernel_passes(plugin, runner):
    plugin("honest", RIGHT_RMS_NORM)
    names = [name for name, function in CHECKS.items() if not function.isolith_check.unclaimed]
    assert verdicts(runner("honest"), "honest", names) == {}


def test_a_right_kernel_passes_where_an_interpreter_stands_for_its_device(plugin, runner):
    plugin("honest", RIGHT_RMS_NORM)
    names = [name for name, function in CHECKS.items() if not function.isolith_check.unclaimed]
    assert verdicts(runner("honest", how="interpreter"), "honest", names) == {}


WITHHELD = ("guard zones", "inputs unchanged", "aliasing", "side by side", "nothing left running")


def test_a_process_that_sends_less_than_was_asked_for_fails(plugin, runner):
    plugin(
        "sparing",
        """
        import sys
        main = sys.modules["__main__"]
        genuine = main.run
        def sparing(*args, **kwargs):
            response = genuine(*args, **kwargs)
            object.__setattr__(response, "buffers", {})
            object.__setattr__(response, "late", [])
            return response
        main.run = sparing
        """
        + textwrap.indent(RIGHT_RMS_NORM, " " * 8),
    )
    assert verdicts(runner("sparing"), "sparing", WITHHELD) == dict.fromkeys(WITHHELD, "FAIL")
