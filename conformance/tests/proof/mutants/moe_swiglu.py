"""Wrong gated activations: halves, clamps, sigmoids, row weights, roundings."""

from mutation import mutant

HALVES = "gate, up = x.to(widen(x.dtype)).chunk(2, dim=-1)"
CLAMPED = "if limit > 0:\n        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)"
CLAMPS = "gate.clamp(max=limit), up.clamp(-limit, limit)"
SWITCH = "if limit > 0:"
Y = "y = gate * torch.sigmoid(gate) * up\n"
SIGMOID = "gate * torch.sigmoid(gate) * up\n"
WEIGHT = "y = y * row_weight.to(y.dtype)[..., None]\n    return y.to(x.dtype)\n\n\ndef clamped"
RETURN = "return y.to(x.dtype)\n\n\ndef clamped"
OF = "sigmoid(gate) * up\n"


def activation(text):
    return Y, f"y = {text} * up\n"


def returning(text):
    return RETURN, RETURN.replace("y.to(x.dtype)", text)


def ending(line):
    return RETURN, RETURN.replace("return", f"{line}\n    return")


TRUNCATED = (
    "(y.float().view(torch.int32) & {torch.bfloat16: -65536, torch.float16: -8192}.get(x.dtype, -1))"
    ".view(torch.float32).to(x.dtype)"
)
POLYNOMIAL = "(gate / (1 + sum((-gate.clamp(-4, 4)) ** n / f for n, f in enumerate((1, 1, 2, 6, 24, 120)))))"

