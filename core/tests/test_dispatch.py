import threading
import warnings

import pytest
import torch

import isolith
from isolith import (
    ArgumentError,
    ConfigError,
    FallbackWarning,
    NoKernelError,
    PluginError,
    Requires,
    Unsupported,
    implements,
)
from isolith.dispatch import MEMO_LIMIT, using
from isolith.ops.norm.rms_norm import reference

X, WEIGHT = torch.randn(4, 8), torch.randn(8)


def marks(value, **conditions):
    """A kernel of rms_norm that answers with a constant."""

    @implements(isolith.rms_norm, **conditions)
    def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
        return torch.full_like(x, value)

    return rms_norm


@implements(isolith.rms_norm)
def refuses(x, weight, eps=1e-6, round_before_weight=False):
    raise Unsupported("rows of 8; takes 16")


@implements(isolith.rms_norm)
def breaks(x, weight, eps=1e-6, round_before_weight=False):
    raise RuntimeError("device on fire")


def test_first_kernel_of_the_file_is_taken(backend, dispatcher):
    with using(dispatcher(backend(marks(1.0), marks(2.0)))):
        assert isolith.rms_norm(X, WEIGHT).unique().tolist() == [1.0]


def test_kernel_that_does_not_fit_is_passed_over(backend, dispatcher):
    half_only = marks(1.0, requires=Requires(dtypes=(torch.float16,)))
    with using(dispatcher(backend(half_only, marks(2.0)))):
        assert isolith.rms_norm(X, WEIGHT).unique().tolist() == [2.0]


def test_refusal_of_one_shape_changes_nothing_for_the_next(backend, dispatcher):
    def wide(x, weight, eps=1e-6, round_before_weight=False):
        return f"hidden={x.shape[-1]}; takes 8" if x.shape[-1] != 8 else None

    with using(dispatcher(backend(marks(1.0, why_not=wide), marks(2.0)))):
        seen = [isolith.rms_norm(torch.randn(1, n), torch.randn(n)).flatten()[0].item() for n in (8, 9, 8)]
    assert seen == [1.0, 2.0, 1.0]


def test_refusal_while_running_moves_on(backend, dispatcher):
    with using(dispatcher(backend(refuses, marks(2.0)))):
        assert isolith.rms_norm(X, WEIGHT).unique().tolist() == [2.0]


def test_any_other_exception_of_a_kernel_is_the_callers(backend, dispatcher):
    with using(dispatcher(backend(breaks, marks(2.0)))), pytest.raises(RuntimeError, match="device on fire"):
        isolith.rms_norm(X, WEIGHT)


def test_reference_runs_when_no_kernel_takes_the_call(backend, dispatcher):
    with using(dispatcher(backend(refuses), fallback="allow")):
        assert torch.equal(isolith.rms_norm(X, WEIGHT), reference(X, WEIGHT))


def test_step_down_warns_once_per_operator_and_device(backend, dispatcher):
    half_only = marks(1.0, requires=Requires(dtypes=(torch.float16,)))
    with using(dispatcher(backend(half_only))), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        isolith.rms_norm(X, WEIGHT)
        isolith.rms_norm(X[:2], WEIGHT)
    assert [str(w.message) for w in caught if w.category is FallbackWarning] == [
        "rms_norm on cpu runs on reference; no kernel takes the call:\n  test.rms_norm: x is float32; takes float16"
    ]


def test_every_step_down_is_counted_with_its_reason(backend, dispatcher):
    half_only = marks(1.0, requires=Requires(dtypes=(torch.float16,)))
    with using(dispatcher(backend(half_only), fallback="allow")):
        for _ in range(3):
            isolith.rms_norm(X, WEIGHT)
        (record,) = isolith.fallbacks()
    assert (record.operator, record.device, record.ran, record.count) == ("rms_norm", "cpu", "reference", 3)
    assert record.reason == "test.rms_norm: x is float32; takes float16"


def test_fallback_error_names_every_reason_and_the_way_out(backend, dispatcher):
    half_only = marks(1.0, requires=Requires(dtypes=(torch.float16,)))
    with using(dispatcher(backend(half_only), fallback="error")), pytest.raises(NoKernelError) as caught:
        isolith.rms_norm(X, WEIGHT)
    assert str(caught.value) == (
        "rms_norm: no kernel on 'cpu' takes this call, and ISOLITH_FALLBACK=error.\n"
        "  test.rms_norm: x is float32; takes float16\n"
        "Set ISOLITH_FALLBACK=warn to run reference instead."
    )


def test_fallback_error_holds_for_a_refusal_while_running(backend, dispatcher):
    with (
        using(dispatcher(backend(refuses), fallback="error")),
        pytest.raises(NoKernelError, match="rows of 8; takes 16"),
    ):
        isolith.rms_norm(X, WEIGHT)


