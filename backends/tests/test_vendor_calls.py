"""Binding of vendor calls to what an installation really has."""

import functools
import sys
import types

import pytest
import torch

from isolith.errors import Unsupported
from isolith_backends.vendor_calls import VendorCall, first_missing

library = torch.library.Library("vendor_calls_test", "DEF")
for schema in (
    "scaled(Tensor x, *, float by=2.0, int[2] part=[]) -> Tensor",
    "older(Tensor x) -> Tensor",
    "elsewhere(Tensor x) -> Tensor",
    "needs(Tensor x, Tensor? bias, int k) -> Tensor",
):
    library.define(schema)
seen: list[dict[str, object]] = []


def scaled(x, by=2.0, part=()):
    seen.append({"by": by, "part": tuple(part)})
    return x * by


library.impl("scaled", scaled, "CompositeExplicitAutograd")
library.impl("older", lambda x: x + 1, "CompositeExplicitAutograd")
library.impl("elsewhere", lambda x: x, "CUDA")
library.impl("needs", lambda x, bias, k: x + k, "CompositeExplicitAutograd")


def on(*names: str, passes: tuple[str, ...] = ("x",)) -> VendorCall:
    return VendorCall(tuple(f"vendor_calls_test::{name}" for name in names), passes)


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("vendor_calls_module")
    monkeypatch.setitem(sys.modules, "vendor_calls_module", made)
    return made


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (on("absent"), "vendor_calls_test::absent is not registered"),
        (on("elsewhere"), "vendor_calls_test::elsewhere has no kernel for this device"),
        (on("older", passes=("x", "by")), "vendor_calls_test::older has no argument by"),
        (
            on("absent", "elsewhere"),
            "vendor_calls_test::absent is not registered; vendor_calls_test::elsewhere has no kernel for this device",
        ),
        (
            VendorCall(("vendor_calls_nowhere:f",), ()),
            "vendor_calls_nowhere does not import: No module named 'vendor_calls_nowhere'",
        ),
        (VendorCall(("sys:no_such_function",), ()), "sys has no no_such_function"),
        (VendorCall(("math:log",), ()), "math:log has no signature that Python can read"),
    ],
    ids=["operator", "kernel", "argument", "all", "module", "function", "no_signature"],
)
def test_what_is_missing_is_a_sentence(call, says):
    assert call.missing() == says


def test_call_that_is_here_lacks_nothing():
    assert on("scaled", passes=("x", "by")).missing() is None


def test_second_name_serves_where_the_first_is_absent():
    assert on("absent", "older")(x=torch.zeros(())).item() == 1


def test_first_name_that_has_the_arguments_is_taken():
    assert on("older", "scaled", passes=("x", "by"))(x=torch.ones(()), by=5.0).item() == 5


@pytest.mark.parametrize("by", [2.0, 3.0])
def test_value_reaches_the_operator_whether_it_is_the_default_or_not(by):
    on("scaled", passes=("x", "by"))(x=torch.ones(()), by=by)
    assert seen[-1]["by"] == by


def test_what_equals_a_default_is_not_passed(module):
    given: list[dict[str, object]] = []
    module.g = recording(given, lambda x, limit=7.0, part=(): x)
    VendorCall(("vendor_calls_module:g",), ("x", "limit", "part"))(x=1, limit=7.0, part=[])
    assert given == [{"x": 1}]


def recording(given, function):
    @functools.wraps(function)
    def call(**arguments):
        given.append(arguments)
        return function(**arguments)

    return call


def test_none_and_zero_are_passed_where_there_is_no_default():
    assert VendorCall(("vendor_calls_test::needs",), ("x", "bias", "k"))(x=torch.ones(()), bias=None, k=0).item() == 1


def test_call_of_what_is_missing_moves_on():
    with pytest.raises(Unsupported, match="absent is not registered"):
        on("absent")(x=torch.ones(()))


def test_first_call_that_cannot_be_made_is_told_of_several():
    assert first_missing(on("scaled", passes=("x", "by")), on("absent"), on("none")) == on("absent").missing()
    assert first_missing(on("scaled", passes=("x", "by"))) is None


def test_python_function_without_an_argument_is_refused(module):
    module.f = lambda x: x
    says = "vendor_calls_module:f has no argument limit"
    assert VendorCall(("vendor_calls_module:f",), ("x", "limit")).missing() == says


def test_python_function_of_positional_arguments_is_refused(module):
    exec("def f(x, /): return x", vars(module))
    assert VendorCall(("vendor_calls_module:f",), ("x",)).missing() == "vendor_calls_module:f takes x by position alone"


def test_python_function_that_takes_anything_is_called_with_everything(module):
    module.f = lambda **given: given
    assert VendorCall(("vendor_calls_module:f",), ("x", "limit"))(x=1, limit=None) == {"x": 1, "limit": None}


@pytest.fixture
def placed(module):
    """A function whose first two arguments go by place, as the adapter calls it, and what it was given."""
    exec("def f(x, y, /, *, limit, d=None): return (x, y, limit, d)", vars(module))
    return lambda known: VendorCall(("vendor_calls_module:f",), ("x", "other", "limit"), ("x", "other"), lambda: known)


def test_call_that_is_known_by_place_is_made_by_place(placed):
    assert placed(True)(limit=None, other=2, x=1, d=None) == (1, 2, None, None)


def test_call_by_place_that_is_not_known_here_is_refused(placed):
    assert placed(False).missing() == "vendor_calls_module:f takes x, y by position alone"


def test_names_that_are_not_public_are_no_hindrance_by_place(module):
    module.f = lambda a, b, limit=7: (a, b, limit)
    call = VendorCall(("vendor_calls_module:f",), ("x", "y", "limit"), ("x", "y"), lambda: True)
    assert call(x=1, y=2, limit=3) == (1, 2, 3)


def test_function_of_fewer_places_is_not_called_by_place(module):
    module.f = lambda a, limit=7: a
    call = VendorCall(("vendor_calls_module:f",), ("x", "y"), ("x", "y", "z"), lambda: True)
    assert call.missing() == "vendor_calls_module:f takes 2 arguments by position, not 3"


def test_known_names_go_by_keyword_before_places(module):
    module.f = lambda y, x: (x, y)
    assert VendorCall(("vendor_calls_module:f",), ("x", "y"), ("x", "y"), lambda: True)(x=1, y=2) == (1, 2)
