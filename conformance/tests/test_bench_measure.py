import time

import pytest
import torch
from benches import LIMITS, TINY_V32, row_of, setting, workload

from isolith.operator import Cost
from isolith.ops import norm
from isolith_conformance.bench.clock import Clock, timing
from isolith_conformance.bench.fill import Fill
from isolith_conformance.bench.machine import measure_limits, rate_of, roofline
from isolith_conformance.bench.memory import check_memory
from isolith_conformance.bench.part import part_of
from isolith_conformance.bench.peer import Peer
from isolith_conformance.bench.peers import PEERS
from isolith_conformance.bench.record import BenchError
from isolith_conformance.bench.workloads import workloads


def right(x, weight, eps=1e-6, round_before_weight=False):
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def off_by_two_percent(x, weight, eps=1e-6, round_before_weight=False):
    return (right(x, weight, eps).float() * 1.02).to(x.dtype)


def one_token_wrong(x, weight, eps=1e-6, round_before_weight=False):
    y = right(x, weight, eps)
    y[-1] = 0
    return y


def raising(x, weight, eps=1e-6, round_before_weight=False):
    raise ValueError("the driver <fell> over")


def test_right_kernel_is_right():
    assert row_of(setting(), "rms_norm", kernel=right).state == "RIGHT"


def test_kernel_that_ran_is_named():
    assert row_of(setting(), "rms_norm", kernel=right).kernel == "toy.right"


@pytest.mark.parametrize("kernel", [off_by_two_percent, one_token_wrong])
def test_wrong_kernel_is_wrong(kernel):
    assert row_of(setting(), "rms_norm", kernel=kernel).state == "WRONG"


def test_kernel_that_is_wrong_after_its_first_call_is_wrong():
    calls = []

    def tired(x, weight, eps=1e-6, round_before_weight=False):
        calls.append(1)
        return (right if len(calls) < 3 else one_token_wrong)(x, weight, eps)

    assert row_of(setting(), "rms_norm", kernel=tired).state == "WRONG"


def test_kernel_that_raises_is_an_error_with_its_reason():
    row = row_of(setting(), "rms_norm", kernel=raising)
    assert (row.state, row.problem) == ("ERROR", "ValueError: the driver <fell> over")


def test_percent_is_of_the_operators_own_cost():
    row = row_of(setting(), "rms_norm", kernel=right)
    found = workload(setting(), "rms_norm")
    least, _ = roofline(norm.rms_norm.cost(**norm.rms_norm.arguments(**found.make(Fill()))), LIMITS)
    assert row.percent == pytest.approx(100 * least / row.time.median)


def test_slow_kernel_has_a_small_percent():
    def slow(x, weight, eps=1e-6, round_before_weight=False):
        time.sleep(0.01)
        return right(x, weight, eps)

    assert row_of(setting(), "rms_norm", kernel=slow).time.median >= 0.01


def test_reference_of_a_slow_kernel_is_faster():
    def slow(x, weight, eps=1e-6, round_before_weight=False):
        time.sleep(0.05)
        return right(x, weight, eps)

    assert row_of(setting(), "rms_norm", kernel=slow).ratio < 1


@pytest.mark.parametrize("operator", ["kv_cache_write", "kv_compress"])
def test_what_is_written_in_place_is_checked(operator):
    assert row_of(setting(), operator).state == "RIGHT"


def test_kernel_that_writes_nothing_is_wrong():
    def idle(cache, x, slot_mapping, scale_format="ue8m0", amax_floor=None):
        return None

    assert row_of(setting(), "kv_cache_write", kernel=idle).state == "WRONG"


def test_selection_of_the_smallest_is_wrong():
    def smallest(scores, lengths, k, candidates=None, candidate_block=1):
        chosen = scores.topk(k, dim=-1, largest=False).indices
        return chosen.int(), torch.full_like(lengths, k, dtype=torch.int32)

    assert row_of(setting(), "indexer_topk", kernel=smallest).state == "WRONG"


@pytest.mark.parametrize(
    ("operator", "label"),
    [
        ("fused_moe", "fp8"),
        ("hybrid_attention", "CSA"),
        ("lightning_indexer", ""),
        ("sparse_attn", "CSA"),
        ("moe_gate", ""),
    ],
)
def test_part_of_a_prompt_is_what_the_whole_has_there(operator, label):
    row = row_of(setting(phase="prefill", tokens=40), operator, label, reference_seconds=0)
    assert (row.state, row.checked) == ("RIGHT", "itself: the reference on 4 of 40 tokens is what ran") or (
        row.kernel,
        row.checked,
    ) == ("composition", "the reference on 4 of 40 tokens")


def test_part_of_latent_attention_is_what_the_whole_has_there():
    row = row_of(setting(TINY_V32, "prefill", tokens=40), "mla_attention", "dense", reference_seconds=0)
    assert row.state == "RIGHT"