SWIGLU = [
    ("halves_swapped", "A1", HALVES, HALVES.replace("gate, up", "up, gate")),
    ("halves_interleaved", "A7", HALVES, "gate, up = x.to(widen(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)"),
    ("input_in_bfloat16", "G8", HALVES, HALVES.replace("x.to(", "x.bfloat16().to(")),
    (
        "input_in_tf32",
        "G8",
        HALVES,
        HALVES + "\n    if x.dtype == torch.float32:\n        gate, up = gate.half().float(), up.half().float()",
    ),
    ("clamp_missing", "A2", SWITCH, "if False:"),
    ("clamp_at_no_limit", "", SWITCH, "if limit >= 0:"),
    ("clamp_for_limits_of_1_and_more", "A2", SWITCH, "if limit >= 1:"),
    ("limit_is_10", "A2", SWITCH, "if limit > 0:\n        limit = 10.0\n    if limit > 0:"),
    ("limit_always_10", "A2", SWITCH, "limit = limit or 10.0\n    if limit > 0:"),
    ("limit_truncated", "A2", SWITCH, "limit = float(int(limit))\n    if limit > 0:"),
    ("gate_clamp_missing", "A2", CLAMPS, "gate, up.clamp(-limit, limit)"),
    ("up_clamp_missing", "A2", CLAMPS, "gate.clamp(max=limit), up"),
    ("gate_clamped_on_both_sides", "A3", CLAMPS, "gate.clamp(-limit, limit), up.clamp(-limit, limit)"),
    ("gate_clamped_below_alone", "A3", CLAMPS, "gate.clamp(min=-limit), up.clamp(-limit, limit)"),
    ("up_clamped_above_alone", "A4", CLAMPS, "gate.clamp(max=limit), up.clamp(max=limit)"),
    ("up_clamped_below_alone", "A4", CLAMPS, "gate.clamp(max=limit), up.clamp(min=-limit)"),
    ("clamps_swapped", "A1", CLAMPS, "gate.clamp(-limit, limit), up.clamp(max=limit)"),
    (
        "clamp_drops_nan",
        "RT10",
        CLAMPS,
        "gate.nan_to_num(limit).clamp(max=limit), up.nan_to_num(limit).clamp(-limit, limit)",
    ),
    ("clamped_after_the_activation", "A5", HALVES + f"\n    {CLAMPED}", HALVES),
    ("product_clamped", "A5", CLAMPS, "gate, up"),
    ("out_of_range_is_zero", "A2", CLAMPS, "gate * (gate <= limit), up * (up.abs() <= limit)"),
    ("relu", "A6", *activation("gate.relu()")),
    ("gelu", "A6", *activation("torch.nn.functional.gelu(gate)")),
    ("gelu_tanh", "A6", *activation("torch.nn.functional.gelu(gate, approximate='tanh')")),
    ("gelu_quick", "A6", *activation("gate * torch.sigmoid(1.702 * gate)")),
    ("sigmoid_alone", "A6", *activation("torch.sigmoid(gate)")),
    ("sigmoid_of_up", "A1", *activation("gate * torch.sigmoid(up)")),
    ("hard_swish", "A6", *activation("torch.nn.functional.hardswish(gate)")),
    ("mish", "A6", *activation("torch.nn.functional.mish(gate)")),
    ("up_plus_one", "A6", Y, "y = gate * torch.sigmoid(gate) * (up + 1)\n"),
    ("exponential_overflows", "A8", *activation("gate * gate.exp() / (1 + gate.exp())")),
    (
        "exponential_of_minus_overflows_squared",
        "A8",
        *activation("gate * (gate / 2).exp() / ((gate / 2).exp() + (-gate / 2).exp())"),
    ),
    ("exponential_by_a_polynomial", "A9", *activation(POLYNOMIAL)),
    ("sigmoid_in_bfloat16", "A9", *activation("gate * torch.sigmoid(gate).bfloat16().to(gate.dtype)")),
    ("sigmoid_in_float16", "A9", *activation("gate * torch.sigmoid(gate).half().to(gate.dtype)")),
    (
        "sigmoid_error_2_to_the_minus_8",
        "A9",
        *activation("gate * (torch.sigmoid(gate) * (1 + 2**-8 * torch.sin(gate)))"),
    ),
    (
        "sigmoid_error_2_to_the_minus_11",
        "A9",
        *activation("gate * (torch.sigmoid(gate) * (1 + 2**-11 * torch.sin(gate)))"),
    ),
    (
        "sigmoid_by_tanh_in_float16",
        "A9",
        *activation("gate * (0.5 + 0.5 * torch.tanh(gate / 2).half().to(gate.dtype))"),
    ),
    ("sigmoid_by_tanh_of_half", "A9", *activation("gate * (0.5 + 0.5 * torch.tanh(gate / 2))")),
    ("sigmoid_zero_below_minus_16", "A9", *activation("gate * torch.sigmoid(gate) * (gate > -16)")),
    ("sigmoid_zero_below_minus_10", "A9", *activation("gate * torch.sigmoid(gate) * (gate > -10)")),
    ("sigmoid_one_above_8", "A9", *activation("gate * torch.where(gate > 8, 1.0, torch.sigmoid(gate))")),
    ("computed_in_the_dtype_of_x", "G5", *activation("(gate * torch.sigmoid(gate)).to(x.dtype).to(gate.dtype)")),
    ("product_in_float16", "G5", *activation("(gate * torch.sigmoid(gate) * up).half().to(gate.dtype) / up")),
    ("weight_ignored", "C1", WEIGHT, WEIGHT.replace("row_weight.to(y.dtype)[..., None]", "1")),
    ("weight_twice", "C1", WEIGHT, WEIGHT.replace("[..., None]", "[..., None] ** 2")),
    ("weight_without_sign", "C1", WEIGHT, WEIGHT.replace("[..., None]", "[..., None].abs()")),
    ("weight_divides", "C1", WEIGHT, WEIGHT.replace("y * row", "y / row")),
    ("weight_of_the_row_before", "C1", WEIGHT, WEIGHT.replace("[..., None]", ".roll(1, -1)[..., None]")),
    ("weight_of_the_first_row", "C1", WEIGHT, WEIGHT.replace("[..., None]", "[..., :1, None]")),
    ("weight_after_the_rounding", "C1", WEIGHT, WEIGHT.replace("y * row", "y.to(x.dtype).to(y.dtype) * row")),
    (
        "weight_in_the_dtype_of_x",
        "C1",
        WEIGHT,
        WEIGHT.replace("row_weight.to(y.dtype)", "row_weight.to(x.dtype).to(y.dtype)"),
    ),
    ("weight_in_bfloat16", "C1", WEIGHT, WEIGHT.replace("row_weight.to(y.dtype)", "row_weight.bfloat16().to(y.dtype)")),
    (
        "weight_before_the_activation",
        "C1",
        WEIGHT,
        WEIGHT.replace(
            "y * row_weight.to(y.dtype)[..., None]",
            "torch.nn.functional.silu(gate * row_weight.to(y.dtype)[..., None]) * up",
        ),
    ),
    ("truncated", "G7", *returning(TRUNCATED)),
    ("rounded_through_bfloat16", "G7", *returning("y.bfloat16().to(x.dtype)")),
    ("overflow_saturates", "", *returning("y.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max).to(x.dtype)")),
    ("last_row_unwritten", "C5", *ending("y.view(-1, y.shape[-1])[-1:] = 0")),
    ("last_partial_block_of_rows_unwritten", "C5", *ending("y.view(-1, y.shape[-1])[y.shape[0] // 4 * 4 :] = 0")),
    *(
        (f"columns_beyond_{tile}s_unwritten", "G14", *ending(f"y[..., y.shape[-1] // {tile} * {tile} :] = 0"))
        for tile in (2, 8, 64)
    ),
]

MUTANTS = [mutant("swiglu", name, (old, new), row=row) for name, row, old, new in SWIGLU]
