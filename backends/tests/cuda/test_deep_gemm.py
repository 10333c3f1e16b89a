"""DeepGEMM's adapters on sm_100, against a stand-in: every format, what is refused, and that a wrong layout shows."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from stand_in_deep_gemm import deep_gemm as stand_in

from isolith import Make
from isolith.kernel import in_range
from isolith.materials.byte_pools import byte_pool
from isolith.materials.indexer import batch_of_scores
from isolith.materials.weights import quantised_activations
from isolith.numerics.scaled_matmul import scale_shape
from isolith.select import refusal
from isolith_backends.cuda import libraries
from isolith_backends.cuda.libraries import deep_gemm, deep_gemm_sm100
from isolith_conformance.judge import expect

GROUPED = deep_gemm_sm100.grouped_gemm_deep_gemm_sm100
LINEAR = deep_gemm_sm100.quant_linear_deep_gemm_sm100
SCORE = deep_gemm_sm100.indexer_score_deep_gemm_sm100
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
MAKE = Make(torch.bfloat16, seed="deep_gemm")
COUNTS = [129, 0, 128, 1]
FORMATS = {
    "e2m1": ("e2m1", 128, 128, 128),
    "e2m1_act_32": ("e2m1", 32, 128, 128),
    "e4m3": ("e4m3", 128, 128, 128),
    "e4m3_act_32": ("e4m3", 32, 128, 128),
    "e4m3_blocks_of_32": ("e4m3", 128, 32, 32),
    "e4m3_oblong_blocks": ("e4m3", 32, 48, 32),
    "e4m3_a_scale_for_each_output": ("e4m3", 128, 1, 128),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    libraries.attempt.cache_clear()
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in(10))
    yield
    libraries.attempt.cache_clear()


def powers(*shape, low=-6, high=6):
    return MAKE.place(torch.exp2(MAKE.integers(low, high + 1, *shape, dtype=torch.float64)), E8M0)


def product(name, *experts, outputs=256, inputs=640, rows=512):
    """Arguments of a product in a format: an odd number of scales to a word, and a last block that is short."""
    kind, act_group, block_n, block_k = FORMATS[name]
    if kind == "e2m1":
        weight = MAKE.integers(0, 256, *experts, outputs, inputs // 2, dtype=torch.uint8)
    else:
        weight = MAKE.normal(*experts, outputs, inputs, dtype=E4M3)
    return {
        **quantised_activations(MAKE, "e4m3", rows, inputs, act_group),
        "weight": weight,
        "weight_scale": powers(*scale_shape(weight, block_n, block_k)),
        "act_group": act_group,
        "block_n": block_n,
        "block_k": block_k,
    }


def grouped(name):
    counts = MAKE.tensor(COUNTS, torch.int32)
    call = product(name, len(COUNTS)) | {"expert_counts": counts, "alignment": 128}
    call["weight_scale"].view(torch.uint8)[1] = 255  # NaN, of the expert without rows
    return call


def scores(entry, page, heads, tokens=(5, 3), start=(700, 61)):
    """Arguments of scores by pages of a format; the second sequence misses a block that it sees."""
    call = batch_of_scores(MAKE, list(tokens), list(start), 4, heads, 128, page)
    call["k_cache"] = byte_pool(MAKE, entry, int(call["k_cache"].shape[0]), page, spread=6)
    call["block_table"][1, 0] = -1
    shape = call["q"].shape[:2]
    if entry == 68:
        codes = MAKE.integers(0, 256, *shape, 64, dtype=torch.uint8)
        return call | {"q": codes, "q_scale": powers(*shape, 4)}
    scale = MAKE.uniform(*shape, low=0.5, high=2.0, dtype=torch.float32)
    return call | {"q": MAKE.normal(*shape, 128, dtype=E4M3), "q_scale": scale}


def problem_of(kernel, call):
    arguments = kernel.operator.arguments(**call)
    assert refusal(kernel, arguments) is None
    return expect(kernel.operator, arguments, False).verdict_on([kernel.fn(**arguments)]).problem


def from_byte(start, tensor):
    """The tensor, from another byte of its memory on."""
    dense = tensor.contiguous().view(torch.uint8).flatten()
    moved = torch.cat([dense[:start], dense])[start:].view(tensor.dtype).view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved


def refused(kernel, call):
    return refusal(kernel, kernel.operator.arguments(**call))


@pytest.mark.parametrize(("arch", "taken"), [("9.0", False), ("10.0", True), ("10.3", True), ("12.0", False)])
def test_these_are_for_compute_capability_10_alone(arch, taken):
    assert [in_range(arch, kernel.requires.arch) for kernel in (GROUPED, LINEAR, SCORE)] == [taken] * 3


@pytest.mark.parametrize("name", FORMATS)
def test_a_grouped_product_in_every_format(name):
    assert problem_of(GROUPED, grouped(name)) is None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_a_product_in_every_format_of_a_number_of_rows_that_no_word_divides(name, out_dtype):
    call = product(name, outputs=192, rows=7) | {"out_dtype": out_dtype}
    assert problem_of(LINEAR, call) is None


def test_a_product_quantises_float_activations_of_any_layout():
    call = product("e2m1_act_32", rows=3) | {"x_scale": None}
    call["x"] = MAKE.normal(2, 640, 3).transpose(1, 2)
    assert problem_of(LINEAR, call) is None


@pytest.mark.parametrize(("entry", "page", "heads"), [(68, 64, 64), (68, 32, 8), (132, 64, 16), (132, 32, 32)])
def test_scores_by_pages_of_every_format(entry, page, heads):
    assert problem_of(SCORE, scores(entry, page, heads)) is None


def test_activations_scales_and_queries_are_taken_from_any_byte_on():
    call = product("e2m1", rows=4)
    assert problem_of(LINEAR, call | {name: from_byte(1, call[name]) for name in ("x", "x_scale")}) is None
    assert problem_of(LINEAR, call | {"weight_scale": from_byte(1, call["weight_scale"])}) is None
    call = grouped("e4m3")
    moved = {name: from_byte(1, call[name]) for name in ("x", "x_scale", "weight_scale")}
    assert problem_of(GROUPED, call | moved) is None
    call = scores(68, 64, 8)
    assert problem_of(SCORE, call | {name: from_byte(3, call[name]) for name in ("q", "q_scale")}) is None


def test_strides_along_axes_of_one_are_put_right():
    call = product("e4m3", 1) | {"expert_counts": MAKE.tensor([3], torch.int32)}
    call["weight"] = torch.stack([call["weight"]] * 2, dim=1)[:, 0]
    call["weight_scale"] = torch.stack([call["weight_scale"]] * 2, dim=1)[:, 0]
    assert call["weight"].is_contiguous()
    assert call["weight"].stride(0) != 256 * 640
    assert problem_of(GROUPED, call) is None


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        (GROUPED, grouped("e2m1")),
        (GROUPED, grouped("e4m3_oblong_blocks")),
        (LINEAR, product("e2m1", rows=7)),
        (SCORE, scores(68, 32, 8)),
        (SCORE, scores(132, 64, 16)),
    ],
    ids=["grouped_e2m1", "grouped_e4m3", "linear_e2m1", "scores_68", "scores_132"],
)
def test_no_value_of_a_tensor_is_read(monkeypatch, kernel, call):
    def nothing(*args, **kwargs):
        return torch.empty(len(call["q"]), call["max_entries"], device="meta") if "q" in call else None

    # A library that does nothing at all, with tensors that have no memory.
    real = sys.modules["deep_gemm"]
    names = [name for name in vars(real) if "gemm_nt" in name or "logits" in name]
    blank = dict.fromkeys(names, nothing) | {"get_num_sms": real.get_num_sms}
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(**blank))
    libraries.attempt.cache_clear()
    bare = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    arguments = kernel.operator.arguments(**bare)
    assert kernel.fn(**arguments).shape == kernel.operator.fake(**arguments).shape


def test_scales_lie_four_to_a_word_rows_first():
    scale = torch.tensor([[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]], dtype=torch.uint8).view(E8M0)
    packed = deep_gemm_sm100.packed_scales(scale, 5, 3)
    assert (packed.shape, packed.stride()) == ((5, 2), (1, 8))
    first, second = [0x04030201, 5], [0x0E0D0C0B, 15]
    assert packed.tolist() == [first, first, first, second, second]
    experts = deep_gemm_sm100.packed_scales(scale.view(2, 1, 5), 1)
    assert (experts.shape, experts.stride()) == ((2, 1, 2), (8, 1, 4))
    assert experts.tolist() == [[first], [second]]


def refilled(packed, values):
    """Other words, lying as they must."""
    rows = packed.shape[-2]
    return packed.new_empty((*packed.shape[:-2], packed.shape[-1], -(-rows // 4) * 4))[..., :rows].mT.copy_(values)


def bytes_reversed(packed):
    return packed.clone(memory_format=torch.contiguous_format).view(torch.uint8).flip(-1).view(torch.int32).flip(-1)


WRONG_LAYOUTS = {
    "row_major": lambda packed: packed.clone(memory_format=torch.contiguous_format),
    "rows_not_padded": lambda packed: packed.mT.clone(memory_format=torch.contiguous_format).mT,
    "scales_last_first": lambda packed: refilled(packed, bytes_reversed(packed)),
    "words_last_first": lambda packed: refilled(packed, packed.flip(-1)),
    "rows_upside_down": lambda packed: refilled(packed, packed.flip(-2)),
    "of_the_next_row": lambda packed: refilled(packed, packed.roll(1, dims=-2)),
}
WRONG_OPERANDS = {
    "recipes_swapped": lambda given: given | {"recipe_a": given["recipe_b"], "recipe_b": given["recipe_a"]},
    "recipe_of_blocks": lambda given: given | {"recipe_b": (32, 32)},
    "no_recipes": lambda given: given | {"recipe_a": None, "recipe_b": None},
    "one_recipe_for_both": lambda given: given | {"recipe_a": None, "recipe_b": None, "recipe": (1, 1, 32)},
    "one_recipe_too_many": lambda given: given | {"recipe": (1, 1, 128)},
    "unsigned": lambda given: given | {"b": (given["b"][0].view(torch.uint8), given["b"][1])},
    "nibbles_swapped": lambda given: given | {"b": (nibbles_swapped(given["b"][0]), given["b"][1])},
    "scales_swapped": lambda given: given | {"a": (given["a"][0], given["b"][1]), "b": (given["b"][0], given["a"][1])},
}


def nibbles_swapped(codes):
    packed = codes.view(torch.uint8)
    return ((packed & 15) << 4 | packed >> 4).view(torch.int8)


def shows(kernel, call):
    """Whether the stand-in refuses a call, or the judge what comes of it."""
    try:
        return problem_of(kernel, call) is not None
    except (AssertionError, TypeError):
        return True


@pytest.mark.parametrize("wrong", WRONG_LAYOUTS)
def test_a_wrong_layout_of_scales_shows(monkeypatch, wrong):
    call = product("e2m1", outputs=192, rows=7)
    right = deep_gemm_sm100.packed_scales
    monkeypatch.setattr(deep_gemm_sm100, "packed_scales", lambda *given: WRONG_LAYOUTS[wrong](right(*given)))
    assert shows(LINEAR, call)


@pytest.mark.parametrize("wrong", WRONG_OPERANDS)
def test_a_wrong_recipe_or_operand_shows(monkeypatch, wrong):
    call = grouped("e2m1")
    right = deep_gemm_sm100.operands
    monkeypatch.setattr(deep_gemm_sm100, "operands", lambda *given: WRONG_OPERANDS[wrong](right(*given)))
    assert shows(GROUPED, call)


WRONG_QUERIES = {
    "scales_last_first": lambda q, scale: (q, scale.view(torch.uint8).flip(-1).view(torch.int32)),
    "nibbles_swapped": lambda q, scale: (nibbles_swapped(q), scale),
    "unsigned": lambda q, scale: (q.view(torch.uint8), scale),
    "no_scales": lambda q, scale: (q, None),
    "scales_of_heads_swapped": lambda q, scale: (q, scale.flip(-1)),
}


@pytest.mark.parametrize("wrong", WRONG_QUERIES)
def test_wrong_queries_show(monkeypatch, wrong):
    call, right = scores(68, 32, 8), deep_gemm_sm100.paged_scores

    def changed(queries, *others):
        return right(WRONG_QUERIES[wrong](*queries), *others)

    monkeypatch.setattr(deep_gemm_sm100, "paged_scores", changed)
    assert shows(SCORE, call)


def test_float32_scales_are_refused_for_their_exponents_alone_would_count():
    call = grouped("e4m3")
    for name in ("x_scale", "weight_scale"):
        said = f"{name} is float32; takes float8_e8m0fnu"
        assert refused(GROUPED, call | {name: call[name].float() * 1.5}) == said
    call = product("e2m1")
    said = "weight_scale is float32; takes float8_e8m0fnu"
    assert refused(LINEAR, call | {"weight_scale": call["weight_scale"].float()}) == said
    said = "scale_format=float32; takes ue8m0"
    given = {"x": MAKE.normal(2, 640), "x_scale": None, "scale_format": "float32"}
    assert refused(LINEAR, call | given) == said
    call = scores(68, 32, 8)
    said = "q_scale of packed e2m1 is torch.float32; takes torch.float8_e8m0fnu"
    assert refused(SCORE, call | {"q_scale": call["q_scale"].float()}) == said


def test_the_stand_in_drops_the_mantissa_of_float32_scales_as_the_library_does():
    x, weight = torch.ones(1, 128).to(E4M3), torch.ones(128, 128).to(E4M3)
    out = torch.empty(1, 128)
    scale = torch.full((1, 1), 1.75)
    stand_in(10).fp8_fp4_gemm_nt((x, scale), (weight, scale), out)
    assert out.unique().tolist() == [128.0]
    stand_in(9).fp8_fp4_gemm_nt((x, scale), (weight, scale), out)
    assert out.unique().tolist() == [128.0 * 1.75 * 1.75]


def test_what_the_library_has_no_form_for_is_refused():
    call = grouped("e2m1")
    assert refused(GROUPED, call | {"alignment": 64}) == "alignment=64; takes segments that start at multiples of 128"
    shifted = torch.zeros(call["weight"].numel() + 16, dtype=torch.uint8)[16:].view(call["weight"].shape)
    said = "weight starts 16 bytes behind a multiple of 32; takes multiples"
    assert refused(GROUPED, call | {"weight": shifted}) == said
    assert refused(GROUPED, call | {"out_dtype": "float32"}) == "out_dtype=float32; takes bfloat16"
    call = product("e4m3", outputs=160)
    assert refused(LINEAR, call) == "weight is 160 x 640; takes multiples of 64 x 128"
    call = product("e4m3", inputs=640) | {"act_group": 64}
    call["x_scale"] = powers(512, 10)
    assert refused(LINEAR, call) == "scales for 64 and 128 inputs; takes 32 or 128"


def test_scores_that_the_library_has_no_form_for_are_refused():
    call = scores(68, 32, 8)
    pages = torch.zeros(9, 32 * 68 + 4, dtype=torch.uint8)[:, : 32 * 68].unflatten(1, (32, 68))
    assert refused(SCORE, call | {"k_cache": pages}) == "pages start 0 + i*2180 bytes; takes multiples of 16"
    assert refused(SCORE, call | {"out_dtype": "float64"}) == "out_dtype=float64; it computes in float32"
    said = "keys are 132 x torch.uint8; takes entries of 68 bytes for torch.uint8 queries"
    assert refused(SCORE, call | {"k_cache": scores(132, 32, 8)["k_cache"]}) == said
    assert refused(SCORE, scores(68, 16, 8)) == "block_size=16; takes (32, 64)"
    assert refused(SCORE, scores(68, 32, 4)) == "4 heads of 128; takes (8, 16, 32, 64) of 128"
    many = {"q": call["q"][:1].expand(29057, -1, -1), "q_scale": call["q_scale"][:1].expand(29057, -1, -1)}
    many["weights"] = call["weights"][:1].expand(29057, -1)
    assert refused(SCORE, call | many) == "29057 tokens; takes at most 29056"


def test_segments_start_where_the_process_has_set_that_they_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in(10, alignment=224))
    libraries.attempt.cache_clear()
    said = "alignment=128; takes segments that start at multiples of 224"
    assert refused(GROUPED, grouped("e2m1")) == said


def test_the_scores_of_2_8_are_refused(monkeypatch):
    newer = stand_in(10)

    def fp8_fp4_paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, indices=None
    ):
        raise AssertionError("it must not be called")

    newer.fp8_fp4_paged_mqa_logits = fp8_fp4_paged_mqa_logits
    monkeypatch.setitem(sys.modules, "deep_gemm", newer)
    libraries.attempt.cache_clear()
    for kernel in (SCORE, deep_gemm.indexer_score_deep_gemm):
        said = kernel.requires.missing()
        assert said == "deep_gemm.fp8_fp4_paged_mqa_logits does not take clean_logits, logits_dtype"
    assert GROUPED.requires.missing() is None


def test_an_older_product_without_recipes_is_refused_on_sm_100_alone(monkeypatch):
    older = stand_in(9)

    def m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, d, grouped_layout, recipe=None, compiled_dims="nk"):
        raise AssertionError("it must not be called")

    older.m_grouped_fp8_fp4_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
    monkeypatch.setitem(sys.modules, "deep_gemm", older)
    libraries.attempt.cache_clear()
    said = "deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous does not take recipe_a, recipe_b"
    assert GROUPED.requires.missing() == said
    assert deep_gemm.grouped_gemm_deep_gemm.requires.missing() is None


def test_parameters_of_what_pybind11_makes_are_found_in_its_docstring(monkeypatch):
    compiled = torch._C._dispatch_library
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(compiled)
    monkeypatch.setitem(sys.modules, "compiled_library", stand_ins.module("compiled_library"))
    sys.modules["compiled_library"].run = compiled
    assert libraries.lacks("compiled_library", "run", "kind", "name", "linenum") is None
    said = "compiled_library.run does not take recipe_a"
    assert libraries.lacks("compiled_library", "run", "kind", "recipe_a") == said
