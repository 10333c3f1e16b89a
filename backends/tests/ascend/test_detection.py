"""Whether there is an NPU, which one, and what every chip is offered; torch_npu is made up here."""

import sys
import types

import pytest
import torch

from isolith import OPERATORS
from isolith.plugins import kernels_of
from isolith_backends import ascend
from isolith_backends.ascend import attention, cache, moe, projection, quant, residual, rotary, routing


@pytest.fixture
def chip(monkeypatch):
    """A torch_npu that says which chip it is on."""

    def install(number, cann="9.1.0", available=True):
        made = types.ModuleType("torch_npu")
        vars(made).update(
            __version__="2.13.0",
            _C=types.SimpleNamespace(_npu_get_soc_version=lambda: number),
            utils=types.SimpleNamespace(get_cann_version=lambda: cann),
        )
        monkeypatch.setitem(sys.modules, "torch_npu", made)
        device = types.SimpleNamespace(is_available=lambda: available)
        monkeypatch.setattr(torch, "npu", device, raising=False)

    return install


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A torch_npu that is installed and does not import, as one without CANN."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


def test_absent_package_is_a_sentence(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ascend.why_unavailable() == "torch_npu is not installed; install it with the CANN that it was built for"


def test_broken_cann_is_a_sentence(broken):
    assert ascend.why_unavailable() == (
        "torch_npu does not import: libhccl.so: cannot open shared object file; is CANN's set_env.sh sourced?"
    )


def test_torch_npu_is_not_imported_beside_a_cuda_gpu(broken, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1, raising=False)
    assert ascend.why_unavailable() == "torch_npu cannot be used beside CUDA, which this torch has a GPU for"


def test_no_device_names_the_variable_that_hides_devices(chip):
    chip(220, available=False)
    assert "ASCEND_RT_VISIBLE_DEVICES" in ascend.why_unavailable()


@pytest.mark.parametrize(
    ("number", "arch", "name"),
    [
        (200, "1", "310P"),
        (205, "1", "310P"),
        (220, "2", "A2"),
        (225, "2", "A2"),
        (250, "3", "A3"),
        (256, "3", "A3"),
        (260, "5", "A5"),
    ],
)
def test_chip_by_its_number(chip, number, arch, name):
    chip(number)
    assert (ascend.why_unavailable(), ascend.arch(), ascend.versions()["soc"]) == (None, arch, name)


@pytest.mark.parametrize("number", [199, 206, 240, 243, 257, 261])
def test_unknown_number_is_no_chip(chip, number):
    chip(number)
    assert ascend.why_unavailable() == (
        f"the SoC number is {number}; known: 200-205 (310P), 220-225 (A2), 250-256 (A3), 260 (A5)"
    )


def test_versions_name_torch_npu_and_cann(chip):
    chip(250)
    assert ascend.versions() == {"torch_npu": "2.13.0", "cann": "9.1.0", "soc": "A3"}


def test_no_cann_is_no_version(chip):
    chip(250, cann="")
    assert "cann" not in ascend.versions()


def of_every_operator():
    backend = ascend.isolith_backend()
    found, reason = kernels_of(backend)
    assert reason is None
    return [kernel for name in OPERATORS for kernel in found.get(name, ())]


def test_310p_is_refused_by_every_kernel(chip):
    chip(202)
    backend = ascend.isolith_backend()
    ranges = (">=2", ">=2,<5", ">=5")
    reasons = {kernel.requires.why_not_here(backend) for kernel in of_every_operator()}
    assert reasons == {f"arch=1; needs {each}" for each in ranges}


def test_a5_has_no_attention_over_bfloat16_pages(chip):
    chip(260)
    assert attention.hybrid_attention.requires.why_not_here(ascend.isolith_backend()) == "arch=5; needs >=2,<5"


@pytest.mark.parametrize("number", [220, 250, 260])
def test_chip_without_an_extension_says_which_operator_is_missing(chip, number):
    chip(number)
    reason = residual.hc_pre.requires.why_not_here(ascend.isolith_backend())
    assert reason == "_C_ascend::npu_hc_pre_v2 is not registered; custom::npu_hc_pre is not registered"


def call(name, **changes):
    sample = {
        "hc_pre": lambda: {"streams": torch.zeros(2, 4, 4096), "sinkhorn_iters": 20},
        "moe_gate": lambda: {"logits": torch.zeros(2, 256), "groups": 1, "score": "sigmoid"},
        "moe_permute": lambda: {"x": torch.zeros(2, 8), "alignment": 1, "x_scale": None},
        "rope": lambda: {"x": torch.zeros(2, 512), "interleaved": True, "rope_first": False},
        "grouped_gemm": lambda: {
            "x": torch.zeros(2, 8).bfloat16(),
            "weight": torch.zeros(3, 4, 8).bfloat16(),
            "out_dtype": "bfloat16",
        },
        "act_quant_int8": lambda: {"x": torch.zeros(2, 8).half(), "smooth": None},
        "rope_of_slice": lambda: {"x": torch.zeros(2, 8, 64), "cos_table": torch.zeros(9, 32)},
        "grouped_output_proj": lambda: {
            "x": torch.zeros(2, 4, 32),
            "wo_a": torch.zeros(2, 16, 64),
            "wo_b": torch.zeros(8, 32),
            "act_quant_a": "none",
            "act_quant_b": "none",
        },
        "kv_cache_write": lambda: {"cache": torch.zeros(2, 4, 512), "x": torch.zeros(3, 512)},
        "lightning_indexer": lambda: {
            "q": torch.zeros(2, 64, 128).half(),
            "weights": torch.zeros(2, 64).half(),
            "k_cache": torch.zeros(2, 16, 128).half(),
            "ratio": 1,
            "k": 512,
            "softmax_scale": 1.0,
            "out_dtype": "float32",
            "candidates": None,
        },
        "hybrid_attention": lambda: {
            "q": torch.zeros(2, 64, 512).half(),
            "window_cache": torch.zeros(2, 16, 512).half(),
            "ratio": 0,
            "compressed_cache": None,
            "compressed_block_table": None,
            "topk_indices": None,
        },
    }[name]()
    return sample | changes


KERNELS = {
    "hc_pre": residual.hc_pre,
    "moe_gate": routing.moe_gate_of_any_score,
    "moe_permute": moe.moe_permute,
    "rope": rotary.rope,
    "rope_of_slice": rotary.rope_of_slice,
    "grouped_output_proj": projection.grouped_output_proj,
    "grouped_gemm": moe.grouped_gemm,
    "act_quant_int8": quant.act_quant_int8,
    "kv_cache_write": cache.kv_cache_write_by_slot,
    "lightning_indexer": projection.lightning_indexer,
    "hybrid_attention": attention.hybrid_attention,
}


@pytest.mark.parametrize("name", KERNELS)
def test_ordinary_call_is_taken(chip, name):
    chip(250)
    assert KERNELS[name].why_not(**call(name)) is None


REFUSED = [
    ("hc_pre", {"sinkhorn_iters": 19}, "sinkhorn_iters=19; the vendor's call does 20"),
    ("hc_pre", {"streams": torch.zeros(1, 2, 4096)}, "n=2; the vendor's call takes 4 streams"),
    ("hc_pre", {"streams": torch.zeros(1, 4, 64)}, "hidden=64; the vendor tests 4096 and 7168"),
    ("moe_gate", {"logits": torch.zeros(1, 2049)}, "experts=2049; the vendor's top-k takes at most 2048"),
    ("moe_gate", {"groups": 128}, "2 experts in a group; the vendor's top-k takes more than 2"),
    (
        "moe_gate",
        {"logits": torch.zeros(1, 1089), "groups": 33},
        "33 groups of 33 experts, padded to 32, are 2112; at most 2048",
    ),
    (
        "moe_permute",
        {"alignment": 16},
        "alignment=16; npu_moe_init_routing_v2 leaves no room between experts",
    ),
    (
        "moe_permute",
        {"x_scale": torch.zeros(2, 3)},
        "x_scale has 3 float32 columns; npu_moe_init_routing_v2 carries one float32 a token",
    ),
    ("rope", {"rope_first": True}, "rope_first=True; inplace_partial_rotary_mul takes the last dimensions of a head"),
    ("rope", {"x": torch.zeros(2, 1026)}, "head_dim=1026; inplace_partial_rotary_mul takes even sizes up to 1024"),
    (
        "grouped_gemm",
        {"out_dtype": "float32"},
        "out_dtype is float32; npu_grouped_matmul of bfloat16 gives bfloat16",
    ),
    (
        "grouped_gemm",
        {"weight": torch.empty(1025, 4, 8).bfloat16()},
        "experts=1025; npu_grouped_matmul takes at most 1024 in one weight",
    ),
    (
        "act_quant_int8",
        {"smooth": torch.zeros(8)},
        "smooth is float32 and x float16; npu_dynamic_quant takes one dtype",
    ),
    (
        "kv_cache_write",
        {"cache": torch.zeros(2, 4, 576)},
        "an entry has 576 elements; scatter_nd_update_asc takes 1, 128 or 512",
    ),
    ("kv_cache_write", {"x": torch.zeros(9, 512)}, "9 rows for 8 entries; scatter_nd_update_asc takes no more"),
    (
        "lightning_indexer",
        {"k": 3073},
        "k=3073; npu_lightning_indexer takes 1..2048 and multiples of 1024 in 3072..8192",
    ),
    (
        "lightning_indexer",
        {"ratio": 4},
        "ratio=4; npu_lightning_indexer knows no compressed keys, and those calls that do take int8 keys",
    ),
    (
        "rope_of_slice",
        {"x": torch.zeros(2, 1000, 64)},
        "1000 heads with 64 rotated dimensions; npu_rotary_mul on A2 and A3 takes fewer than 1000 and 896",
    ),
    (
        "grouped_output_proj",
        {"wo_a": torch.zeros(2, 24, 64)},
        "wo_a is (2, 24, 64); npu_transpose_batchmatmul on A2 and A3 takes multiples of 16 below 65536",
    ),
    ("hybrid_attention", {"q": torch.zeros(2, 6, 512)}, "heads=6; sparse_attn_sharedkv takes multiples of 4"),
    (
        "hybrid_attention",
        {"window_cache": torch.zeros(2, 8, 512).half()},
        "window_cache has blocks of 8; takes multiples of 16 up to 1024",
    ),
    ("hybrid_attention", {"ratio": 8}, "ratio=8; sparse_attn_sharedkv takes 4 and 128"),
    (
        "hybrid_attention",
        {"topk_indices": torch.zeros(2, 513)},
        "topk_indices has 513 columns; sparse_attn_sharedkv takes 512",
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "says"), REFUSED, ids=[f"{row[0]}_{place}" for place, row in enumerate(REFUSED)]
)
def test_call_beyond_the_vendors_limits_is_refused(chip, name, changes, says):
    chip(250)
    assert KERNELS[name].why_not(**call(name, **changes)) == says


def test_33_heads_of_the_indexer_are_for_a3_alone(chip):
    heads = {"q": torch.zeros(2, 33, 128).half(), "weights": torch.zeros(2, 33).half()}
    chip(250)
    on_a3 = projection.lightning_indexer.why_not(**call("lightning_indexer", **heads))
    chip(260)
    on_a5 = projection.lightning_indexer.why_not(**call("lightning_indexer", **heads))
    assert (on_a3, on_a5) == (None, "heads=33; npu_lightning_indexer takes up to 64, on A5 8, 16, 24, 32 or 64")
