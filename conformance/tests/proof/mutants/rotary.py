"""Wrong rotations: the rotary embedding and Hadamard's."""

from mutation import mutant

ANGLES = "cos, sin = cos_table[positions.long()].to(wide), sin_table[positions.long()].to(wide)"
HEADS = "        cos, sin = cos[:, None], sin[:, None]\n"
SIGN = "return a, b, cos, -sin if inverse else sin"
EVEN = "a, b = rotated[..., 0::2], rotated[..., 1::2]"
HALVES = "a, b = rotated[..., : cos_table.shape[1]], rotated[..., cos_table.shape[1] :]"
TURNED = "return with_pairs(x, a * cos - b * sin, a * sin + b * cos, interleaved, rope_first)"
JOINED = "torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)"
KEPT = "y = x.clone(memory_format=torch.contiguous_format)"
START = "start = 0 if rope_first else x.shape[-1] - 2 * pairs"
STORE = "= rotated.to(x.dtype)"
ROTATED = "rotated = x[..., rotated_dims(x, cos_table.shape[1], rope_first)].to(wide)"
WIDE = "    wide = widen(x.dtype)\n    rotated"


def rope(name, old, new, *count, **about):
    return mutant("rope", name, (old, new, *count), **about)


def at(position):
    """The angles of other positions."""
    return ANGLES.replace("positions.long()", position)


def turned(a, b, before=""):
    return f"{before}return with_pairs(x, {a}, {b}, interleaved, rope_first)"


