import functools
import random
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import isolith
from isolith import OPERATORS, ShadowWarning, Unsupported, implements
from isolith.dispatch import using
from isolith.ops.norm.rms_norm import reference
from isolith.shadow import (
    CAPTURED,
    KNOWN,
    LARGE,
    LONG,
    MOST_BYTES,
    MOST_WRONG,
    NO_TIME,
    RAISED,
    TRACED,
    Shadow,
    shadow_for,
)

X, WEIGHT = torch.randn(4, 64), torch.randn(64)


def kernel(change=lambda y: y, **conditions):
    """A kernel of rms_norm that changes what the reference gives."""

    @implements(isolith.rms_norm, **conditions)
    def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
        return change(reference(x, weight, eps, round_before_weight))

    return rms_norm


class Clock:
    """Time that passes when a test says so, and while a comparison runs."""

    def __init__(self, comparison_s=0.0):
        self.now, self.comparison_s = 0.0, comparison_s

    def __call__(self):
        return self.now


@pytest.fixture
def shadowed(backend, dispatcher, tmp_path):
    """A dispatcher over a backend with these kernels whose calls are compared, and what was found."""

    def make(*kernels, share=1.0, clock=None, **settings):
        active = dispatcher(backend(*kernels), fallback="allow", **settings)
        active.shadow = Shadow(share, clock or Clock(), tmp_path / "kept")
        return active

    return make


def found(active):
    (record,) = active.shadow.records()
    return record


def quietly(active, function, *args, **kwargs):
    with using(active), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [str(w.message) for w in caught if w.category is ShadowWarning]


def test_right_kernel_is_compared_and_nothing_is_said(shadowed):
    active = shadowed(kernel())
    assert quietly(active, isolith.rms_norm, X, WEIGHT)[1] == []
    assert (found(active).seen, found(active).compared, found(active).wrong) == (1, 1, 0)


def test_wrong_kernel_is_found_and_warned_of_once(shadowed):
    active = shadowed(kernel(lambda y: 1.02 * y))
    told = [message for _ in range(3) for message in quietly(active, isolith.rms_norm, X, WEIGHT)[1]]
    assert len(told) == 1
    assert told[0].startswith("test.rms_norm gives wrong results for rms_norm: result 0: ")
    assert told[0].endswith(f"; the call again: python -m isolith_conformance reproduce {found(active).inputs}")
    assert (found(active).compared, found(active).wrong) == (3, 3)


def test_results_are_the_kernels_own(shadowed):
    made = []
    active = shadowed(kernel(lambda y: made.append(y * 2) or made[-1]))
    assert quietly(active, isolith.rms_norm, X, WEIGHT)[0] is made[0]


def test_arguments_are_not_written_and_alias_what_they_did(shadowed):
    view = X.clone()[1:]
    before = view.clone(), view._version, view.data_ptr()
    quietly(shadowed(kernel()), isolith.rms_norm, view, WEIGHT)
    assert torch.equal(view, before[0])
    assert (view._version, view.data_ptr()) == before[1:]


def test_gradients_flow_as_without(shadowed):
    x = X.clone().requires_grad_()
    result, _ = quietly(shadowed(kernel()), isolith.rms_norm, x, WEIGHT)
    due = X.clone().requires_grad_()
    reference(due, WEIGHT).sum().backward()
    result.sum().backward()
    assert torch.equal(x.grad, due.grad)


def every_kernel():
    """A kernel for every operator, that runs the reference."""
    made = []
    for operator in OPERATORS.values():
        run = functools.wraps(operator.reference)(lambda *args, own=operator, **kwargs: own.reference(*args, **kwargs))
        made.append(implements(operator)(run))
        object.__setattr__(made[-1], "name", operator.name)
    return made


@pytest.fixture
def everything(backend, dispatcher, tmp_path):
    active = dispatcher(backend(*every_kernel()))
    active.shadow = Shadow(1.0, Clock(), tmp_path)
    return active


def generators():
    return torch.get_rng_state().tolist(), random.getstate()


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_compared_and_no_generator_moves(everything, name):
    operator = OPERATORS[name]
    samples = [
        s for s in operator.samples(isolith.Make(operator.sample_dtypes[0])) if not s.tags & {"device", "model", "slow"}
    ]
    before = generators()
    for sample in samples[:2]:
        quietly(everything, operator, **sample.arguments)
    assert generators() == before
    (record,) = [record for record in everything.shadow.records() if record.operator == name]
    assert (record.wrong, record.compared, record.skipped) == (0, record.seen, {})


@implements(isolith.kv_cache_write)
def writes_too_much(cache, x, slot_mapping, scale_format="ue8m0", amax_floor=None):
    isolith.kv_cache_write.reference(cache, x, slot_mapping, scale_format, amax_floor)
    cache[0, 1] += 1


