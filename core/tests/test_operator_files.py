"""What must hold of every operator, from its own samples and errors. A new operator is tested by being exported."""

import ast
import inspect
from functools import cache, lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from isolith import OPERATORS, ArgumentError, Make, override
from isolith.dispatch import dispatcher
from isolith.operator import in_float64
from isolith.shapes import evaluate
from isolith_conformance import bits
from isolith_conformance.judge import judge

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
PARTS = ("reference", "fake", "check", "check_values", "cost", "samples", "errors", "relations", "invariants")
OPTIONAL = {"check_values", "relations", "invariants"}


@cache
def labels(name):
    """The samples of an operator that a test can afford, as (name, tags)."""
    operator = OPERATORS[name]
    made = operator.samples(Make(operator.sample_dtypes[0], seed=name))
    return [(sample.name, sample.tags) for sample in made if not sample.tags & {"slow", "device", "invariants"}]


def cases():
    """Every sample in the operator's first dtype; the others' first sample, and all of them in the slow sweep."""
    for name, operator in OPERATORS.items():
        for dtype in operator.sample_dtypes:
            first = dtype == operator.sample_dtypes[0]
            for place, (label, tags) in enumerate(labels(name)):
                slow = "model" in tags or not (first or place == 0)
                words = f"{name}-{label}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(name, label, dtype, id=words, marks=[pytest.mark.slow] if slow else [])


CASES = list(cases())
RELATIONS = [
    pytest.param(
        *(name, relation.name, dtype),
        id=f"{name}-{relation.name}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] if dtype != operator.sample_dtypes[0] else [],
    )
    for name, operator in OPERATORS.items()
    if operator.relations
    for relation in operator.relations(Make(operator.sample_dtypes[0], seed=name))
    for dtype in operator.sample_dtypes
]
MANY = [
    pytest.param(name, sample.name, id=f"{name}-{sample.name}")
    for name, operator in OPERATORS.items()
    if operator.invariants
    for sample in operator.samples(Make(operator.sample_dtypes[0], seed=name))
    if not sample.tags & {"slow", "device"}
]
ERRORS = [
    pytest.param(name, sample.name, id=f"{name}-{sample.name}")
    for name, operator in OPERATORS.items()
    for sample in operator.errors(Make(torch.float32, seed=name))
]


@lru_cache(maxsize=1)
def samples_of(name, dtype):
    return {sample.name: sample for sample in OPERATORS[name].samples(Make(dtype, seed=name))}


@lru_cache(maxsize=64)
def run_of(name, label, dtype):
    """(operator, arguments before, arguments after, outputs) of one run of the reference."""
    operator, arguments = sample_of(name, label, dtype)
    given = copied(arguments)
    return operator, arguments, given, tensors_of(operator.reference(**given))


def sample_of(name, label, dtype):
    operator = OPERATORS[name]
    return operator, copied(operator.arguments(**samples_of(name, dtype)[label].arguments))


def copied(arguments):
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def tensors_of(result):
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]


def metadata(result):
    return [(tuple(t.shape), t.dtype, tuple(t.stride())) for t in tensors_of(result)]


@pytest.mark.parametrize(("name", "label", "dtype"), CASES, scope="class")
class TestSample:
    """A class, so that the facts of one sample are tested one after another and its reference runs once."""

    def test_it_is_legal(self, name, label, dtype):
        operator, arguments = sample_of(name, label, dtype)
        operator.validate(arguments)
        if operator.check_values:
            operator.check_values(**arguments)

    def test_the_fake_tells_what_the_reference_returns(self, name, label, dtype):
        operator, arguments, _, outputs = run_of(name, label, dtype)
        meta = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), arguments)
        assert metadata(operator.fake(**meta)) == metadata(outputs)

    def test_the_reference_writes_only_what_it_declares(self, name, label, dtype):
        operator, before, after, _ = run_of(name, label, dtype)
        for key, value in before.items():
            if isinstance(value, Tensor) and key not in operator.mutates:
                # Bytes, since NaN differs from itself.
                assert torch.equal(
                    after[key].contiguous().reshape(-1).view(torch.uint8),
                    value.contiguous().reshape(-1).view(torch.uint8),
                ), key

    def test_no_output_is_an_alias_of_an_argument(self, name, label, dtype):
        _, _, after, outputs = run_of(name, label, dtype)
        storages = {v.untyped_storage().data_ptr() for v in after.values() if isinstance(v, Tensor) and v.numel()}
        assert not storages & {t.untyped_storage().data_ptr() for t in outputs if t.numel()}

    def test_outputs_have_the_shapes_that_the_declaration_states(self, name, label, dtype):
        operator, arguments, _, outputs = run_of(name, label, dtype)
        sizes = operator.parsed_shapes.bind(name, arguments)
        assert len(outputs) == len(operator.parsed_shapes.outputs)
        for shape, output in zip(operator.parsed_shapes.outputs, outputs, strict=True):
            stated = stated_sizes(shape, sizes)
            assert stated is None or len(stated) == output.dim(), shape.name
            assert stated is None or all(w in (None, g) for w, g in zip(stated, output.shape, strict=True)), shape.name

    def test_masks_of_what_is_defined_fit_the_results(self, name, label, dtype):
        operator, arguments, after, outputs = run_of(name, label, dtype)
        results = outputs + [after[key] for key in operator.mutates]
        masks = operator.defined(**copied(arguments)) if operator.defined else (None,) * len(results)
        assert len(masks) == len(results)
        for mask, result in zip(masks, results, strict=True):
            assert mask is None or (mask.dtype == torch.bool and mask.shape == result.shape[: mask.dim()])