ROPES = [
    rope("sine_negated", TURNED, turned("a * cos + b * sin", "b * cos - a * sin"), row="O2"),
    rope("only_second_sine_negated", TURNED, turned("a * cos - b * sin", "b * cos - a * sin")),
    rope("only_first_sine_positive", TURNED, turned("a * cos + b * sin", "a * sin + b * cos")),
    rope("sine_and_cosine_swapped", ANGLES, ANGLES.replace("cos, sin =", "sin, cos =")),
    rope("halves_of_a_pair_swapped", TURNED, turned("b * cos - a * sin", "b * sin + a * cos")),
    rope("second_uses_the_turned_first", TURNED, turned("a", "a * sin + b * cos", "a = a * cos - b * sin\n    ")),
    rope("sine_ignored", TURNED, turned("a * cos", "b * cos")),
    rope("not_rotated", TURNED, "return x.contiguous()"),
    rope("inverse_ignored", SIGN, "return a, b, cos, sin", row="O2"),
    rope("always_inverse", SIGN, "return a, b, cos, -sin"),
    rope("inverse_negates_cosine", SIGN, "return a, b, -cos if inverse else cos, sin"),
    rope("inverse_negates_both", SIGN, "return a, b, -cos if inverse else cos, -sin if inverse else sin"),
    mutant(
        "rope",
        "interleaved_ignored",
        (f"if interleaved:\n        {EVEN}", f"if True:\n        {EVEN}"),
        (JOINED, JOINED.replace("if interleaved", "if True")),
        row="O1",
    ),
    mutant(
        "rope",
        "always_half_split",
        (f"if interleaved:\n        {EVEN}", f"if False:\n        {EVEN}"),
        (JOINED, JOINED.replace("if interleaved", "if False")),
        row="O1",
    ),
    rope("joined_in_halves", JOINED, JOINED.replace("if interleaved", "if False")),
    rope("joined_interleaved", JOINED, JOINED.replace("if interleaved", "if True")),
    rope("halves_in_reverse", HALVES, "b, a = rotated[..., : cos_table.shape[1]], rotated[..., cos_table.shape[1] :]"),
    rope("rope_first_ignored", START, START.replace("0 if rope_first else ", ""), row="O4"),
    rope("always_first_dims", START, "start = 0", row="O4"),
    rope("one_dim_early", START, "start = 0 if rope_first else max(x.shape[-1] - 2 * pairs - 1, 0)", row="O4"),
    rope("one_pair_early", START, "start = 0 if rope_first else max(x.shape[-1] - 2 * pairs - 2, 0)", row="O4"),
    rope("offset_of_64_dims", START, "start = 0 if rope_first else max(x.shape[-1] - max(64, 2 * pairs), 0)"),
    rope("position_0", ANGLES, at("torch.zeros_like(positions).long()")),
    rope("position_is_the_row", ANGLES, at("torch.arange(x.shape[0])")),
    rope("position_of_the_first_token", ANGLES, at("positions[:1].long().expand(x.shape[0])")),
    rope("position_one_more", ANGLES, at("(positions.long() + 1).clamp(max=cos_table.shape[0] - 1)")),
    rope("position_one_less", ANGLES, at("(positions.long() - 1).clamp(min=0)")),
    rope("position_sorted", ANGLES, at("positions.long().sort().values")),
    rope("position_of_16_bits", ANGLES, at("(positions.long() % 65536)"), row="O3"),
    rope("position_of_15_bits", ANGLES, at("positions.to(torch.int16).long()"), row="O3"),
    rope(
        "position_in_float16",
        ANGLES,
        at("positions.half().float().nan_to_num(0, 0, 0).long().clamp(max=cos_table.shape[0] - 1)"),
    ),
    rope("position_in_bfloat16", ANGLES, at("positions.bfloat16().long().clamp(max=cos_table.shape[0] - 1)"), row="O3"),
    rope("position_below_4096", ANGLES, at("positions.long().clamp(max=4095)")),
    rope("position_in_pairs", ANGLES, at("(positions.long() // 2)")),
    rope(
        "sine_of_the_next_position",
        ANGLES,
        ANGLES.replace("sin_table[positions.long()]", "sin_table.roll(-1, 0)[positions.long()]"),
    ),
    rope("columns_in_reverse", ANGLES, ANGLES + "\n    cos, sin = cos.flip(-1), sin.flip(-1)"),
    rope(
        "columns_repeated_in_halves",
        ANGLES,
        ANGLES + "\n    half = torch.arange(cos.shape[1]) // 2\n    cos, sin = cos[:, half], sin[:, half]",
    ),
    rope("column_of_the_next_pair", ANGLES, ANGLES + "\n    cos, sin = cos.roll(-1, 1), sin.roll(-1, 1)"),
    rope(
        "first_column_for_all",
        ANGLES,
        ANGLES + "\n    cos, sin = cos[:, :1].expand(cos.shape), sin[:, :1].expand(sin.shape)",
    ),
    rope("columns_beyond_32_missing", ANGLES, ANGLES + "\n    cos[:, 32:], sin[:, 32:] = 1, 0"),
    rope("last_pair_not_rotated", ANGLES, ANGLES + "\n    cos[:, -1:], sin[:, -1:] = 1, 0"),
    rope("tables_narrow", ANGLES, ANGLES + "\n    cos, sin = cos.to(x.dtype).to(wide), sin.to(x.dtype).to(wide)"),
    rope("tables_in_bfloat16", ANGLES, ANGLES + "\n    cos, sin = cos.bfloat16().to(wide), sin.bfloat16().to(wide)"),
    rope(
        "tables_in_tf32",
        ANGLES,
        ANGLES + "\n    cos, sin = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (cos, sin))",
        row="G8",
    ),
    rope("amplitude_of_yarn", ANGLES, ANGLES + "\n    cos, sin = 1.2773 * cos, 1.2773 * sin", row="O6"),
    rope(
        "products_narrow",
        TURNED,
        turned("(a * cos).to(x.dtype) - (b * sin).to(x.dtype)", "(a * sin).to(x.dtype) + (b * cos).to(x.dtype)"),
    ),
    rope("sine_made_of_cosine", SIGN, "sin = (1 - cos * cos).clamp(min=0).sqrt() * sin.sign()\n    " + SIGN),
    rope(
        "one_head_turned",
        HEADS,
        HEADS + "        cos, sin = cos.repeat(1, x.shape[1], 1), sin.repeat(1, x.shape[1], 1)\n"
        "        cos[:, 1:], sin[:, 1:] = 1, 0\n",
    ),
    rope(
        "heads_beyond_32_not_turned",
        HEADS,
        HEADS + "        cos, sin = cos.repeat(1, x.shape[1], 1), sin.repeat(1, x.shape[1], 1)\n"
        "        cos[:, 32:], sin[:, 32:] = 1, 0\n",
    ),
    rope(
        "head_for_token",
        HEADS,
        HEADS + "        head = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) // max(x.shape[1], 1)\n"
        "        cos, sin = cos[(head + torch.arange(x.shape[1])) % max(x.shape[0], 1), 0], sin[(head + "
        "torch.arange(x.shape[1])) % max(x.shape[0], 1), 0]\n",
    ),
    rope("last_token_not_turned", ANGLES, ANGLES + "\n    cos[-1:], sin[-1:] = 1, 0"),
    rope(
        "tokens_beyond_a_multiple_of_4_not_turned",
        ANGLES,
        ANGLES + "\n    cos[x.shape[0] // 4 * 4 :], sin[x.shape[0] // 4 * 4 :] = 1, 0",
    ),
    rope("other_dims_zero", KEPT, "y = torch.zeros_like(x).contiguous()", row="X3"),
    rope("other_dims_multiplied_by_1_and_0", KEPT, "y = (x + 0 * x.roll(1, -1)).contiguous()"),
    rope("other_dims_narrow", KEPT, "y = x.bfloat16().to(x.dtype).contiguous()"),
    rope("other_dims_without_nan", KEPT, "y = x.nan_to_num().contiguous()"),
    rope("strides_ignored", WIDE, "    x = x.as_strided(x.shape, torch.empty(x.shape).stride())\n" + WIDE),
    rope(
        "store_cuts",
        STORE,
        "= (rotated if x.dtype != torch.bfloat16 else (rotated.view(torch.int32) & "
        "-65536).view(torch.float32)).to(x.dtype)",
        row="G7",
    ),
    rope("store_narrow_twice", STORE, "= rotated.to(torch.bfloat16).to(x.dtype)"),
]