def test_what_is_written_in_place_is_compared(shadowed):
    cache = torch.ones(1, 2, 4)
    active = shadowed(writes_too_much)
    _, told = quietly(active, isolith.kv_cache_write, cache, torch.full((1, 4), 3.0), torch.tensor([0]))
    assert cache.tolist() == [[[3.0] * 4, [2.0] * 4]]
    assert len(told) == 1


def test_illegal_values_are_skipped(shadowed, monkeypatch):
    def refuses(**_):
        raise isolith.ArgumentError("kv_cache_write: slot 7 of 2")

    active = shadowed(writes_too_much)
    call = torch.ones(1, 2, 4), torch.full((1, 4), 3.0), torch.tensor([0])
    with using(active):
        handle = isolith.bind(isolith.kv_cache_write, *call)
    object.__setattr__(isolith.kv_cache_write, "check_values", refuses)
    try:
        handle(*call)
    finally:
        object.__setattr__(isolith.kv_cache_write, "check_values", CHECK_VALUES)
    assert list(found(active).skipped) == [
        "its values are illegal, which is not checked on a device unless ISOLITH_DEBUG=1"
    ]


CHECK_VALUES = isolith.kv_cache_write.check_values


def test_bound_handle_is_compared(shadowed):
    active = shadowed(kernel())
    with using(active):
        handle = isolith.bind(isolith.rms_norm, X, WEIGHT)
    handle(X, WEIGHT)
    assert found(active).compared == 1


def test_without_a_share_the_kernel_runs_bare(backend, dispatcher):
    own = kernel()
    with using(dispatcher(backend(own))):
        assert isolith.bind(isolith.rms_norm, X, WEIGHT).func is own.fn
    assert shadow_for(0.0) is None


def test_one_share_has_one_shadow():
    assert shadow_for(0.25) is shadow_for(0.25)


def test_which_calls_are_sampled_is_the_same_in_every_run(shadowed):
    def compared():
        active = shadowed(kernel(), share=0.3, clock=Clock())
        counts = []
        for _ in range(40):
            quietly(active, isolith.rms_norm, X, WEIGHT)
            active.shadow.clock.now += 100
            counts.append(found(active).compared)
        return counts

    counts = compared()
    assert 4 < counts[-1] < 24
    assert compared() == counts


def test_comparisons_keep_within_their_time(shadowed, monkeypatch):
    clock = Clock()
    active = shadowed(kernel(), share=0.1, clock=clock)
    monkeypatch.setattr(active.shadow, "drawn", lambda tally: True)
    judge = active.shadow.judge.problem

    def slow(*given):
        clock.now += 0.5
        return judge(*given)

    active.shadow.__dict__["judge"] = SimpleNamespace(problem=slow)
    for _ in range(400):
        quietly(active, isolith.rms_norm, X, WEIGHT)
        clock.now += 0.05
    record = found(active)
    assert record.skipped == {NO_TIME: 400 - record.compared}
    assert 0.1 * clock.now < record.seconds <= 0.2 * clock.now + 0.5


def test_no_time_is_saved_up_in_a_pause(shadowed, monkeypatch):
    clock = Clock()
    active = shadowed(kernel(), share=0.1, clock=clock)
    monkeypatch.setattr(active.shadow, "drawn", lambda tally: True)

    def slow(*_):
        clock.now += 0.5

    active.shadow.__dict__["judge"] = SimpleNamespace(problem=slow)
    clock.now = 1e6
    for _ in range(20):
        quietly(active, isolith.rms_norm, X, WEIGHT)
    assert found(active).compared == 2


def test_kernel_that_is_known_to_be_wrong_is_left_alone(shadowed):
    active = shadowed(kernel(lambda y: -y))
    for _ in range(MOST_WRONG + 2):
        quietly(active, isolith.rms_norm, X, WEIGHT)
    assert (found(active).wrong, found(active).skipped) == (MOST_WRONG, {KNOWN: 2})


