import pytest
import torch
import triton
import triton.language as tl

from isolith.numerics.codes import ceil_power_of_two, decode_e2m1, encode_e2m1
from isolith_backends.cuda.kernels import codes
from isolith_backends.cuda.launch import launch

BYTES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def apply(X, Y, FUNCTION: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(Y + at, FUNCTION(tl.load(X + at)))


def applied(function, x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    launch(apply, (1,), x, y, FUNCTION=function, COUNT=x.numel())
    return y


def values(*special):
    """4,096 values of sizes from 2^-12 to 2^9, the special ones among them."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(-12, 10, (4096,), generator=generator).float()
    made = torch.randn(4096, generator=generator) * torch.exp2(sizes)
    special = torch.tensor([*special, torch.inf, -torch.inf, 0.0, -0.0])
    made[: len(special)] = special
    return made


def between(codes_in_order):
    """The values half-way between neighbours, where rounding turns."""
    return ((codes_in_order[1:] + codes_in_order[:-1]) / 2).tolist()


@pytest.mark.parametrize(
    ("function", "dtype"), [(codes.value_of_e4m3, torch.float8_e4m3fn), (codes.value_of_e8m0, torch.float8_e8m0fnu)]
)
def test_every_byte_has_its_value(function, dtype):
    torch.testing.assert_close(
        applied(function, BYTES, torch.float32), BYTES.view(dtype).float(), rtol=0, atol=0, equal_nan=True
    )


def test_e4m3_rounds_as_torch_does():
    ordered = BYTES[:127].view(torch.float8_e4m3fn).float()
    x = values(*between(ordered), torch.nan)
    due = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(applied(codes.e4m3_of, x, torch.uint8), due)


def test_every_e2m1_code_has_its_value():
    every = BYTES[:16]
    assert torch.equal(applied(codes.value_of_e2m1, every, torch.float32), decode_e2m1(every, torch.float32))


def test_e2m1_rounds_ties_to_the_even_code():
    x = values(*between(decode_e2m1(BYTES[:8], torch.float32)))
    assert torch.equal(applied(codes.e2m1_of, x, torch.uint8), encode_e2m1(x))


def test_a_power_of_two_is_not_below_the_value():
    x = values(1.0, 1.0000001).abs().clamp(2.0**-126, 2.0**127)
    due = ceil_power_of_two(x).to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(applied(codes.e8m0_at_least, x, torch.uint8), due)


@triton.jit
def narrow(X, Y, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_interpreter_rounds_to_nearest(dtype):
    x, y = values(1.00390625, 1.01171875), torch.empty(4096, dtype=dtype)
    launch(narrow, (1,), x, y, COUNT=4096)
    due = x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x
    assert torch.equal(y.view(torch.uint8), due.to(dtype).view(torch.uint8))


@triton.jit
def twice(X, Y, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(X + at)
    tl.store(Y + at, x + x)


def test_the_interpreter_refuses_arithmetic_on_bit_patterns():
    x = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic in bf16: widen to float32 first"):
        launch(twice, (1,), x, torch.empty_like(x), COUNT=4)
