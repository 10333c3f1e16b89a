"""Whether there is an MLU, which one, and what every card and release is offered; torch_mlu is made up here."""

import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from isolith import OPERATORS
from isolith.plugins import kernels_of
from isolith_backends import cambricon
from isolith_backends.cambricon import (
    attention,
    cache,
    calls,
    compressor,
    experts,
    indexer,
    moe,
    portable,
    quant,
    residual,
    rotary,
    routing,
)


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A torch_mlu that is installed and does not import, as one without the SDK."""
    (tmp_path / "torch_mlu.py").write_text("raise ImportError('libcnrt.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_mlu", raising=False)


def test_absent_package_is_a_sentence(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch_mlu", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cambricon.why_unavailable() == "torch_mlu is not installed; it comes with Cambricon's SDK"


def test_broken_sdk_is_a_sentence(broken):
    assert cambricon.why_unavailable() == (
        "torch_mlu does not import: libcnrt.so: cannot open shared object file; is the SDK's NEUWARE_HOME set?"
    )


def test_torch_mlu_is_not_imported_where_another_device_has_its_place(broken, monkeypatch):
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")
    assert cambricon.why_unavailable() == (
        "torch_mlu cannot be used beside 'npu'; torch has one place for such a device"
    )


def test_renamed_devices_are_refused(card, monkeypatch):
    card()
    monkeypatch.setitem(sys.modules, cambricon.MIGRATION, types.ModuleType("gpu_migration"))
    assert cambricon.why_unavailable() == (
        "torch_mlu.utils.gpu_migration is loaded; it renames devices in the whole process"
    )


def test_no_device_names_the_variable_that_hides_devices(card):
    card(available=False)
    assert "MLU_VISIBLE_DEVICES" in cambricon.why_unavailable()


def test_a_cuda_that_answers_for_another_device_is_not_asked(card, monkeypatch):
    card("mlu370")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert cambricon.arch() == "3.7"


def test_no_runtime_is_no_arch(monkeypatch):
    monkeypatch.delattr(torch, "mlu", raising=False)
    assert cambricon.arch() == "0"


def test_versions_name_both_packages_and_the_card(card):
    card()
    assert cambricon.versions() == {
        "torch_mlu": "1.33.1+torch2.11.0",
        "torch_mlu_ops": "1.12.1+torch2.11.0",
        "cnnl": "unknown",
        "cnnl_extra": "unknown",
        "card": "MLU590-M9DE",
    }


def test_library_that_asks_for_a_device_is_a_sentence(card):
    card()
    sys.modules["torch_mlu_ops"].get_cnnl_version = lambda: 1 / 0
    assert cambricon.versions()["cnnl"] == "unknown: division by zero"


def here(backend):
    """Every kernel, and what it lacks."""
    found, reason = kernels_of(backend)
    assert reason is None
    return {
        f"{name}.{kernel.name}": kernel.requires.why_not_here(backend)
        for name in OPERATORS
        for kernel in found.get(name, ())
    }


@pytest.fixture
def triton_of_mlus(monkeypatch):
    """Cambricon's build of Triton, as far as its version says."""
    monkeypatch.setattr(portable, "version", lambda _: "3.4.0+mlu2.1.1")


@pytest.mark.usefixtures("triton_of_mlus")
@pytest.mark.parametrize("profile", ["mlu590-1.12.1", "mlu370-1.12.1", "mtp613-1.12.1"])
def test_release_by_keyword_has_every_call(card, profile):
    card(profile)
    assert {name: reason for name, reason in here(cambricon.isolith_backend()).items() if reason} == {}


def test_another_triton_is_a_sentence(monkeypatch):
    monkeypatch.setattr(portable, "version", lambda _: "3.6.0")
    assert portable.missing_triton() == "triton=3.6.0 is no build for MLUs; the version of one has +mlu"


def test_absent_triton_is_a_sentence(monkeypatch):
    monkeypatch.setattr(portable, "version", absent)
    assert portable.missing_triton() == "triton is not installed; its build for MLUs comes with Cambricon's SDK"


def absent(name):
    raise PackageNotFoundError(name)


@pytest.mark.usefixtures("triton_of_mlus")
def test_day0_release_lacks_one_call(card):
    card("mlu590-day0")
    assert {name: reason for name, reason in here(cambricon.isolith_backend()).items() if reason} == {
        "kv_cache_read.kv_cache_read": "torch_mlu_ops:reshape_paged_cache has no argument direction"
    }