def test_call_does_not_wait_for_a_slow_judge_and_the_warning_comes_later(shadowed, monkeypatch):
    monkeypatch.setattr("isolith.shadow.PATIENCE_S", 0.01)
    active, go = shadowed(kernel(), share=0.5), threading.Event()
    monkeypatch.setattr(active.shadow, "drawn", lambda tally: True)

    def slow(*_):
        go.wait(10)
        return "too far"

    active.shadow.__dict__["judge"] = SimpleNamespace(problem=slow, keep=lambda *_: "there")
    assert quietly(active, isolith.rms_norm, X, WEIGHT)[1] == []
    quietly(active, isolith.rms_norm, X, WEIGHT)
    assert (found(active).compared, found(active).skipped) == (0, {NO_TIME: 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go.set()
        for thread in threading.enumerate():
            if thread.name == "isolith shadow":
                thread.join()
    assert [w.category for w in caught] == [ShadowWarning]
    assert (found(active).wrong, found(active).inputs, active.shadow.late) == (1, "there", 0)


@pytest.mark.parametrize(
    ("wide", "reason"), [({"flops": 2**40}, LARGE), ({"bytes_written": MOST_BYTES}, LONG)], ids=["flops", "bytes"]
)
def test_call_that_costs_too_much_is_skipped(shadowed, monkeypatch, wide, reason):
    cost = isolith.Cost(**{"flops": 1, "bytes_read": 1, "bytes_written": 1, **wide})
    active = shadowed(kernel())
    before = isolith.rms_norm.cost
    object.__setattr__(isolith.rms_norm, "cost", lambda **_: cost)
    try:
        quietly(active, isolith.rms_norm, X, WEIGHT)
    finally:
        object.__setattr__(isolith.rms_norm, "cost", before)
    assert found(active).skipped == {reason: 1}


def test_kernel_that_refuses_is_counted_and_the_next_step_runs(shadowed):
    @implements(isolith.rms_norm)
    def refuses(x, weight, eps=1e-6, round_before_weight=False):
        raise Unsupported("rows of 64; takes 16")

    active = shadowed(refuses)
    assert torch.equal(quietly(active, isolith.rms_norm, X, WEIGHT)[0], reference(X, WEIGHT))
    assert found(active).skipped == {RAISED: 1}


def test_comparison_that_raises_is_counted(shadowed):
    def broken(*_):
        raise RuntimeError("no")

    active = shadowed(kernel())
    active.shadow.__dict__["judge"] = SimpleNamespace(problem=broken)
    assert torch.equal(quietly(active, isolith.rms_norm, X, WEIGHT)[0], reference(X, WEIGHT))
    (reason,) = found(active).skipped
    assert reason.startswith("the comparison raised RuntimeError (test_shadow.py:")


def test_inputs_that_cannot_be_kept_are_said_so(shadowed, tmp_path):
    active = shadowed(kernel(lambda y: -y))
    active.shadow.folder = tmp_path / "file"
    active.shadow.folder.write_text("")
    _, (told,) = quietly(active, isolith.rms_norm, X, WEIGHT)
    assert "; its inputs are not kept: " in told


def test_missing_conformance_is_one_sentence(shadowed, monkeypatch):
    monkeypatch.setattr("isolith.shadow.JUDGE", "isolith_nowhere.shadow")
    active = shadowed(kernel())
    _, (told,) = quietly(active, isolith.rms_norm, X, WEIGHT)
    assert told.startswith("ISOLITH_SHADOW=1 compares nothing: isolith_nowhere cannot be imported (")


def test_graph_that_is_being_captured_is_left_alone(shadowed, monkeypatch):
    active = shadowed(kernel())
    monkeypatch.setattr("isolith.shadow.capturing", lambda device: True)
    quietly(active, isolith.rms_norm, X, WEIGHT)
    assert found(active).skipped == {CAPTURED: 1}


def test_transformed_tensors_are_left_alone(shadowed):
    active = shadowed(kernel())
    with using(active):
        handle = isolith.bind(isolith.rms_norm, X[0], WEIGHT)
    torch.func.vmap(lambda x: handle(x, WEIGHT))(X)
    assert found(active).skipped == {TRACED: 1}


def test_handle_is_compiled_as_without(shadowed):
    active = shadowed(kernel())
    with using(active):
        handle = isolith.bind(isolith.rms_norm, X, WEIGHT)
    compiled = torch.compile(lambda x: handle(x, WEIGHT), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), reference(X, WEIGHT))
    assert found(active).seen == 0


def test_modes_of_the_caller_do_not_reach_the_reference(shadowed):
    active = shadowed(kernel())
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
        _, told = quietly(active, isolith.rms_norm, X.bfloat16(), WEIGHT)
    assert (told, found(active).compared) == ([], 1)


def test_threads_are_counted_together(shadowed):
    active = shadowed(kernel())

    def work():
        for _ in range(10):
            quietly(active, isolith.rms_norm, X, WEIGHT)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found(active).seen, found(active).compared) == (40, 40)


def test_records_are_public():
    with isolith.override(shadow=0.5):
        isolith.moe_permute(X, torch.tensor([[0], [1], [0], [1]]), 2)
    assert ("moe_permute", "cpu.moe_permute") in {(r.operator, r.kernel) for r in isolith.shadows()}
