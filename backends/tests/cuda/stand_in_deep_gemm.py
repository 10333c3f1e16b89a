"""DeepGEMM, which is not here, by its real signatures: on the host, in float32, as strict as it is, and as careless.

What it leaves undefined is NaN here. Source: DeepGEMM 54e2261 (2.6.1), csrc/apis/{gemm,layout,attention}.hpp,
csrc/utils/layout.hpp, csrc/jit_kernels/impls/runtime_utils.hpp (TMA), deep_gemm/include/deep_gemm/scheduler/gemm.cuh
(which expert a block of rows belongs to) and deep_gemm/utils/math.py (packing).
"""

import torch
from stand_ins import module

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
SHARED_MEMORY = 232448


def up(size, unit):
    return -(-size // unit) * unit


def e2m1_values(packed):
    """The values of bytes: the even column is in the low nibble."""
    codes = packed.view(torch.uint8).long()
    return E2M1[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)]


def ue8m0_values(words):
    """The four scales of each int32: the first in the lowest byte."""
    dense = words.clone(memory_format=torch.contiguous_format)
    return dense.view(torch.uint8).view(torch.float8_e8m0fnu).float()


def loads(tensor, unit=16):
    """What a tensor map wants of memory."""
    assert tensor.data_ptr() % unit == 0, "CUDA_ERROR_INVALID_VALUE"
    assert all(stride * tensor.itemsize % unit == 0 for stride in tensor.stride()[:-1]), "CUDA_ERROR_INVALID_VALUE"


def matrix(tensor, major):
    """The values of a factor whose last axis is dense."""
    assert tensor.dim() in (2, 3)
    assert tensor.dim() == 2 or tensor.stride(0) == tensor.shape[-2] * tensor.shape[-1]
    assert tensor.stride(-1) == 1
    if tensor.dtype == torch.int8:
        assert major == 10
        assert tensor.shape[-1] * 2 % 128 == 0
        loads(tensor, 32)
        return e2m1_values(tensor)
    assert tensor.dtype == torch.float8_e4m3fn
    loads(tensor)
    return tensor.float()