def test_calls_by_place_are_of_known_releases_alone(card):
    card("mlu590-day0", tmo="1.9.0")
    assert moe.COMBINE.missing() == (
        "torch_mlu_ops:moe_combine_result takes input, reduce_weight, gather_ids, residual, cusum_token_count,"
        " start_expert_id, expert_size, bias by position alone"
    )


def test_release_between_the_two_has_no_indexer(card):
    card(tmo="1.10.0")
    assert indexer.missing_select() == (
        "torch_mlu_ops=1.10.0; whether its lengths are those before compression is known of 1.8 and from 1.12 on"
    )


def test_absent_library_is_a_sentence_of_every_kernel(card, monkeypatch):
    card()
    monkeypatch.setitem(sys.modules, "torch_mlu_ops", None)
    missing = {
        name: reason for name, reason in here(cambricon.isolith_backend()).items() if "triton" not in str(reason)
    }
    assert all("torch_mlu_ops" in str(reason) for reason in missing.values())


@pytest.mark.parametrize(
    ("profile", "dtype", "says"),
    [
        ("mlu370", torch.bfloat16, "x is bfloat16; capability 3.7 has none, 5.0 has"),
        ("mlu370", torch.float16, None),
        ("mlu590", torch.bfloat16, None),
        ("mlu590", torch.float8_e4m3fn, "x is fp8; capability 5.0 has none, 6.0 has"),
        ("mtp613", torch.float8_e4m3fn, None),
    ],
)
def test_dtypes_follow_the_card(card, profile, dtype, says):
    card(profile)
    assert calls.why_not_card(x=torch.zeros(2, dtype=dtype)) == says


def test_results_in_bfloat16_follow_the_card(card):
    card("mlu370")
    assert calls.why_not_card(out_dtype="bfloat16") == "out_dtype is bfloat16; capability 3.7 has none, 5.0 has"


def streams(n=4, hidden=4096):
    return {"x": torch.empty(1, hidden).half(), "streams": torch.empty(1, n, hidden).half()}


def indexer_call(**changes):
    call = {
        "q": torch.empty(2, 64, 128).half(),
        "weights": torch.empty(2, 64),
        "k_cache": torch.empty(3, 16, 128).half(),
        "q_scale": None,
        "out_dtype": "float32",
        "candidates": None,
    }
    return call | changes


def gate(**changes):
    return {"score": "sqrtsoftplus", "groups": 1, "renormalize": True, "bias": None} | changes


