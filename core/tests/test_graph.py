import pytest
import torch

import isolith
from isolith import OPERATORS, Make

X, WEIGHT = torch.randn(4, 8), torch.randn(8)


def nodes(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def capture(function, *args):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=keep)
    return compiled(*args), graphs


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_one_node_of_a_compiled_graph(name):
    operator = OPERATORS[name]
    sample = next(
        s for s in operator.samples(Make(operator.sample_dtypes[0])) if not s.tags & {"slow", "device", "model"}
    )
    arguments = operator.arguments(**sample.arguments)
    torch._dynamo.reset()
    _, (graph,) = capture(lambda given: operator(**given), arguments)
    assert [target for target in nodes(graph) if "isolith" in target] == [f"isolith.{name}.default"]
    assert not [target for target in nodes(graph) if "aten" in target]


def test_operator_is_one_node_of_an_exported_program():
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return isolith.rms_norm(x * 2, weight)

    program = torch.export.export(Model(), (X, WEIGHT))
    assert "isolith.rms_norm.default" in nodes(program)


def test_compiled_call_gives_what_the_eager_call_gives():
    compiled = torch.compile(lambda x, w: isolith.rms_norm(x, w), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, WEIGHT), isolith.rms_norm(X, WEIGHT))


def test_compiled_call_takes_another_length_without_compiling_again():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, w: isolith.rms_norm(x, w), fullgraph=True, backend=count, dynamic=True)
    for tokens in (4, 5, 6):
        compiled(torch.randn(tokens, 8), WEIGHT)
    assert count.frame_count == 1


def test_bad_argument_is_named_while_tracing():
    with pytest.raises(Exception, match="rms_norm: hidden is 8 in x but 7 in weight"):
        capture(lambda x, w: isolith.rms_norm(x, w), X, WEIGHT[:7].clone())


def test_eager_call_does_not_enter_the_torch_library(monkeypatch):
    monkeypatch.setattr(type(isolith.rms_norm), "torch_op", property(lambda self: pytest.fail("entered")))
    isolith.rms_norm(X, WEIGHT)


def test_node_checks_metadata_before_anything_runs():
    with pytest.raises(isolith.ArgumentError, match="rms_norm: hidden is 8 in x but 7 in weight"):
        isolith.rms_norm.torch_op(X.to("meta"), WEIGHT[:7].to("meta"))