def scales(given, shape, block, major):
    """The scale of every element of a factor of a shape, as the library takes it."""
    (*groups, rows, columns), (gran_mn, gran_k) = shape, block
    assert given.dtype in (torch.float32, torch.int32)
    wide = gran_k * (4 if given.dtype == torch.int32 else 1)
    assert given.shape == (*groups, -(-rows // gran_mn), -(-columns // wide))
    if given.dtype == torch.int32:
        assert major == 10
        assert gran_mn == 1
        assert gran_k in (32, 128)
        assert given.stride(-2) == 1 or rows == 1
        assert given.stride(-1) == up(rows, 4)
        assert not groups or given.stride(-3) == given.stride(-1) * given.shape[-1]
        loads(given.mT)
        values = ue8m0_values(given)
    elif major == 9:
        assert block in ((1, 128), (128, 128))
        if gran_mn == 128:
            assert not groups or given.stride(-3) == given.shape[-2] * given.shape[-1]
            assert given.stride(-1) == 1
            assert given.stride(-2) == given.shape[-1]
        values = given
    else:
        assert gran_k in (32, 128)
        values = (given.contiguous().view(torch.int32) >> 23 << 23).view(torch.float32)  # the mantissa is dropped
    return values.repeat_interleave(gran_mn, -2)[..., :rows, :].repeat_interleave(gran_k, -1)[..., :columns]


def factors(a, b, recipe, recipe_a, recipe_b, major):
    """The values of both factors of a product."""
    x, weight = matrix(a[0], major), matrix(b[0], major)
    assert x.shape[-1] == weight.shape[-1]
    if recipe_a is None and recipe is None:
        recipe = (1, 128, 128) if b[1].dtype == torch.float32 else (1, 1, 128)
    assert (recipe_a is None) == (recipe_b is None)
    assert (recipe_a is None) != (recipe is None)
    if recipe is not None:
        recipe_a, recipe_b = (recipe[0], recipe[2]), recipe[1:]
    if major == 9:
        assert (recipe_a, recipe_b) == ((1, 128), (128, 128))
    return x * scales(a[1], x.shape, recipe_a, major), weight * scales(b[1], weight.shape, recipe_b, major)


def deep_gemm(major, alignment=128):
    """The library on a GPU of compute capability `major`.x, whose rows per block the process has set."""

    def grouped(x, weight, d, grouped_layout):
        assert grouped_layout.is_contiguous()
        assert grouped_layout.dtype == torch.int32
        assert grouped_layout.shape == (x.shape[0],)
        assert d.shape == (x.shape[0], weight.shape[1])
        assert d.dtype == torch.bfloat16
        assert d.stride(-1) == 1
        assert weight.numel() > 0
        d.fill_(torch.nan)
        for start in range(0, len(x), alignment):
            block = slice(start, start + alignment)
            expert = max(0, int(grouped_layout[start]))
            product = (x[block] @ weight[expert].T).bfloat16()
            d[block] = torch.where(grouped_layout[block, None] < 0, torch.nan, product)

    def m_grouped_bf16_gemm_nt_contiguous(
        a,
        b,
        d,
        grouped_layout,
        compiled_dims="nk",
        use_psum_layout=False,
        ensure_zero_padding=True,
        expected_m_for_psum_layout=None,
    ):
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.stride(-1) == b.stride(-1) == 1
        assert b.stride(0) == b.shape[1] * b.shape[2]
        assert not use_psum_layout
        loads(a)
        loads(b)
        grouped(a.float(), b.float(), d, grouped_layout)

    def m_grouped_fp8_fp4_gemm_nt_contiguous(
        a,
        b,
        d,
        grouped_layout,
        recipe=None,
        recipe_a=None,
        recipe_b=None,
        compiled_dims="nk",
        disable_ue8m0_cast=False,
        use_psum_layout=False,
        ensure_zero_padding=True,
        expected_m_for_psum_layout=None,
    ):
        assert not disable_ue8m0_cast
        assert not use_psum_layout
        grouped(*factors(a, b, recipe, recipe_a, recipe_b, major), d, grouped_layout)

    def fp8_fp4_gemm_nt(
        a,
        b,
        d,
        c=None,
        recipe=None,
        recipe_a=None,
        recipe_b=None,
        compiled_dims="nk",
        disable_ue8m0_cast=False,
    ):
        assert c is None
        assert not disable_ue8m0_cast
        assert d.dtype in (torch.bfloat16, torch.float32)
        x, weight = factors(a, b, recipe, recipe_a, recipe_b, major)
        assert d.shape == (x.shape[0], weight.shape[0])
        d.copy_(x @ weight.T)

    def get_mk_alignment_for_contiguous_layout():
        return alignment

    def get_num_sms():
        return 132

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
        assert context_lens.dtype == torch.int32
        assert context_lens.dim() == 2
        assert context_lens.is_contiguous()
        assert int(context_lens.max()) > 0, "it reads out of bounds"
        assert block_kv in ((64,) if major == 9 else (32, 64))
        assert context_lens.shape[0] * (4 if major == 9 else 8) <= SHARED_MEMORY
        plan = torch.zeros(num_sms + 1, 2, dtype=torch.int32)
        plan[0] = torch.tensor([int(context_lens.sum()), block_kv])  # whose plan it is; the real one says it otherwise
        return plan

    def keys_of(kv_cache, block, row, entry):
        """[..., 128] of the entries in rows of blocks: all values of a page stand before all scales."""
        page = kv_cache.reshape(kv_cache.shape[0], -1)
        size = kv_cache.shape[1]
        values, tail = page[:, : size * (entry - 4)].unflatten(1, (size, -1)), page[:, size * (entry - 4) :]
        values, tail = values[block, row], tail.unflatten(1, (size, 4))[block, row].contiguous()
        if entry == 132:
            return values.contiguous().view(torch.float8_e4m3fn).float() * tail.view(torch.float32)
        return e2m1_values(values) * ue8m0_values(tail.view(torch.int32)).repeat_interleave(32, -1)

    def fp8_fp4_paged_mqa_logits(
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits=False,
        logits_dtype=torch.float32,
        indices=None,
    ):
        (codes, sf), (batch, next_n, heads), page = q, q[0].shape[:3], kv_cache.shape[1]
        assert next_n == 1
        assert codes.is_contiguous()
        assert heads in ((32, 64) if major == 9 else (8, 16, 32, 64))
        assert page in ((64,) if major == 9 else (32, 64))
        assert kv_cache.dtype == torch.uint8
        if sf is None:
            assert codes.dtype == torch.float8_e4m3fn
            entry, queries = 132, codes.float()
        else:
            assert major == 10
            assert codes.dtype == torch.int8
            assert sf.shape == codes.shape[:3]
            assert sf.dtype == torch.int32
            assert sf.is_contiguous()
            loads(sf)
            entry, queries = 68, e2m1_values(codes) * ue8m0_values(sf[..., None]).repeat_interleave(32, -1)
        assert queries.shape[3] == 128
        assert kv_cache.shape[2:] == (1, entry)
        assert kv_cache.stride(1) == entry
        assert kv_cache.stride(3) == 1
        assert kv_cache.stride(0) % 16 == 0, "CUDA_ERROR_INVALID_VALUE"
        assert kv_cache.data_ptr() % 16 == 0, "CUDA_ERROR_INVALID_VALUE"
        loads(codes)
        loads(weights)
        assert weights.shape == (batch, heads)
        assert weights.dtype == torch.float32
        assert weights.is_contiguous()
        assert block_table.dtype == torch.int32
        assert block_table.stride(1) == 1
        assert schedule_meta.shape == (133, 2)
        assert schedule_meta[0].tolist() == [int(context_lens.sum()), page], "the plan of another call"
        assert not clean_logits
        assert logits_dtype == torch.float32
        assert int(context_lens.max()) <= max_context_len
        at = torch.arange(max_context_len)
        inside = at < context_lens
        block = torch.where(inside, block_table[:, at // page].long(), 0)
        assert ((block >= 0) & (block < kv_cache.shape[0])).all()
        dots = torch.einsum("thc,tsc->ths", queries[:, 0], keys_of(kv_cache, block, at % page, entry)).relu()
        scores = torch.full((batch, up(max_context_len, 256)), torch.nan)[:, :max_context_len]  # rows further apart
        return scores.copy_(torch.where(inside, torch.einsum("ths,th->ts", dots, weights), torch.nan))

    return module(
        "deep_gemm",
        m_grouped_bf16_gemm_nt_contiguous,
        m_grouped_fp8_fp4_gemm_nt_contiguous,
        fp8_fp4_gemm_nt,
        get_mk_alignment_for_contiguous_layout,
        get_num_sms,
        get_paged_mqa_logits_metadata,
        fp8_fp4_paged_mqa_logits,
    )
