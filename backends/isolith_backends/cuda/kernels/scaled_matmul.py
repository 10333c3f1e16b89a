"""One output tile of a product of activations [rows, K] and a weight [N, K], either of which may be codes with scales.

Codes are decoded to the type that the tensor cores multiply, always exactly; `formats` says which. A scale multiplies
in one of three places, whichever is legal and cheapest:

    end    the finished sum, where one scale covers a whole row of K
    step   the sum of one step of K, where one scale covers the step; the steps are then added in float32
    fold   the decoded elements, where the type holds the products exactly, or is float32

e2m1 with ue8m0 scales is folded into bfloat16, which has float32's exponents and holds every such value: a scale for
each 32 columns would otherwise multiply the accumulator every 32 columns, two vector instructions an element, at half
the rate of the tensor cores in bfloat16. At 4,096 tokens an expert layer reads its weights for as long as that takes.
"""

import triton
import triton.language as tl

from isolith_backends.cuda.kernels.codes import decoded_e4m3, value_of_e2m1, value_of_e8m0


@triton.jit
def operand(tile, KIND: tl.constexpr, DOT: tl.constexpr, NATIVE: tl.constexpr):
    """Loaded elements as values of the type of the product; e2m1 comes as codes, one a byte."""
    if KIND == "e4m3":
        made = decoded_e4m3(tile, DOT, NATIVE)
    elif KIND == "e2m1":
        made = value_of_e2m1(tile).to(DOT)
    elif KIND == "int8" and DOT != tl.int8:
        made = tile.to(tl.float32).to(DOT)
    else:
        made = tile.to(DOT)
    return made


@triton.jit
def scale_at(S, at, inside):
    """Scales as float32; e8m0 comes as bytes."""
    scale = tl.load(S + at, mask=inside, other=0)
    return value_of_e8m0(scale) if S.dtype.element_ty == tl.uint8 else scale


@triton.jit
def folded(
    tile,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
    NATIVE: tl.constexpr,
    S,
    at,
    inside,
    k0,
    K,
    group,
    stride,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of codes times its scales, of which each covers at least GROUP columns."""
    column = k0 + tl.arange(0, BK // GROUP) * GROUP
    scale = scale_at(
        S,
        at[:, None] + (column // group)[None, :] * stride,
        inside[:, None] & (column < K)[None, :],
    )
    value = tl.reshape(operand(tile, KIND, tl.float32, NATIVE), (ROWS, BK // GROUP, GROUP))
    return tl.reshape(value * scale[:, :, None], (ROWS, BK)).to(DOT)


@triton.jit
def weight_tile(
    W, at, inside, k0, K, stride, KIND: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr
):
    """[BN, BK] elements of a weight as they are stored; e2m1 unpacked to a code a byte."""
    if KIND == "e2m1":
        byte = k0 // 2 + tl.arange(0, BK // 2)
        mask = inside[:, None] if EVEN_K else inside[:, None] & (byte < K // 2)[None, :]
        pair = tl.load(W + at[:, None] + byte[None, :] * stride, mask=mask, other=0)
        tile = tl.reshape(tl.join(pair & 0xF, pair >> 4), (BN, BK))
    else:
        k = k0 + tl.arange(0, BK)
        mask = inside[:, None] if EVEN_K else inside[:, None] & (k < K)[None, :]
        tile = tl.load(W + at[:, None] + k[None, :] * stride, mask=mask, other=0)
    return tile


@triton.jit
def product_of_tile(
    X,
    XS,
    W,
    WS,
    x_at,
    xs_at,
    in_rows,
    n0,
    N,
    K,
    w_n,
    w_k,
    ws_n,
    ws_k,
    xs_k,
    x_group,
    w_rows,
    w_group,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    X_FOLD: tl.constexpr,
    W_FOLD: tl.constexpr,
    DOT: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """[BM, BN] float32: rows at `x_at` of X times columns n0 .. of a weight; rows and columns outside give zeros.

    X and W point at the first element of a matrix, XS and WS at its first scale or are None. Rows of X and XS lie at
    the addresses given, columns of X side by side. A scale covers x_group columns of X, and w_rows by w_group elements
    of W, with ONE_SCALE all columns of a tile.
    """
    column = n0 + tl.arange(0, BN)
    in_columns = column < N
    w_at = column.to(tl.int64) * w_n
    ws_at = (column // w_rows).to(tl.int64) * ws_n
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.int32 if DOT == tl.int8 else tl.float32)
    for k0 in range(0, K, BK):
        mask = in_rows[:, None] if EVEN_K else in_rows[:, None] & (k < K - k0)[None, :]
        x = tl.load(X + x_at[:, None] + (k0 + k)[None, :], mask=mask, other=0)
        w = weight_tile(W, w_at, in_columns, k0, K, w_k, W_KIND, BN, BK, EVEN_K)
        if X_SCALE == "fold":
            a = folded(x, X_KIND, DOT, NATIVE, XS, xs_at, in_rows, k0, K, x_group, xs_k, BM, BK, X_FOLD)
        else:
            a = operand(x, X_KIND, DOT, NATIVE)
        if W_SCALE == "fold":
            b = folded(w, W_KIND, DOT, NATIVE, WS, ws_at, in_columns, k0, K, w_group, ws_k, BN, BK, W_FOLD)
        else:
            b = operand(w, W_KIND, DOT, NATIVE)
        if X_SCALE == "step" or W_SCALE == "step":
            part = tl.dot(a, tl.trans(b), input_precision="ieee")
            # One scale of the weight for the whole tile joins those of the rows: one product an element less.
            row_scale = tl.full((BM,), 1.0, tl.float32)
            if X_SCALE == "step":
                row_scale = scale_at(XS, xs_at + (k0 // x_group) * xs_k, in_rows)
            if W_SCALE == "step" and ONE_SCALE:
                row_scale *= scale_at(WS, (n0 // w_rows).to(tl.int64) * ws_n + (k0 // w_group) * ws_k, n0 < N)
            elif W_SCALE == "step":
                part *= scale_at(WS, ws_at + (k0 // w_group) * ws_k, in_columns)[None, :]
            acc += part * row_scale[:, None]
        elif DOT == tl.float8e4nv:
            # Tensor cores of sm_90 keep 14 bits of a sum of e4m3 products: each step is added in float32.
            acc += tl.dot(a, tl.trans(b))
        elif DOT == tl.int8:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    made = acc.to(tl.float32)
    if X_SCALE == "end":
        made *= scale_at(XS, xs_at, in_rows)[:, None]
    if W_SCALE == "end":
        made *= scale_at(WS, ws_at, in_columns)[None, :]
    return made