def test_without_reference_a_wrong_last_token_is_seen():
    row = row_of(setting(phase="prefill", tokens=40), "rms_norm", kernel=one_token_wrong, reference_seconds=0)
    assert row.state == "WRONG"


def test_without_reference_there_is_no_ratio():
    assert row_of(setting(), "rms_norm", kernel=right, reference_seconds=0).ratio is None


def test_rows_that_know_each_other_have_no_part():
    found = workload(setting(phase="prefill", tokens=40), "moe_permute")
    assert part_of(found.operator, found.operator.arguments(**found.make(Fill()))) is None


def test_reference_beyond_its_budget_is_left_out():
    row = row_of(setting(phase="prefill", tokens=40), "fused_moe", "bf16", reference_seconds=1e-9)
    assert row.reference_note.endswith("--reference-seconds allows it")


def peers_of(module, *marks):
    return [
        pytest.param(peer, id=f"{peer.operator}-{peer.name}", marks=marks) for peer in PEERS if peer.module == module
    ]


# transformers takes seconds to import.
@pytest.mark.parametrize("peer", [*peers_of("torch"), *peers_of("transformers", pytest.mark.slow)])
def test_peer_runs(peer):
    if not peer.installed:
        pytest.skip(f"{peer.module} is not installed")
    products = ("fused_moe", "grouped_gemm", "quant_linear", "grouped_output_proj")
    row = row_of(setting(tokens=1), peer.operator, "bf16" if peer.operator in products else "", peers=(peer,))
    assert row.peers[0].why_not is None


def test_peer_that_raises_is_told():
    def prepare(given):
        raise OSError("not today")

    peer = Peer(operator="rms_norm", name="other", computes="nothing", prepare=prepare)
    assert row_of(setting(), "rms_norm", peers=(peer,)).peers[0].why_not == "OSError: not today"


def test_memory_bound_time_is_bytes_over_bandwidth():
    assert roofline(Cost(flops=1, bytes_read=10**10, bytes_written=0), LIMITS) == (1.0, "memory")


def test_written_bytes_count_with_the_copy():
    assert roofline(Cost(flops=1, bytes_read=10**9, bytes_written=10**9), LIMITS) == (0.25, "memory")


def test_compute_bound_time_is_flops_over_the_rate_of_the_format():
    assert roofline(Cost(flops=10**11, bytes_read=1, bytes_written=0, math="bfloat16"), LIMITS) == (1.0, "compute")


def test_format_without_a_rate_has_that_of_bfloat16():
    assert rate_of(LIMITS, "float8") == 100.0


def test_limits_are_measured():
    assert measure_limits(Clock(buffer_bytes=0), scale=1e-3).read_gbs > 0


def test_format_that_torch_lacks_is_said():
    assert "float4" in measure_limits(Clock(buffer_bytes=0), scale=1e-3).assumed


def test_spread_is_between_the_quartiles():
    assert timing([1.0, 2.0, 3.0, 4.0, 100.0]).spread == 2.0


def test_call_is_repeated_at_least_three_times():
    assert Clock(buffer_bytes=0).measure(lambda: time.sleep(0.01), 0.0)[0].repeats == 3


@pytest.mark.parametrize(
    ("operator", "option"), [("fused_moe", "--experts"), ("indexer_score", "--context"), ("hc_pre", "--tokens")]
)
def test_too_much_memory_is_refused_with_the_option_that_lowers_it(operator, option):
    at = setting(phase="prefill", context=1024, tokens=200 if operator == "hc_pre" else 2)
    calls = [one for one in workloads(at) if one.operator.name == operator]
    with pytest.raises(BenchError, match=f"needs [0-9,]+ bytes, and 9 are free; {option} lowers that"):
        check_memory(at, calls, 10)


class Events:
    """A device's module whose events say that every call takes 3 ms."""

    log = ()

    class Event:
        def __init__(self, enable_timing):
            self.timing = enable_timing

        def record(self):
            Events.log = (*Events.log, "record")

        def elapsed_time(self, end):
            return 3.0

    @staticmethod
    def synchronize():
        Events.log = (*Events.log, "synchronize")


@pytest.fixture
def eventful():
    clock = Clock(buffer_bytes=0)
    clock.module, Events.log = Events, ()
    return clock


def test_device_tells_the_time_by_its_events(eventful):
    assert eventful.measure(lambda: None, 0.0)[0].median == 3e-3


def test_device_has_finished_before_its_events_are_read(eventful):
    eventful.once(lambda: None)
    assert Events.log == ("record", "record", "synchronize")


def test_caches_are_cold_before_a_call():
    clock = Clock(buffer_bytes=4096)
    clock.cool, seen = lambda: seen.append("cold"), []
    clock.once(lambda: seen.append("call"))
    assert seen == ["cold", "call"]