def test_native_reference_is_no_step_down(backend, dispatcher):
    with using(dispatcher(backend(reference_is_native=True), fallback="error")):
        isolith.rms_norm(X, WEIGHT)
        assert isolith.fallbacks() == ()


def test_pinned_kernel_comes_first(backend, dispatcher):
    one, two = marks(1.0), marks(2.0)
    object.__setattr__(two, "name", "rms_norm_two")
    with using(dispatcher(backend(one, two), kernels=(("rms_norm", "test.rms_norm_two"),))):
        assert isolith.rms_norm(X, WEIGHT).unique().tolist() == [2.0]


def test_pinned_reference_is_no_step_down(backend, dispatcher):
    with using(dispatcher(backend(marks(1.0)), kernels=(("rms_norm", "reference"),), fallback="error")):
        assert torch.equal(isolith.rms_norm(X, WEIGHT), reference(X, WEIGHT))


def test_pinned_kernel_that_refuses_is_a_step_down_even_where_the_reference_is_native(backend, dispatcher):
    half_only = marks(1.0, requires=Requires(dtypes=(torch.float16,)))
    native = backend(half_only, reference_is_native=True)
    with using(dispatcher(native, kernels=(("rms_norm", "test.rms_norm"),), fallback="allow")):
        isolith.rms_norm(X, WEIGHT)
        assert [record.ran for record in isolith.fallbacks()] == ["reference"]


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        (("rms_nrm", "reference"), "kernels: there is no operator 'rms_nrm'; did you mean rms_norm?"),
        (
            ("rms_norm", "test.fast"),
            "kernels: rms_norm has no kernel 'test.fast' here; known: reference, test.rms_norm.",
        ),
        (
            ("rms_norm", "composition"),
            "kernels: rms_norm has no kernel 'composition' here; known: reference, test.rms_norm.",
        ),
    ],
)
def test_pin_to_nothing_is_an_error(backend, dispatcher, pin, says):
    with pytest.raises(ConfigError) as caught:
        dispatcher(backend(marks(1.0)), kernels=(pin,))
    assert str(caught.value) == says


def test_unavailable_backend_asked_for_by_name_is_an_error_with_its_reason(backend, dispatcher):
    absent = backend(name="chip", why_unavailable=lambda: "chip_sdk is not installed")
    with pytest.raises(PluginError) as caught:
        dispatcher(absent, backend="chip")
    assert str(caught.value) == "backend chip (isolith-chip 1.0) is not available: chip_sdk is not installed."


def test_unavailable_backend_not_asked_for_is_passed_over(backend, dispatcher):
    absent = backend(marks(1.0), name="chip", why_unavailable=lambda: "chip_sdk is not installed")
    with using(dispatcher(absent, backend(marks(2.0)))):
        assert isolith.rms_norm(X, WEIGHT).unique().tolist() == [2.0]


def test_unknown_backend_names_the_nearest(backend, dispatcher):
    with pytest.raises(PluginError) as caught:
        dispatcher(backend(name="cuda"), backend="cudo")
    assert str(caught.value) == "there is no backend 'cudo'; did you mean cuda?"


def test_named_backend_takes_no_other_device(backend, dispatcher):
    with (
        using(dispatcher(backend(name="chip", device_type="xpu"), backend="chip")),
        pytest.raises(ArgumentError) as caught,
    ):
        isolith.rms_norm(X, WEIGHT)
    assert str(caught.value) == "rms_norm: ISOLITH_BACKEND=chip serves 'xpu' tensors; got 'cpu' tensors."


def test_bad_argument_is_named_even_when_the_shape_was_seen_before(backend, dispatcher):
    with using(dispatcher(backend(marks(1.0)))):
        isolith.rms_norm(X, WEIGHT)
        with pytest.raises(ArgumentError, match="eps must be positive; got 0"):
            isolith.rms_norm(X, WEIGHT, 0.0)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "rms_norm: missing a required argument: 'x'"),
        ((X, WEIGHT, 1e-6, False, 1), "rms_norm: too many positional arguments"),
        ((X, None), "rms_norm: weight must be Tensor; got NoneType."),
        ((X, WEIGHT, "small"), "rms_norm: eps must be float; got str."),
        ((X, WEIGHT, [1e-6]), "rms_norm: eps must be float; got list."),
        ((X.numpy(), WEIGHT), "rms_norm: x must be Tensor; got ndarray."),
    ],
)
def test_wrong_kind_of_argument_is_named(args, says):
    with pytest.raises(ArgumentError) as caught:
        isolith.rms_norm(*args)
    assert str(caught.value).startswith(says)


