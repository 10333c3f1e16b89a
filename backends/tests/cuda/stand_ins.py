"""Libraries that are not here, by their real signatures: on the host, in float32, and as strict as they are.

What a library leaves undefined is NaN here.
"""

from types import ModuleType

import torch

from isolith.numerics.pages import read_entries


def attention(q, pools, scale, sink):
    """(out, lse) of q [tokens, heads, dim] over (entries [tokens, columns, dim], valid [tokens, columns]) pairs."""
    kv, valid = (torch.cat(parts, dim=1) for parts in zip(*pools, strict=True))
    logits = torch.einsum("thc,tnc->thn", q.float(), kv) * scale
    logits = logits.masked_fill(~valid[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    share = torch.ones_like(lse) if sink is None else 1 / (1 + (sink - lse).exp())
    out = torch.einsum("thn,tnc->thc", (logits - lse[..., None]).exp(), kv[..., :512]) * share[..., None]
    some = valid.any(-1)[:, None]
    return torch.where(some[..., None], out, 0.0).bfloat16(), torch.where(some, lse, torch.inf)


def listed(cache, indices, length, unit):
    """(entries, valid) of the leftmost columns of [batch, 1, columns] indices."""
    assert indices.dtype == torch.int32
    assert indices.is_contiguous()
    assert indices.shape[1] == 1
    assert indices.shape[2] > 0
    assert indices.shape[2] % unit == 0
    indices = indices[:, 0]
    valid = indices >= 0
    if length is not None:
        assert length.dtype == torch.int32
        valid &= torch.arange(indices.shape[1]) < length[:, None]
    assert int(indices.amax()) < cache.shape[0] * cache.shape[1]
    return read_entries(cache, torch.where(valid, indices, -1).long(), torch.float32), valid


def flash_mla():
    """FlashMLA 9241ae3, flash_mla/flash_mla_interface.py."""

    class FlashMLASchedMeta:
        filled = False

    def get_mla_metadata(*args, **kwargs):
        return FlashMLASchedMeta(), None

    def flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits=None,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=False,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
        topk_length=None,
        extra_topk_length=None,
    ):
        assert isinstance(tile_scheduler_metadata, FlashMLASchedMeta)
        assert not tile_scheduler_metadata.filled
        assert num_splits is None
        assert is_fp8_kvcache
        assert not causal
        assert head_dim_v == 512
        assert q.dtype == torch.bfloat16
        assert q.shape[1:3] in ((1, 64), (1, 128))
        assert attn_sink is None or attn_sink.dtype == torch.float32
        pools = []
        for cache, columns, length in (
            (k_cache, indices, topk_length),
            (extra_k_cache, extra_indices_in_kvcache, extra_topk_length),
        ):
            if cache is not None:
                assert cache.dtype == torch.uint8
                assert cache.shape[2:] in ((1, 584), (1, 656))
                assert cache.stride(1) == cache.shape[3]
                pools.append(listed(cache[:, :, 0], columns, length, 64))
        tile_scheduler_metadata.filled = True
        out, lse = attention(q[:, 0], pools, softmax_scale, attn_sink)
        return out[:, None], lse[..., None]

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
        assert q.dtype == kv.dtype == torch.bfloat16
        assert q.shape[1] in (64, 128)
        assert kv.shape[1] == 1
        assert kv.is_contiguous()
        assert d_v == 512
        pool = listed(kv, indices, topk_length, 128)
        # As documented, a NaN behind a length would show; the lists must not lead to one.
        out, lse = attention(q, [pool], sm_scale, attn_sink)
        return out, torch.full_like(lse, torch.nan), lse

    return module("flash_mla", get_mla_metadata, flash_mla_with_kvcache, flash_mla_sparse_fwd)


def takes(*tensors):
    """What a compiled kernel assumes of the memory that it gets."""
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0


def flashinfer():
    """flashinfer fb28d72, flashinfer/topk.py and include/flashinfer/topk.cuh."""

    def top_k_ragged_transform(
        input,
        offsets,
        lengths,
        k,
        deterministic=False,
        tie_break=0,
        dsa_graph_safe=False,
        row_starts=None,
    ):
        assert input.dtype in (torch.float32, torch.float16, torch.bfloat16)
        assert offsets.dtype == lengths.dtype == torch.int32
        takes(input, offsets, lengths)
        assert input.numel() > 0
        assert k <= 2048
        assert tie_break == 1
        assert deterministic
        assert int(lengths.max()) <= input.shape[1]
        bits = input.float().view(torch.int32).long() & 0xFFFFFFFF
        rank = torch.where(bits < 2**31, bits + 2**31, 2**32 - 1 - bits)
        out = torch.full((len(input), k), -1, dtype=torch.int32)
        for row, length in enumerate(lengths.tolist()):
            best = rank[row, :length].sort(descending=True, stable=True).indices[:k].sort().values
            out[row, : len(best)] = best + offsets[row]
        return out

    return module("flashinfer", top_k_ragged_transform)


def top2_sum_gate(
    logits,
    bias,
    num_topk,
    num_topk_groups,
    num_groups,
    use_shared_as_routed,
    num_shared_experts,
    routed_scaling_factor,
    ep_rank,
    num_ep_ranks,
    tp_rank,
    num_tp_ranks,
    scoring_func,
    mask=None,
    fix_routing_mask=None,
    to_physical_map=None,
    logical_count=None,
    unmapped_topk_idx=None,
):
    takes(logits, bias)
    (tokens, experts), on = logits.shape, torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    assert logits.dtype == bias.dtype == torch.float32
    assert bias.shape == (experts,)
    assert on.shape == (tokens,)
    assert on.dtype == torch.bool
    assert on.is_contiguous()
    assert num_topk <= min(32, experts)
    assert experts % 4 == 0
    assert (num_groups == 0) == (num_topk_groups == 0)
    assert not use_shared_as_routed
    assert (num_shared_experts, ep_rank, num_ep_ranks, tp_rank, num_tp_ranks) == (0, 0, 1, 0, 1)
    assert logits[on].isfinite().all(), "the device asserts"
    assert bias.isfinite().all(), "an expert stays unset"
    softplus = torch.where(logits > 20.0, logits, logits.exp().log1p())
    scores = {"sigmoid": logits.sigmoid(), "sqrtsoftplus": softplus.sqrt(), "softmax": logits.softmax(1)}[scoring_func]
    choice = (logits if scoring_func == "softmax" else scores) + bias
    if num_groups != num_topk_groups:
        size = experts // num_groups
        assert num_groups <= 32
        assert 2 <= size <= 32, "a group of one has a sum of -inf"
        assert max(-(-experts // 128) * 4, num_topk_groups) % 4 == 0
        sums = choice.view(tokens, num_groups, size).topk(2).values.sum(-1)
        lost = sums.sort(dim=1, descending=True, stable=True).indices[:, num_topk_groups:]
        out = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, lost, True)
        choice = choice.masked_fill(out.repeat_interleave(size, 1), -torch.inf)
    chosen = choice.sort(dim=1, descending=True, stable=True).indices[:, :num_topk]
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * routed_scaling_factor
    return chosen.masked_fill(~on[:, None], -1), weights.masked_fill(~on[:, None], 0.0)


def per_token_cast(
    x,
    fmt,
    num_per_channels,
    x_block_size=None,
    use_tma_aligned_col_major_sf=False,
    round_sf=False,
    use_packed_ue8m0=False,
):
    assert fmt == "e4m3"
    assert x.dtype in (torch.bfloat16, torch.float32)
    assert x_block_size is None
    assert not use_tma_aligned_col_major_sf
    assert not use_packed_ue8m0
    takes(x)
    hidden = x.shape[1]
    assert x.dim() == 2
    assert hidden % 64 == 0, "untested"
    assert num_per_channels in (16, 32, 64, 128) or num_per_channels == hidden
    groups = torch.nn.functional.pad(x.float(), (0, -hidden % num_per_channels)).unflatten(1, (-1, num_per_channels))
    amax = groups.abs().amax(-1).clamp(min=1e-4)
    scale, inverse = amax / 448, 448 / amax
    if round_sf:
        exponent = ((scale.view(torch.int32) - 1) >> 23) + 1
        scale, inverse = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
    codes = (groups * inverse[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :hidden].contiguous(), scale


def mhc_post(x, residual, post_layer_mix, comb_res_mix, out=None):
    batch, tokens, n, hidden = residual.shape
    takes(x, residual, post_layer_mix, comb_res_mix)
    assert x.dtype == residual.dtype == torch.bfloat16
    assert post_layer_mix.dtype == comb_res_mix.dtype == torch.float32
    assert x.shape == (batch, tokens, hidden)
    assert post_layer_mix.shape == (batch, tokens, n, 1)
    assert comb_res_mix.shape == (batch, tokens, n, n)
    assert (n, hidden % 256) == (4, 0), "untested"
    assert tokens > 0
    mixed = torch.einsum("abmn,abmc->abnc", comb_res_mix, residual.float())
    return (x.float().unsqueeze(-2) * post_layer_mix + mixed).bfloat16()


def sinkhorn_normalize(x, repeat=10, eps=1e-6):
    assert x.dtype == torch.float32
    assert x.shape[-2:] == (4, 4), "untested"
    assert x.numel() > 0
    assert 5 * repeat < 227, "KiB of shared memory"
    comb = x.softmax(-1) + eps
    for step in range(2 * repeat - 1):
        comb = comb / (comb.sum(-1 if step % 2 else -2, keepdim=True) + eps)
    return comb


def tile_kernels():
    """TileKernels 36d9e45, by module: tile_kernels/moe, /quant and /modeling/mhc/ops."""
    moe = module("tile_kernels.moe", top2_sum_gate)
    quant = module("tile_kernels.quant", per_token_cast)
    mhc = module("tile_kernels.modeling.mhc.ops", mhc_post, sinkhorn_normalize)
    return {made.__name__: made for made in (moe, quant, mhc)}


def module(name, *functions):
    """A module of functions."""
    made = ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made