LOOP = "    for bit in range(bits_of(x)):\n        y = butterfly(y, bit)\n"
SCALED = "    return (y * scale_of(x)).to(x.dtype).contiguous()"
SCALE = "return 1 / math.sqrt(x.shape[-1])"
SUMS = "return torch.stack((low + high, low - high), dim=-2).flatten(-3)"
INPUT = "    y = x.to(widen(x.dtype))\n    for"


def hadamard(name, old, new, *count, **about):
    return mutant("hadamard", name, (old, new, *count), **about)


HADAMARDS = [
    hadamard("not_scaled", SCALED, "    return y.to(x.dtype).contiguous()"),
    hadamard("scaled_by_n", SCALE, "return 1 / x.shape[-1]"),
    hadamard("scale_of_128", SCALE, "return 1 / math.sqrt(128)"),
    hadamard("scale_of_the_rows", SCALE, "return 1 / math.sqrt(max(x.shape[0], 1))"),
    hadamard("scale_by_bits_halved", SCALE, "return 0.5 ** (bits_of(x) // 2)"),
    hadamard("scaled_narrow", SCALED, "    return (y.to(x.dtype) * scale_of(x)).contiguous()"),
    hadamard("differences_reversed", SUMS, SUMS.replace("low - high", "high - low")),
    hadamard("sums_and_differences_swapped", SUMS, SUMS.replace("low + high, low - high", "low - high, low + high")),
    hadamard("magnitudes_of_differences", SUMS, SUMS.replace("low - high", "(low - high).abs()")),
    hadamard("neighbours_joined", SUMS, SUMS.replace("dim=-2", "dim=-1")),
    hadamard("last_step_missing", LOOP, LOOP.replace("range(bits_of(x))", "range(bits_of(x) - 1)")),
    hadamard("first_step_missing", LOOP, LOOP.replace("range(bits_of(x))", "range(1, bits_of(x))")),
    hadamard("at_most_7_steps", LOOP, LOOP.replace("range(bits_of(x))", "range(min(bits_of(x), 7))")),
    hadamard("one_step_twice", LOOP, LOOP + "    y = butterfly(y, 0) if bits_of(x) else y\n"),
    hadamard(
        "one_column_takes_no_copy",
        INPUT,
        INPUT.replace("    y =", "    if x.shape[-1] == 1:\n        return -x\n    y ="),
    ),
    hadamard(
        "order_of_bit_reversal",
        SCALED,
        "    n, bits = x.shape[-1], bits_of(x)\n"
        "    order = [int(format(i, 'b').zfill(bits)[::-1] or '0', 2) for i in range(n)]\n    y = y[..., order]\n"
        + SCALED,
    ),
    hadamard(
        "order_of_sequency",
        SCALED,
        "    n, bits = x.shape[-1], bits_of(x)\n"
        "    order = [int(format(i ^ (i >> 1), 'b').zfill(bits)[::-1] or '0', 2) for i in range(n)]\n"
        "    y = y[..., order]\n" + SCALED,
    ),
    hadamard(
        "order_of_gray",
        SCALED,
        "    order = [i ^ (i >> 1) for i in range(x.shape[-1])]\n    y = y[..., order]\n" + SCALED,
    ),
    hadamard("outputs_in_reverse", SCALED, "    y = y.flip(-1)\n" + SCALED),
    hadamard("inputs_in_reverse", INPUT, INPUT.replace("widen(x.dtype))", "widen(x.dtype)).flip(-1)")),
    hadamard("first_axis", INPUT, INPUT.replace("y = x", "y = x if x.shape[0] != x.shape[-1] else x.roll(1, 0)")),
    hadamard("input_narrow", INPUT, INPUT.replace("y = x", "y = x.bfloat16()")),
    hadamard(
        "summed_narrow", LOOP, LOOP.replace("butterfly(y, bit)", "butterfly(y, bit).to(x.dtype).to(y.dtype)"), row="G5"
    ),
    hadamard("last_sum_narrow", SCALED, "    y = y.to(x.dtype).to(y.dtype)\n" + SCALED),
    hadamard(
        "summed_in_tf32",
        LOOP,
        LOOP.replace("butterfly(y, bit)", "(butterfly(y, bit).view(torch.int32) & ~0x1FFF).view(torch.float32)"),
        row="G8",
    ),
    hadamard(
        "sums_clamped_to_float16", LOOP, LOOP.replace("butterfly(y, bit)", "butterfly(y, bit).clamp(-65504, 65504)")
    ),
    hadamard(
        "last_row_not_rotated",
        SCALED,
        "    y[-1:] = (x if x.dim() > 1 else y)[-1:].to(y.dtype) / scale_of(x)\n" + SCALED,
    ),
    hadamard("strides_ignored", INPUT, "    x = x.as_strided(x.shape, torch.empty(x.shape).stride())\n" + INPUT),
    hadamard(
        "store_cuts",
        SCALED,
        "    y = y * scale_of(x)\n"
        "    return (y if x.dtype != torch.bfloat16 else (y.view(torch.int32) & "
        "-65536).view(torch.float32)).to(x.dtype).contiguous()",
        row="G7",
    ),
]

MUTANTS = [*ROPES, *HADAMARDS]
