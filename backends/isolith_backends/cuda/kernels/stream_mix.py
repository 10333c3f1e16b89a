"""What hc_pre and hc_head share: the projection of a token's streams, and their sum with coefficients.

The projection is a product with few outputs (24 of V4) and a long inner axis (n*hidden, 16,384 or 28,672). So the inner
axis is split among programs, always into the same pieces, whatever the number of tokens; who needs a token's result
adds up its pieces. A call of many tokens is done in slices that stay in the second-level cache between the projection
and the sum, so that memory gives the streams once. The floor is then the streams, and of few tokens the weights.

bfloat16 streams meet the float32 weights on tensor cores: a weight is the sum of three bfloat16 numbers, each product
with one of them is exact, and sums are float32. Other streams are multiplied in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

STREAMS = 8
"""With more streams the outputs do not fit a program's registers."""
SPLITS = 64  # at most; with 24 outputs the partial sums are 8 KiB a token
SLICE = 16 << 20  # bytes of streams; the smallest second-level cache of a data-centre card holds 40 MiB
TOKENS = 64
COLUMNS = 2048  # of a program that sums streams: of four, 32 elements of each of 256 threads
STEP = {32: 64, 64: 32, 128: 32}
"""Inner elements of a step, by outputs, so that a tile of weights takes the same registers."""


@triton.jit
def project_streams(
    X,
    Weight,
    Partial,
    tokens,
    size,
    outputs,
    x_stride,
    weight_stride,
    weight_column,
    steps,
    THREE_PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Partial[token, split, output] is a piece of the product; the column behind the outputs has its squares."""
    split = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.arange(0, OUTPUTS)
    rows = X + token.to(tl.int64)[:, None] * x_stride
    weights = Weight + output.to(tl.int64)[:, None] * weight_stride
    product = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for step in range(steps):
        at = ((split * steps + step) * STEP + tl.arange(0, STEP))[None, :]
        x = tl.load(rows + at, mask=(token < tokens)[:, None] & (at < size), other=0.0)
        weight_at = weights + at * weight_column
        weight = tl.load(weight_at, mask=(output < outputs)[:, None] & (at < size), other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if THREE_PARTS:
            high = weight.to(tl.bfloat16)
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            product = tl.dot(x, tl.trans(low), product)
            product = tl.dot(x, tl.trans(middle), product)
            product = tl.dot(x, tl.trans(high), product)
        else:
            product = tl.dot(wide, tl.trans(weight), product, input_precision="ieee")
    place = (token.to(tl.int64)[:, None] * tl.num_programs(1) + split) * OUTPUTS + output[None, :]
    made = tl.where(output[None, :] == outputs, squares[:, None], product)
    tl.store(Partial + place, made, mask=(token < tokens)[:, None] & (output <= outputs)[None, :])


@triton.jit
def projected(
    Partial, token, known, outputs, output, real, splits, size, norm_eps, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr
):
    """z of some tokens and outputs: the pieces added up and divided by the root of the mean square."""
    split = tl.arange(0, SPLITS)
    pieces = Partial + (token[:, None] * splits + split[None, :]) * OUTPUTS
    mask = known[:, None] & (split < splits)[None, :]
    squares = tl.sum(tl.load(pieces + outputs, mask=mask, other=0.0), axis=1)
    mask = mask[:, :, None] & real[None, None, :]
    product = tl.sum(tl.load(pieces[:, :, None] + output[None, None, :], mask=mask, other=0.0), axis=1)
    return product * tl.rsqrt(squares / size + norm_eps)[:, None]


@triton.jit
def collapse_streams(
    X,
    Partial,
    Scale,
    Base,
    Y,
    place,
    tokens,
    x_stride,
    hidden,
    n,
    outputs,
    splits,
    norm_eps,
    hc_eps,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns of the sum of some tokens' streams, with the coefficients that their first n outputs give."""
    tiles = tl.cdiv(hidden, COLUMNS)
    token = (place // tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (place % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    stream = tl.arange(0, STREAMS)
    known, real, inside = token < tokens, stream < n, column < hidden
    rows = X + token[:, None, None] * x_stride + stream[None, :, None] * hidden
    mask = known[:, None, None] & real[None, :, None] & inside[None, None, :]
    x = tl.load(rows + column[None, None, :], mask=mask, other=0.0).to(tl.float32)
    z = projected(Partial, token, known, outputs, stream, real, splits, n * hidden, norm_eps, OUTPUTS, SPLITS)
    base = tl.load(Base + stream, mask=real, other=0.0).to(tl.float32)
    pre = tl.sigmoid(tl.load(Scale).to(tl.float32) * z + base[None, :]) + hc_eps
    y = tl.sum(x * pre[:, :, None], axis=1)
    mask = known[:, None] & inside[None, :]
    tl.store(Y + token[:, None] * hidden + column[None, :], y.to(Y.dtype.element_ty), mask=mask)


class Projection:
    """Where the pieces of a slice's projection lie, and how to make them.

    Tiles are chosen by n and hidden alone, never by the tokens: sums are in the order of a tile's layout.

    Args:
        streams: [tokens n hidden].
        weight: [outputs n*hidden].
    """

    def __init__(self, streams: Tensor, weight: Tensor) -> None:
        flat = streams.flatten(1)
        self.flat = flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
        self.weight = weight
        tokens, self.n, self.hidden = streams.shape
        self.size = self.n * self.hidden
        self.outputs = weight.shape[0]
        self.padded = power_of_two(self.outputs + 1, least=32)
        self.step = STEP[self.padded]
        steps = max(ceil_div(self.size, self.step), 1)
        self.steps = ceil_div(steps, SPLITS)
        self.splits = ceil_div(steps, self.steps)
        row_bytes = max(self.size * streams.element_size(), 1)
        self.slice = min(max(SLICE // row_bytes // TOKENS, 1) * TOKENS, max(tokens, 1))
        shape = (self.slice, self.splits, self.padded)
        self.partial = torch.empty(shape, dtype=torch.float32, device=streams.device)

    @property
    def columns(self) -> int:
        """Columns of a program that sums streams."""
        return power_of_two(self.hidden, most=COLUMNS)

    @property
    def sums(self) -> dict[str, int]:
        """The constants of `collapse_streams`."""
        return {
            "OUTPUTS": self.padded,
            "SPLITS": power_of_two(self.splits),
            "STREAMS": power_of_two(self.n),
            "TOKENS": COLUMNS // self.columns,
            "COLUMNS": self.columns,
        }

    def programs(self, tokens: int) -> int:
        """How many programs sum the streams of so many tokens."""
        return ceil_div(tokens, COLUMNS // self.columns) * ceil_div(self.hidden, self.columns)

    def slices(self) -> list[slice]:
        """The tokens, a slice at a time."""
        return [slice(first, first + self.slice) for first in range(0, self.flat.shape[0], self.slice)]

    def project(self, rows: Tensor) -> None:
        """Fill the pieces of a slice of `flat`."""
        launch(
            project_streams,
            (ceil_div(rows.shape[0], TOKENS), self.splits),
            rows,
            self.weight,
            self.partial,
            rows.shape[0],
            self.size,
            self.outputs,
            self.flat.stride(0),
            *self.weight.stride(),
            self.steps,
            warps=8,
            stages=3,
            THREE_PARTS=rows.dtype == torch.bfloat16,
            TOKENS=TOKENS,
            OUTPUTS=self.padded,
            STEP=self.step,
        )