REFUSED = {
    "five_streams": (
        residual.hc_post,
        streams(n=5),
        "n=5; fused_mhc_post takes 4 streams",
    ),
    "wide_streams": (residual.hc_post, streams(hidden=7169), "hidden=7169; fused_mhc_post takes at most 7168"),
    "two_dtypes": (
        residual.hc_post,
        streams() | {"x": torch.empty(1, 4096)},
        "x is float32 and streams float16; fused_mhc_post takes one dtype",
    ),
    "wide_rope": (
        rotary.rope,
        {"cos_table": torch.empty(4, 129)},
        "2*pairs=258; apply_rotary turns heads of at most 256",
    ),
    "groups_of_softplus": (routing.moe_gate, gate(groups=2), "groups=2; moe_softplus_topk knows no groups"),
    "bare_softplus": (
        routing.moe_gate,
        gate(renormalize=False),
        "renormalize=False; moe_softplus_topk always divides by the sum",
    ),
    "groups_of_softmax": (
        routing.moe_gate,
        gate(score="softmax", groups=2),
        "groups=2; moe_softmax_topk gives the experts of other groups the score 0",
    ),
    "bias_of_softmax": (
        routing.moe_gate,
        gate(score="softmax", bias=torch.empty(4)),
        "score is 'softmax' with a bias, whose use in moe_softmax_topk is not documented",
    ),
    "table_with_sigmoid": (
        routing.moe_hash_gate,
        gate(score="sigmoid"),
        "score is 'sigmoid'; tmo takes a table in moe_softplus_topk alone",
    ),
    "heads_of_the_indexer": (
        indexer.lightning_indexer,
        indexer_call(q=torch.empty(2, 16, 128).half()),
        "heads=16, head_dim=128; masked_indexer_select_paged_kv takes 32 or 64 of 128",
    ),
    "candidates": (
        indexer.lightning_indexer,
        indexer_call(candidates=torch.empty(2, 4)),
        "candidates are given; masked_indexer_select_paged_kv ranks every key",
    ),
    "another_compressor": (
        compressor.kv_compress,
        {
            "norm_weight": torch.empty(512),
            "state_cache": torch.empty(1, 4, 2048),
            "ratio": 2,
            "overlap": False,
            "cos_table": torch.empty(4, 32),
        },
        "overlap=False, ratio=2, dim=512; fused_compress_single_kv takes (True, 4, 128) or (True, 4, 512)"
        " or (False, 128, 512)",
    ),
    "streams_of_triton": (
        portable.hc_head,
        {"streams": torch.empty(1, 9, 512)},
        "n=9; a program holds the projection of at most 8 streams",
    ),
    "narrow_streams_of_triton": (
        portable.hc_head,
        {"streams": torch.empty(1, 4, 255)},
        "hidden=255; a tile is within 512 KiB from 256 on",
    ),
    "lists_of_triton": (
        portable.window_indices,
        {"positions": torch.empty(65536), "window": 1},
        "tokens=65536; an axis of a grid has at most 65535 programs",
    ),
    "long_lists_of_triton": (
        portable.compress_indices,
        {"positions": torch.empty(1025), "max_entries": 8192},
        "1025 lists of 8192; a tile is within 512 KiB up to 8388608 indices",
    ),
    "heads_of_attention": (
        attention.sparse_attn,
        {"q": torch.empty(1, 129, 8).half(), "kv_cache": torch.empty(2, 2, 8).half(), "extra_kv_cache": None},
        "heads=129; the call takes at most 128 of float16",
    ),
    "bytes": (
        attention.sparse_attn,
        {"q": torch.empty(1, 2, 8).half(), "kv_cache": torch.empty(2, 2, 8).byte(), "extra_kv_cache": None},
        "kv_cache is uint8 and q float16; single_query_cached_kv_attn takes one dtype",
    ),
    "gaps": (
        cache.kv_cache_write,
        {"cache": torch.empty(2, 3, 8)[:, :2]},
        "cache has strides (24, 8, 1); reshape_paged_cache takes pools without gaps",
    ),
    "float32_of_int8": (
        moe.grouped_gemm,
        {
            "x": torch.empty(2, 8, dtype=torch.int8),
            "weight": torch.empty(2, 8, 8, dtype=torch.int8),
            "out_dtype": "float32",
            **dict.fromkeys(("act_group", "block_n", "block_k"), 128),
        },
        "out_dtype is float32; smooth_quant_group_gemm gives bfloat16 or float16",
    ),
    "weight_only": (
        quant.quant_linear,
        {
            "x": torch.empty(2, 8).half(),
            "weight": torch.empty(8, 8, dtype=torch.int8),
            "x_scale": None,
            "act_quant": "none",
            "out_dtype": "float16",
            **dict.fromkeys(("act_group", "block_n", "block_k"), 128),
        },
        "activations are none; scaled_matmul takes int8 beside such weights",
    ),
    "experts_of_two_kinds": (
        experts.fused_moe,
        {
            "x": torch.empty(2, 8).half(),
            "w13": torch.empty(2, 8, 8),
            "w2": torch.empty(2, 8, 4).half(),
            "shared_w13": None,
            "shared_w2": None,
            "act_quant": "auto",
        },
        "w13 is float32 and activations none; both float16, or both int8, are adapted",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_call_beyond_the_vendors_limits_is_refused(card, name):
    card()
    kernel, arguments, says = REFUSED[name]
    assert kernel.why_not(**arguments) == says


def test_hidden_of_the_day0_release_is_4096_alone(card):
    card("mlu590-day0")
    says = "hidden=5120; fused_mhc_post of this release takes 4096"
    assert residual.hc_post.why_not(**streams(hidden=5120)) == says


def test_calls_within_the_limits_are_taken(card):
    card()
    assert residual.hc_post.why_not(**streams(hidden=7168)) is None
    assert routing.moe_gate.why_not(**gate(score="sigmoid", groups=8)) is None
    assert indexer.lightning_indexer.why_not(**indexer_call()) is None
