import pytest
import torch

from isolith.errors import ArgumentError
from isolith.shapes import evaluate, parse


def bind(line, **arguments):
    return parse(line).bind("op", arguments)


def test_names_take_the_sizes_of_the_tensors():
    assert bind("x[tokens hidden] -> y[tokens]", x=torch.zeros(3, 4)) == {"tokens": 3, "hidden": 4}


def test_leading_axes_are_a_tuple():
    assert bind("x[... hidden] -> y[...]", x=torch.zeros(2, 3, 4))["..."] == (2, 3)


def test_integer_argument_is_an_axis():
    assert bind("x[tokens k] -> y[k]", x=torch.zeros(3, 4), k=4)["k"] == 4


@pytest.mark.parametrize(
    ("line", "arguments", "says"),
    [
        ("x[t h] w[h] -> y[t]", {"x": (3, 4), "w": (5,)}, "op: h is 4 in x but 5 in w."),
        ("x[t h] -> y[t]", {"x": (3,)}, "op: x must be [t h], 2 axes; got shape (3,)."),
        ("x[... t h] -> y[t]", {"x": (3,)}, "op: x must be [... t h], at least 2 axes; got shape (3,)."),
        ("x[... h] w[...] -> y[t]", {"x": (3, 4), "w": (5,)}, "op: leading axes are (3,) in x but (5,) in w."),
        ("x[t h] w[2*h] -> y[t]", {"x": (3, 4), "w": (9,)}, "op: axis 0 of w [2*h] must be 2*h = 8; got 9."),
        ("w[2*h] x[t h] -> y[t]", {"x": (3, 4), "w": (9,)}, "op: axis 0 of w [2*h] must be 2*h = 8; got 9."),
        ("x[t 3] -> y[t]", {"x": (3, 4)}, "op: axis 1 of x [t 3] must be 3; got 4."),
        ("x[n n] -> y[n]", {"x": (3, 4)}, "op: n is both 3 and 4 in x."),
        ("x[t k] -> y[t]", {"x": (3, 4), "k": 5}, "op: k is 5 in the arguments but 4 in x."),
    ],
)
def test_disagreement_is_named(line, arguments, says):
    given = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    with pytest.raises(ArgumentError) as caught:
        bind(line, **given)
    assert str(caught.value) == says


def test_absent_optional_tensor_binds_nothing():
    assert bind("x[t] bias?[e] -> y[t]", x=torch.zeros(3), bias=None) == {"t": 3}


def test_any_axis_binds_nothing():
    assert bind("x[t _] w[_] v[*] -> y[t]", x=torch.zeros(3, 4), w=torch.zeros(5), v=torch.zeros(1, 2)) == {"t": 3}


def test_expression_with_an_unknown_name_is_not_checked():
    assert evaluate("2*unknown", {}) is None


@pytest.mark.parametrize("line", ["x[t]", "x[t -> y[t]", "x -> y[t]"])
def test_malformed_line_is_refused(line):
    with pytest.raises(ValueError, match="got"):
        parse(line)


def test_malformed_axis_is_refused():
    with pytest.raises(ValueError, match="an axis is"):
        evaluate("a/b", {"a": 1, "b": 1})
