"""What must hold of every operator, from its own samples and errors. A new operator is tested by being exported."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from isolith import OPERATORS, ArgumentError, Make
from isolith.dispatch import dispatcher
from isolith.shapes import evaluate

CASES = [
    pytest.param(name, sample.name, dtype, id=f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}")
    for name, operator in OPERATORS.items()
    for dtype in operator.sample_dtypes
    for sample in operator.samples(Make(dtype, seed=name))
    if not sample.tags & {"slow", "device"}
]
ERRORS = [
    pytest.param(name, sample.name, id=f"{name}-{sample.name}")
    for name, operator in OPERATORS.items()
    for sample in operator.errors(Make(torch.float32, seed=name))
]
PARTS = ("reference", "fake", "check", "check_values", "cost", "samples", "errors")


def sample_of(name, label, dtype):
    operator = OPERATORS[name]
    made = operator.samples(Make(dtype, seed=name))
    return operator, operator.arguments(**next(s for s in made if s.name == label).arguments)


def copied(arguments):
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def tensors_of(result):
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]


def metadata(result):
    return [(tuple(t.shape), t.dtype, t.device.type, tuple(t.stride())) for t in tensors_of(result)]


def in_float64(operator, arguments):
    """The same values with every argument widened that may be float64."""
    widened = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and torch.float64 in operator.dtypes[name]:
            widened[name] = value.double()
        if name == "out_dtype":
            widened[name] = "float64"
    return widened


@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_sample_is_legal_and_the_fake_tells_what_the_reference_returns(name, label, dtype):
    operator, arguments = sample_of(name, label, dtype)
    operator.validate(arguments)
    if operator.check_values:
        operator.check_values(**arguments)
    meta = tree_map_only(
        Tensor, lambda t: t.to("meta") if t.dtype != torch.uint8 else torch.empty_like(t, device="meta"), arguments
    )
    promised = [(shape, dtype, stride) for shape, dtype, _, stride in metadata(operator.fake(**meta))]
    given = [(shape, dtype, stride) for shape, dtype, _, stride in metadata(operator.reference(**copied(arguments)))]
    assert promised == given


@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_reference_writes_only_what_it_declares_and_returns_no_alias(name, label, dtype):
    operator, arguments = sample_of(name, label, dtype)
    given = copied(arguments)
    outputs = tensors_of(operator.reference(**given))
    for key, value in arguments.items():
        if isinstance(value, Tensor) and key not in operator.mutates:
            # Bytes, since NaN differs from itself.
            assert torch.equal(given[key].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), key
    storages = {v.untyped_storage().data_ptr() for v in given.values() if isinstance(v, Tensor) and v.numel()}
    assert not storages & {t.untyped_storage().data_ptr() for t in outputs if t.numel()}


@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_outputs_have_the_shapes_that_the_declaration_states(name, label, dtype):
    operator, arguments = sample_of(name, label, dtype)
    sizes = operator.parsed_shapes.bind(name, arguments)
    outputs = tensors_of(operator.reference(**copied(arguments)))
    assert len(outputs) == len(operator.parsed_shapes.outputs)
    for shape, output in zip(operator.parsed_shapes.outputs, outputs, strict=True):
        if shape.open_rank and shape.axes[0] == "*":
            continue
        wanted = list(sizes["..."]) if shape.open_rank else []
        wanted += [evaluate(axis, sizes) if axis != "_" else None for axis in shape.axes[shape.open_rank :]]
        assert len(wanted) == output.dim(), shape.name
        assert [w for w in wanted if w is not None] == [
            size for w, size in zip(wanted, output.shape, strict=True) if w is not None
        ], shape.name


@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_masks_of_what_is_defined_fit_the_outputs(name, label, dtype):
    operator, arguments = sample_of(name, label, dtype)
    if operator.defined is None:
        return
    masks = operator.defined(**copied(arguments))
    given = copied(arguments)
    results = tensors_of(operator.reference(**given)) + [given[key] for key in operator.mutates]
    assert len(masks) == len(results)
    for mask, result in zip(masks, results, strict=True):
        if mask is not None:
            assert mask.dtype == torch.bool
            assert mask.shape == result.shape[: mask.dim()]


@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_float64_gives_float64_and_cost_counts_from_metadata(name, label, dtype):
    operator, arguments = sample_of(name, label, dtype)
    wide = in_float64(operator, copied(arguments))
    operator.validate(wide)
    for output in tensors_of(operator.reference(**wide)):
        assert output.dtype not in (torch.float32, torch.bfloat16, torch.float16) or name.startswith("act_quant")
    cost = operator.cost(**arguments)
    assert min(cost.flops, cost.bytes_read, cost.bytes_written) >= 0
    assert all(isinstance(n, int) for n in (cost.flops, cost.bytes_read, cost.bytes_written))


@pytest.mark.parametrize(("name", "label"), ERRORS)
def test_bad_call_gets_its_sentence_before_anything_is_written(name, label):
    operator = OPERATORS[name]
    sample = next(s for s in operator.errors(Make(torch.float32, seed=name)) if s.name == label)
    given = copied(sample.arguments)
    with pytest.raises(ArgumentError) as caught:
        operator(**given)
    assert str(caught.value) == sample.says
    for key, value in sample.arguments.items():
        if isinstance(value, Tensor):
            assert torch.equal(given[key].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_library_accepts_the_operator_on_a_sample(name):
    operator = OPERATORS[name]
    dtype = operator.sample_dtypes[0]
    for sample in [s for s in operator.samples(Make(dtype, seed=name)) if not s.tags & {"slow", "device", "model"}][:2]:
        torch.library.opcheck(operator.torch_op, (), operator.arguments(**sample.arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_torch_library_accepts_the_operator_on_every_sample(name, label, dtype):
    operator, arguments = sample_of(name, label, dtype)
    torch.library.opcheck(operator.torch_op, (), arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_parts_stand_in_order_with_one_signature(name):
    operator = OPERATORS[name]
    module = inspect.getmodule(operator.reference)
    tree = ast.parse(Path(module.__file__).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in PARTS]
    assert functions == [part for part in PARTS if part in functions]
    assert set(PARTS) - set(functions) <= {"check_values"}
    # An annotation of results aside, every part that takes the call's arguments takes the same ones.
    parts = (operator.fake, operator.check, operator.cost, operator.check_values, operator.selects_by, operator.defined)
    for part in (*parts, *operator.variants):
        if part is not None:
            theirs = inspect.signature(part).parameters
            ours = operator.signature.parameters
            assert [(p.name, p.default) for p in theirs.values()] == [(p.name, p.default) for p in ours.values()]
    assert set(operator.dtypes) == set(operator.tensor_arguments)
    assert [shape.name for shape in operator.parsed_shapes.inputs] == list(operator.tensor_arguments)
    assert "Source:" in operator.doc


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_a_public_name(name):
    import isolith

    assert getattr(isolith, name) is OPERATORS[name]
    assert name in isolith.__all__
    assert dispatcher().registry.operators[name] is OPERATORS[name]
