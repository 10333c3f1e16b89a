"""Right residual streams, computed otherwise than the references."""

import math

import torch
from variation import right

RIGHT = []
LOG2_E = math.log2(math.e)


def by_columns_and_rows(comb, iters, eps, divide):
    """Sinkhorn's iteration on a matrix that has eps already."""
    comb = divide(comb, comb.sum(-2, True) + eps)
    for _ in range(iters - 1):
        comb = divide(comb, comb.sum(-1, True) + eps)
        comb = divide(comb, comb.sum(-2, True) + eps)
    return comb


@right(RIGHT, "sinkhorn")
def entry_after_entry(logits, iters, eps):
    """Plain loops over a matrix, with sums that begin at 0 and end with eps."""
    n = logits.shape[-1]
    rows = [[logits[..., j, k] for k in range(n)] for j in range(n)]
    for j in range(n):
        largest = rows[j][0]
        for value in rows[j][1:]:
            largest = torch.maximum(largest, value)
        weights = [(value - largest).exp() for value in rows[j]]
        total = sum(weights)
        rows[j] = [weight / total + eps for weight in weights]
    for step in range(2 * iters - 1):
        if step % 2:
            rows = [[value / (sum(row) + eps) for value in row] for row in rows]
        else:
            totals = [sum(rows[j][k] for j in range(n)) + eps for k in range(n)]
            rows = [[rows[j][k] / totals[k] for k in range(n)] for j in range(n)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@right(RIGHT, "sinkhorn")
def powers_of_2_and_reciprocals(logits, iters, eps):
    scaled = logits * LOG2_E
    weights = (scaled - scaled.amax(-1, True)).exp2()
    comb = weights * (1 / weights.sum(-1, True)) + eps
    return by_columns_and_rows(comb, iters, eps, lambda value, total: value * (1 / total))


@right(RIGHT, "sinkhorn")
def on_the_transposed(logits, iters, eps):
    comb = (torch.softmax(logits.mT.contiguous(), -2) + eps).contiguous()
    comb = comb / (comb.sum(-1, True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-2, True) + eps)
        comb = comb / (comb.sum(-1, True) + eps)
    return comb.mT


@right(RIGHT, "sinkhorn")
def sums_by_matrix_products(logits, iters, eps):
    ones = torch.ones(logits.shape[-1], 1)
    comb = torch.softmax(logits, -1) + eps
    comb = comb / ((comb.mT @ ones).mT + eps)
    for _ in range(iters - 1):
        comb = comb / (comb @ ones + eps)
        comb = comb / ((comb.mT @ ones).mT + eps)
    return comb


@right(RIGHT, "sinkhorn")
def sinkhorn_in_float64(logits, iters, eps):
    comb = torch.softmax(logits.double(), -1) + eps
    return by_columns_and_rows(comb, iters, eps, torch.div).float()


def sigmoid_by_exp(values):
    return 1 / (1 + (-values).exp())


def sigmoid_by_exp2(values):
    return 1 / (1 + (-LOG2_E * values).exp2())


def sigmoid_by_tanh(values):
    return 0.5 * torch.tanh(0.5 * values) + 0.5


def in_order(flat, fn):
    """One product after the other, and one square."""
    product, squares = flat.new_zeros(flat.shape[0], fn.shape[0]), flat.new_zeros(flat.shape[0], 1)
    for column in range(flat.shape[1]):
        product = product + flat[:, column, None] * fn[:, column]
        squares = squares + flat[:, column, None].square()
    return product, squares


def in_blocks(flat, fn, size):
    """Blocks of columns, each added to the sum so far."""
    product, squares = flat.new_zeros(flat.shape[0], fn.shape[0]), flat.new_zeros(flat.shape[0], 1)
    for start in range(0, flat.shape[1], size):
        part = flat[:, start : start + size]
        product = product + part @ fn[:, start : start + size].T
        squares = squares + part.square().sum(1, True)
    return product, squares


def in_splits(flat, fn, splits=8):
    """Every split by itself, then the splits from the last to the first."""
    parts = [in_blocks(a, b, 64) for a, b in zip(flat.chunk(splits, 1), fn.chunk(splits, 1), strict=True)]
    return sum(p for p, _ in reversed(parts)), sum(s for _, s in reversed(parts))


def mixes(streams, fn, norm_eps, project, sigmoid):
    """z, and how to make coefficients of it."""
    flat = streams.float().flatten(1)
    product, squares = project(flat, fn)
    return product / (squares / flat.shape[1] + norm_eps).sqrt(), sigmoid


def collapsed(pre, streams):
    """Stream after stream, from the last."""
    total = torch.zeros(streams.shape[0], streams.shape[2])
    for j in reversed(range(streams.shape[1])):
        total = total + pre[:, j, None] * streams[:, j].float()
    return total.to(streams.dtype)


def hc_pre(streams, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps, project, sigmoid):
    n = streams.shape[1]
    z, sigmoid = mixes(streams, fn, norm_eps, project, sigmoid)
    pre = sigmoid(scale[0] * z[:, :n] + base[:n]) + hc_eps
    post = sigmoid(scale[1] * z[:, n : 2 * n] + base[n : 2 * n]) * 2
    logits = (scale[2] * z[:, 2 * n :] + base[2 * n :]).view(-1, n, n)
    return collapsed(pre, streams), post, entry_after_entry(logits, sinkhorn_iters, hc_eps)


def hc_head(streams, fn, scale, base, norm_eps, hc_eps, project, sigmoid):
    z, sigmoid = mixes(streams, fn, norm_eps, project, sigmoid)
    return collapsed(sigmoid(scale * z + base) + hc_eps, streams)


@right(RIGHT, "hc_pre")
def pre_in_order(**call):
    return hc_pre(**call, project=in_order, sigmoid=sigmoid_by_exp)


@right(RIGHT, "hc_pre")
def pre_in_blocks_of_16(**call):
    return hc_pre(**call, project=lambda flat, fn: in_blocks(flat, fn, 16), sigmoid=sigmoid_by_exp2)


@right(RIGHT, "hc_pre")
def pre_in_blocks_of_64(**call):
    return hc_pre(**call, project=lambda flat, fn: in_blocks(flat, fn, 64), sigmoid=sigmoid_by_tanh)


@right(RIGHT, "hc_pre")
def pre_in_splits(**call):
    return hc_pre(**call, project=in_splits, sigmoid=torch.sigmoid)


@right(RIGHT, "hc_pre")
def pre_from_the_last_column(**call):
    return hc_pre(**call, project=lambda flat, fn: in_order(flat.flip(1), fn.flip(1)), sigmoid=torch.sigmoid)


@right(RIGHT, "hc_pre")
def pre_token_after_token(streams, **call):
    if not len(streams):
        return pre_in_splits(streams=streams, **call)
    tokens = [pre_in_splits(streams=streams[t : t + 1], **call) for t in range(len(streams))]
    return tuple(torch.cat(parts) for parts in zip(*tokens, strict=True))


@right(RIGHT, "hc_pre")
def pre_in_float64(streams, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps):
    n, wide = streams.shape[1], streams.double()
    flat = wide.flatten(1)
    z = (flat / (flat.square().mean(1, True) + norm_eps).sqrt()) @ fn.double().T
    pre = torch.sigmoid(scale[0] * z[:, :n] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(scale[1] * z[:, n : 2 * n] + base[n : 2 * n])
    logits = (scale[2].double() * z[:, 2 * n :] + base[2 * n :]).view(-1, n, n)
    comb = by_columns_and_rows(torch.softmax(logits, -1) + hc_eps, sinkhorn_iters, hc_eps, torch.div)
    x = torch.einsum("tj,tjc->tc", pre, wide)
    return x.to(streams.dtype), post.float(), comb.float()


@right(RIGHT, "hc_head")
def head_in_order(**call):
    return hc_head(**call, project=in_order, sigmoid=sigmoid_by_exp)


@right(RIGHT, "hc_head")
def head_in_blocks_of_16(**call):
    return hc_head(**call, project=lambda flat, fn: in_blocks(flat, fn, 16), sigmoid=sigmoid_by_exp2)


@right(RIGHT, "hc_head")
def head_in_blocks_of_64(**call):
    return hc_head(**call, project=lambda flat, fn: in_blocks(flat, fn, 64), sigmoid=sigmoid_by_tanh)


@right(RIGHT, "hc_head")
def head_in_splits(**call):
    return hc_head(**call, project=in_splits, sigmoid=torch.sigmoid)


@right(RIGHT, "hc_head")
def head_in_float64(streams, fn, scale, base, norm_eps, hc_eps):
    flat = streams.double().flatten(1)
    z = (flat / (flat.square().mean(1, True) + norm_eps).sqrt()) @ fn.double().T
    pre = torch.sigmoid(scale * z + base) + hc_eps
    return torch.einsum("tj,tjc->tc", pre, streams.double()).to(streams.dtype)


@right(RIGHT, "hc_post")
def sublayer_in_the_middle(x, streams, post, comb):
    n = streams.shape[1]
    total = torch.zeros(streams.shape)
    for j in range(n):
        if j == n // 2:
            total = total + post[:, :, None] * x[:, None].float()
        total = total + comb[:, j, :, None] * streams[:, j, None].float()
    return total.to(streams.dtype)


@right(RIGHT, "hc_post")
def one_matrix_of_all_coefficients(x, streams, post, comb):
    """[post | comb^T] times [x; streams], as one product."""
    left = torch.cat((post[:, :, None], comb.mT), 2)
    return (left @ torch.cat((x[:, None].float(), streams.float()), 1)).to(streams.dtype)


@right(RIGHT, "hc_post")
def columns_in_chunks(x, streams, post, comb):
    parts = []
    for start in range(0, streams.shape[2], 48):
        part = streams[..., start : start + 48].float()
        mixed = torch.einsum("tjk,tjc->tkc", comb, part)
        parts.append((mixed + post[:, :, None] * x[:, None, start : start + 48].float()).to(streams.dtype))
    return torch.cat(parts, 2)


@right(RIGHT, "hc_post")
def pairs_of_streams_added(x, streams, post, comb):
    terms = [comb[:, j, :, None] * streams[:, j, None].float() for j in range(streams.shape[1])]
    terms.append(post[:, :, None] * x[:, None].float())
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0].to(streams.dtype)


@right(RIGHT, "hc_post")
def post_in_float64(x, streams, post, comb):
    mixed = torch.einsum("tjk,tjc->tkc", comb.double(), streams.double())
    return (mixed + post.double()[:, :, None] * x.double()[:, None]).to(streams.dtype)


@right(RIGHT, "hc_post")
def fused_multiply_adds(x, streams, post, comb):
    """Every product unrounded, every sum rounded to float32."""
    total = (post[:, :, None] * x[:, None].float()).float()
    for j in range(streams.shape[1]):
        product = comb[:, j, :, None].double() * streams[:, j, None].double()
        total = (total.double() + product).float()
    return total.to(streams.dtype)
