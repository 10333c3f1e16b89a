import pytest
import torch
from benches import TINY_V4, TINY_V32, setting, workload

from isolith.models import MODELS
from isolith.ops import OPERATORS
from isolith_conformance.bench.fill import Fill
from isolith_conformance.bench.memory import bytes_needed
from isolith_conformance.bench.workloads import Setting, workloads

SETTINGS = [
    setting(TINY_V4, "decode"),
    setting(TINY_V4, "prefill", tokens=70),
    setting(TINY_V32, "prefill", tokens=70),
]
CALLS = [
    pytest.param(one, id=f"{at.model.name}-{at.phase}-{one.operator.name}-{one.label}")
    for at in SETTINGS
    for one in workloads(at)
]


def reached(*models):
    return {
        one.operator.name
        for model in models
        for phase in ("decode", "prefill")
        for one in workloads(Setting(model=model, phase=phase, context=4096, tokens=2, experts=model.experts))
    }


def sizes(arguments):
    return {n: (v.shape, v.dtype, v.nbytes) for n, v in arguments.items() if isinstance(v, torch.Tensor)}


def test_every_operator_is_reached():
    assert reached(*MODELS.values()) == set(OPERATORS)


def test_v32_has_no_hyper_connections():
    assert not reached(MODELS["v3.2"]) & {"hc_pre", "hc_post", "sinkhorn", "kv_compress"}


@pytest.mark.parametrize("one", CALLS)
def test_call_is_legal(one):
    one.operator.validate(one.operator.arguments(**one.make(Fill())), values=True)


@pytest.mark.parametrize("one", CALLS)
def test_call_has_its_size_before_it_is_made(one):
    assert sizes(one.make(Fill("meta"))) == sizes(one.make(Fill()))


def test_bytes_needed_count_the_arguments():
    one = workload(setting(), "fused_moe")
    assert bytes_needed(one) >= sum(size[2] for size in sizes(one.make(Fill())).values())


def test_no_two_calls_have_one_name():
    names = [(one.operator.name, one.label) for one in workloads(SETTINGS[0])]
    assert len(set(names)) == len(names)


def test_fewer_experts_are_said():
    notes = {one.operator.name: one.note for one in workloads(setting(experts=4))}
    assert notes["fused_moe"] == "4 of 8 experts"


def test_norms_do_not_speak_of_experts():
    notes = {one.operator.name: one.note for one in workloads(setting(experts=4))}
    assert notes["rms_norm"] == ""


def test_routing_uses_every_expert_that_it_can():
    assert len(workload(setting(tokens=4), "fused_moe").make(Fill())["topk_idx"].unique()) == 8


def test_fp8_codes_are_no_nan():
    assert not Fill().codes(4, 2**16).float().isnan().any()


def test_repeated_values_make_no_equal_rows():
    rows = Fill().normal(3, 2**21)
    assert not torch.equal(rows[0], rows[2])


def test_chosen_entries_are_distinct():
    chosen = Fill().chosen(torch.tensor([100]), 16)
    assert len(chosen.unique()) == 16


def test_chosen_entries_end_where_there_are_no_more():
    assert int((Fill().chosen(torch.tensor([10]), 16) >= 0).sum()) == 10
