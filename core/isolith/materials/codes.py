"""Calls of grouped_gemm in which every code of a format meets a unit row, so that its value shows to the bit."""

from collections.abc import Iterator

import torch

from isolith.sample import Make, Sample


def every_code(make: Make, out: str) -> Iterator[Sample]:
    """Every code there is: its product with a unit row is its value."""
    # Every e2m1 code, both nibbles, -0 too: the product with a unit row is the code's value.
    codes = make.place(torch.arange(256).view(1, 8, 32), torch.uint8)
    ones = {
        "x_scale": make.full(1.0, 64, 1, dtype=torch.float32),
        "weight_scale": make.full(2.0, 1, 8, 2, dtype=torch.float32),
    }
    units = make.place(torch.eye(64), torch.float8_e4m3fn)
    rows = make.tensor([64], torch.int32)
    yield Sample("every_e2m1_code", "exact", x=units, weight=codes, expert_counts=rows, **ones, out_dtype=out)
    # All but the two NaN of e4m3; on either side of the product.
    values = torch.arange(256, dtype=torch.uint8)
    values[[0x7F, 0xFF]] = 0
    codes, one = make.place(values.view(torch.float8_e4m3fn).view(2, 128), torch.float8_e4m3fn), torch.float32
    units = make.place(torch.eye(128), torch.float8_e4m3fn)
    unscaled = {"weight_scale": make.full(1.0, 1, 1, 1, dtype=one), "out_dtype": out}
    given = {"x": units, "weight": codes[None], "x_scale": make.full(1.0, 128, 1, dtype=one), **unscaled}
    yield Sample("every_e4m3_weight", "exact", **given, expert_counts=make.tensor([128], torch.int32))
    given = {"x": codes, "weight": units[None], "x_scale": make.full(1.0, 2, 1, dtype=one), **unscaled}
    yield Sample("every_e4m3_activation", "exact", **given, expert_counts=make.tensor([2], torch.int32))
    codes = make.place(torch.arange(-128, 128).view(1, 4, 64), torch.int8)
    given = {"x": make.place(torch.eye(64), make.dtype), "weight": codes}
    given["weight_scale"] = make.full(1.0, 1, 4, 1, dtype=one)
    yield Sample("every_int8_weight", "exact", **given, expert_counts=rows, out_dtype=out)