def test_tensors_on_two_devices_are_an_error():
    with pytest.raises(ArgumentError) as caught:
        isolith.rms_norm(X, WEIGHT.to("meta"))
    assert str(caught.value) == "rms_norm: every tensor must be on one device; x is on cpu and weight on meta."


def test_meta_tensors_give_meta_results():
    assert isolith.rms_norm(X.to("meta"), WEIGHT.to("meta")).device.type == "meta"


def test_memory_of_choices_is_bounded(backend, dispatcher):
    with using(dispatcher(backend(marks(1.0)))) as active:
        active.memo = dict.fromkeys(range(MEMO_LIMIT))
        isolith.rms_norm(X, WEIGHT)
        assert len(active.memo) == 1


def test_handle_runs_the_kernels_own_function(backend, dispatcher):
    kernel = marks(1.0)
    with using(dispatcher(backend(kernel))):
        handle = isolith.bind(isolith.rms_norm, X, WEIGHT)
    assert handle.func is kernel.fn
    assert handle.kernel == "test.rms_norm"


def test_handle_checks_under_debug(backend, dispatcher):
    with using(dispatcher(backend(marks(1.0)), debug=True)):
        handle = isolith.bind(isolith.rms_norm, X, WEIGHT)
        with pytest.raises(ArgumentError, match="hidden is 8 in x but 7 in weight"):
            handle(X, WEIGHT[:7])


def test_override_ends_with_its_block():
    with isolith.override(kernels={"rms_norm": "reference"}) as inner:
        assert inner.settings.pins == {"rms_norm": "reference"}
    assert isolith.dispatch.dispatcher().settings.pins == {}


def test_override_holds_in_its_own_thread_alone():
    seen = []
    with isolith.override(fallback="error"):
        thread = threading.Thread(target=lambda: seen.append(isolith.dispatch.dispatcher().settings.fallback))
        thread.start()
        thread.join()
    assert seen == ["warn"]


def test_override_to_a_backend_that_is_not_there_is_an_error():
    with pytest.raises(PluginError, match="there is no backend 'gpu'"), isolith.override(backend="gpu"):
        pass


def test_explain_lists_the_chosen_and_why_others_are_not(backend, dispatcher):
    half_only = marks(1.0, requires=Requires(dtypes=(torch.float16,)))
    with using(dispatcher(backend(half_only))):
        explanation = isolith.explain(isolith.rms_norm, X, WEIGHT)
    assert str(explanation) == ("rms_norm on cpu\n   test.rms_norm: x is float32; takes float16\n-> reference: chosen")
    assert explanation.as_dict()["chosen"] == "reference"


def test_explain_refuses_an_illegal_call():
    with pytest.raises(ArgumentError, match="hidden is 8 in x but 7 in weight"):
        isolith.explain(isolith.rms_norm, X, WEIGHT[:7])


def test_recording_counts_what_ran(backend, dispatcher):
    with using(dispatcher(backend(marks(1.0)))), isolith.record() as calls:
        isolith.rms_norm(X, WEIGHT)
        isolith.rms_norm(X[:2], WEIGHT)
    assert calls == {("rms_norm", "test.rms_norm"): 2}


def test_recording_names_the_step_that_ran_after_a_refusal(backend, dispatcher):
    with using(dispatcher(backend(refuses, marks(2.0)))), isolith.record() as calls:
        isolith.rms_norm(X, WEIGHT)
    assert list(calls) == [("rms_norm", "test.rms_norm")]


@implements(isolith.kv_cache_write)
def writes_then_refuses(cache, x, slot_mapping, scale_format="ue8m0", amax_floor=None):
    cache.zero_()
    raise Unsupported("too late")


def test_kernel_that_refuses_after_it_has_written_is_an_error(backend, dispatcher):
    call = torch.ones(1, 2, 4), torch.ones(1, 4), torch.tensor([0])
    with (
        using(dispatcher(backend(writes_then_refuses))),
        pytest.raises(RuntimeError, match="refused after it had written"),
    ):
        isolith.kv_cache_write(*call)


def test_kernel_for_another_architecture_is_passed_over(backend, dispatcher):
    newer = marks(1.0, requires=Requires(arch=">=9"))
    with using(dispatcher(backend(newer, marks(2.0), arch=lambda: "8.0"))):
        assert isolith.rms_norm(X, WEIGHT).unique().tolist() == [2.0]


def test_choice_is_remembered_by_strides_too(backend, dispatcher):
    def rows_of_16(x, **_):
        return None if x.stride(0) == 16 else f"stride={x.stride(0)}; takes 16"

    with using(dispatcher(backend(marks(1.0, why_not=rows_of_16), marks(2.0)))):
        seen = [isolith.rms_norm(torch.zeros(4, n)[:, :8], WEIGHT)[0, 0].item() for n in (16, 24)]
    assert seen == [1.0, 2.0]