def results_of(operator, arguments):
    """Outputs, then mutated arguments, of the reference."""
    given = copied(arguments)
    return tensors_of(operator.reference(**given)) + [given[key] for key in operator.mutates]


def assembled(operator, relation):
    """The results of the whole, made of those of the parts."""
    results, carried = [], {}
    for part in relation.parts:
        results.append(results_of(operator, operator.arguments(**{**part, **carried})))
        mutated = results[-1][len(results[-1]) - len(operator.mutates) :]
        carried = {key: value for key, value in zip(operator.mutates, mutated, strict=True) if key in relation.carry}
    return relation.assemble(results)


def differing(operator, relation):
    """What keeps the assembled results from being those of the whole, in the reference."""
    whole = operator.arguments(**relation.whole)
    made = assembled(operator, relation)
    if not relation.exact:
        return judge(operator, whole, made).problem
    expected = results_of(operator, whole)
    return bits.differing(operator, whole, expected, made)


@lru_cache(maxsize=1)
def relations_of(name, dtype):
    return {relation.name: relation for relation in OPERATORS[name].relations(Make(dtype, seed=name))}


@pytest.mark.parametrize(("name", "label", "dtype"), RELATIONS)
def test_relation_is_one_of_legal_calls_and_holds_for_the_reference(name, label, dtype):
    operator, relation = OPERATORS[name], relations_of(name, dtype).get(label)
    if relation is None:
        pytest.skip("the operator states this relation in other dtypes alone")
    for call in (relation.whole, *relation.parts):
        operator.validate(operator.arguments(**call))
    if operator.check_values:
        operator.check_values(**operator.arguments(**relation.whole))
    assert differing(operator, relation) is None


@pytest.mark.parametrize(("name", "label"), MANY)
def test_invariants_hold_for_the_reference(name, label):
    operator, arguments = sample_of(name, label, OPERATORS[name].sample_dtypes[0])
    results = results_of(operator, arguments)
    assert operator.invariants(results=results, **arguments) is None


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.invariants])
def test_invariants_see_every_integer_result_that_is_one_too_high(name):
    operator, seen = OPERATORS[name], {}
    for sample in operator.samples(Make(operator.sample_dtypes[0], seed=name)):
        if not sample.tags & {"slow", "device", "model", "invariants"}:
            arguments = operator.arguments(**sample.arguments)
            results = results_of(operator, arguments)
            for place in [place for place, result in enumerate(results) if result.dtype == torch.int32]:
                wrong = [result + 1 if at == place else result for at, result in enumerate(results)]
                seen[place] = seen.get(place) or operator.invariants(results=wrong, **arguments)
    assert seen
    assert all(seen.values()), seen


def stated_sizes(shape, sizes):
    """The sizes that a declaration states for an output: None for an axis it leaves open, None where all are."""
    if shape.open_rank and shape.axes[0] == "*":
        return None
    leading = list(sizes["..."]) if shape.open_rank else []
    return leading + [evaluate(axis, sizes) if axis != "_" else None for axis in shape.axes[shape.open_rank :]]


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
            assert torch.equal(
                given[key].contiguous().reshape(-1).view(torch.uint8), value.contiguous().reshape(-1).view(torch.uint8)
            )


def opcheck(operator, arguments):
    # A kernel may leave what is unspecified as it finds it, so that two runs differ; the references write zeros.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(value, Tensor) and value.dtype in FLOAT8 for value in arguments.values()):
        checks.remove("test_schema")  # it adds the arguments up to compare them, which torch cannot do in float8
    if any(tensor.isnan().any() for tensor in tensors_of(operator.reference(**copied(arguments)))):
        checks.remove("test_aot_dispatch_dynamic")  # it compares outputs, and NaN differs from itself
    with override(kernels=dict.fromkeys(OPERATORS, "reference")):
        torch.library.opcheck(operator.torch_op, (), arguments, test_utils=checks)


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_library_accepts_the_operator_on_a_sample(name):
    operator = OPERATORS[name]
    dtype = operator.sample_dtypes[0]
    for sample in [s for s in operator.samples(Make(dtype, seed=name)) if not s.tags & {"slow", "device", "model"}][:1]:
        opcheck(operator, operator.arguments(**sample.arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label", "dtype"), CASES)
def test_torch_library_accepts_the_operator_on_every_sample(name, label, dtype):
    opcheck(*sample_of(name, label, dtype))


@pytest.mark.parametrize("name", OPERATORS)
def test_parts_stand_in_order_with_one_signature(name):
    operator = OPERATORS[name]
    module = inspect.getmodule(operator.reference)
    tree = ast.parse(Path(module.__file__).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in PARTS]
    assert functions == [part for part in PARTS if part in functions]
    assert set(PARTS) - set(functions) <= OPTIONAL
    ours = [(p.name, p.default) for p in operator.signature.parameters.values()]
    for variant in operator.variants:
        assert [(p.name, p.default) for p in inspect.signature(variant).parameters.values()] == ours
    parts = (operator.fake, operator.check, operator.cost, operator.check_values, operator.selects_by, operator.defined)
    for part in filter(None, parts):
        named = [p.name for p in inspect.signature(part).parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert named == [name for name in operator.signature.parameters if name in named]
    assert set(operator.dtypes) == set(operator.tensor_arguments)
    assert [shape.name for shape in operator.parsed_shapes.inputs] == list(operator.tensor_arguments)
    assert "Source:" in operator.doc


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_a_public_name(name):
    import isolith

    assert getattr(isolith, name) is OPERATORS[name]
    assert name in isolith.__all__
    assert dispatcher().registry.operators[name] is OPERATORS[name]
