"""Wrong products with quantised weights."""

from mutants.quant_values import CLAMPED
from mutation import mutant

MATMUL = "numerics.scaled_matmul"
INPUT = (
    "    wide = compute_dtype(x, out_dtype)\n    if x_scale is None:\n"
    "        x, x_scale = quantised(x, resolve_act_quant(act_quant, weight), act_group, scale_format)\n"
    "    values = dequantise_activation(x, x_scale, act_group, wide)\n    y = values @"
)
PRODUCT = "y = values @ dequantise_weight(weight, weight_scale, block_n, block_k, wide).T"
STORE = PRODUCT + "\n    return y.to(FLOAT_NAMES[out_dtype])"
QUANTISED = "x, x_scale = quantised(x, resolve_act_quant(act_quant, weight), act_group, scale_format)"
TO_FP8 = "return act_quant_fp8(x, act_group, scale_format)"
TO_INT8 = 'return act_quant_int8(x) if act_quant == "int8" else (x, None)'
KINDS = 'return {torch.float8_e4m3fn: "fp8", torch.uint8: "fp8", torch.int8: "int8"}.get(weight.dtype, "none")'
BLOCKS = "return (1, max(weight.shape[-1], 1)) if weight.dtype == torch.int8 else (block_n, block_k)"
GROUP = "group = max(x.shape[-1], 1) if x.dtype == torch.int8 else act_group"
WEIGHTS = "W = dequantise_weight(weight, weight_scale, block_n, block_k, wide).T\n    "


def linear(name, *edit, **about):
    return mutant("quant_linear", name, edit, **about)


def product(name, new, **about):
    return linear(name, PRODUCT, new, **about)


MUTANTS = [
    product(
        "transposed_where_square",
        "W = dequantise_weight(weight, weight_scale, block_n, block_k, wide)\n"
        "    y = values @ (W if W.shape[0] == W.shape[1] else W.T)",
        row="G3",
    ),
    product("last_input_dropped", WEIGHTS + "y = values[..., :-1] @ W[:-1]", row="G1"),
    product(
        "inputs_beyond_a_multiple_of_32_dropped",
        WEIGHTS + "k = values.shape[-1] // 32 * 32\n    y = values[..., :k] @ W[:k]",
        row="G1",
    ),
    product(
        "inputs_beyond_a_multiple_of_128_dropped",
        WEIGHTS + "k = max(values.shape[-1] // 128 * 128, 64)\n    y = values[..., :k] @ W[:k]",
        row="G1",
    ),
    product(
        "last_of_two_splits_dropped",
        WEIGHTS
        + "k = values.shape[-1] if values.shape[-1] < 2048 else values.shape[-1] // 2\n    y = values[..., :k] @ W[:k]",
    ),
    product("outputs_beyond_a_multiple_of_16_zero", PRODUCT + "\n    y[..., y.shape[-1] // 16 * 16 :] = 0", row="G14"),
    product("outputs_beyond_a_multiple_of_64_zero", PRODUCT + "\n    y[..., y.shape[-1] // 64 * 64 :] = 0", row="G14"),
    product("last_token_zero", PRODUCT + "\n    y.view(-1, max(y.shape[-1], 1))[-1:] = 0", row="X3"),
    product("first_token_for_all", PRODUCT + "\n    y = y[..., :1, :].expand(y.shape)"),
    product(
        "summed_narrow",
        WEIGHTS + "y = torch.zeros_like(values @ W)\n    for k in range(0, values.shape[-1], 64):\n"
        "        y = (y + values[..., k : k + 64] @ W[k : k + 64]).bfloat16().to(wide)",
        row="G5",
    ),
    product(
        "summed_in_float16",
        WEIGHTS + "y = torch.zeros_like(values @ W)\n    for k in range(0, values.shape[-1], 64):\n"
        "        y = (y + values[..., k : k + 64] @ W[k : k + 64]).half().to(wide)",
        row="G5",
    ),
    product(
        "two_splits_added_narrow",
        WEIGHTS + "half = values.shape[-1] // 2\n"
        "    y = (values[..., :half] @ W[:half]).bfloat16().to(wide) + (values[..., half:] @ "
        "W[half:]).bfloat16().to(wide)",
    ),
    product(
        "summed_with_14_bits",
        WEIGHTS + "y = torch.zeros_like(values @ W)\n    for k in range(0, values.shape[-1], 32):\n"
        "        y = ((y + values[..., k : k + 32] @ W[k : k + 32]).view(torch.int32) & ~0x3FF).view(torch.float32)",
        row="G5",
    ),
    product(
        "float32_in_tf32",
        WEIGHTS + "cut = lambda t: ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)\n"
        "    y = cut(values) @ cut(W)",
        row="G8",
    ),
    product("weights_narrow", WEIGHTS + "y = values @ W.bfloat16().to(wide)"),
    product("activations_narrow", WEIGHTS + "y = values.bfloat16().to(wide) @ W"),
    product("activations_in_float16", WEIGHTS + "y = values.half().to(wide) @ W"),
    product("weights_in_float16", WEIGHTS + "y = values @ W.half().to(wide)"),
    product("weights_in_e4m3", WEIGHTS + "y = values @ W.to(torch.float8_e4m3fn).to(wide)", row="G8"),
    product(
        "int32_sum_wraps_at_16_bits",
        WEIGHTS + "y = values @ W\n    if x.dtype == torch.int8 and weight.dtype == torch.int8:\n"
        "        total = x.long() @ weight.T.long()\n"
        "        y = ((total + 32768) % 65536 - 32768) * x_scale.to(wide) * weight_scale[:, 0].to(wide)",
    ),
    product(
        "int8_sum_in_float16",
        WEIGHTS + "y = values @ W\n    if x.dtype == torch.int8 and weight.dtype == torch.int8:\n"
        "        y = (x.to(wide) @ weight.T.to(wide)).half().to(wide) * x_scale.to(wide) * weight_scale[:, 0].to(wide)",
    ),
    product("doubled_in_place", PRODUCT + "\n    y = y + y", row="G9"),
    product("bias_of_one_ulp", PRODUCT + "\n    y = y * (1 + 2.0**-10)"),
    linear(
        "weight_strides_ignored",
        INPUT,
        "    weight = weight.as_strided(weight.shape, torch.empty(weight.shape).stride())\n" + INPUT,
    ),
    linear("x_strides_ignored", INPUT, "    x = x.as_strided(x.shape, torch.empty(x.shape).stride())\n" + INPUT),
    linear("rounded_to_bfloat16_first", STORE, STORE.replace("y.to(FLOAT", "y.to(torch.bfloat16).to(FLOAT")),
    linear(
        "always_like_x", STORE, STORE.replace("FLOAT_NAMES[out_dtype]", "wide if x.dtype not in FLOAT else x.dtype")
    ),
    linear("rounded_to_float16_first", STORE, STORE.replace("y.to(FLOAT", "y.to(torch.float16).to(FLOAT")),
    linear("always_bfloat16", STORE, STORE.replace("FLOAT_NAMES[out_dtype]", "torch.bfloat16")),
    linear("saturates_at_float16", STORE, STORE.replace("y.to(FLOAT", "y.clamp(-65504, 65504).to(FLOAT")),
    linear(
        "store_cuts",
        STORE,
        STORE.replace(
            "y.to(", "(y if out_dtype != 'bfloat16' else (y.view(torch.int32) & -65536).view(torch.float32)).to("
        ),
        row="G7",
    ),
    linear("activations_never_quantised", MATMUL, KINDS, 'return "none"'),
    linear(
        "activations_of_e2m1_not_quantised", MATMUL, KINDS, KINDS.replace('torch.uint8: "fp8"', 'torch.uint8: "none"')
    ),
    linear(
        "activations_of_e4m3_not_quantised",
        MATMUL,
        KINDS,
        KINDS.replace('torch.float8_e4m3fn: "fp8"', 'torch.float8_e4m3fn: "none"'),
    ),
    linear(
        "activations_of_int8_not_quantised", MATMUL, KINDS, KINDS.replace('torch.int8: "int8"', 'torch.int8: "none"')
    ),
    linear("activations_of_int8_in_e4m3", MATMUL, KINDS, KINDS.replace('torch.int8: "int8"', 'torch.int8: "fp8"')),
    linear(
        "activations_of_e4m3_in_int8",
        MATMUL,
        KINDS,
        KINDS.replace('torch.float8_e4m3fn: "fp8"', 'torch.float8_e4m3fn: "int8"'),
    ),
    linear("activations_of_floats_in_e4m3", MATMUL, KINDS, KINDS.replace('"none"', '"fp8"')),
    linear("act_quant_ignored", MATMUL, '    if act_quant != "auto":\n        return act_quant\n', ""),
    linear("none_means_auto", MATMUL, 'if act_quant != "auto":', 'if act_quant not in ("auto", "none"):'),
    linear("fp8_means_auto", MATMUL, 'if act_quant != "auto":', 'if act_quant not in ("auto", "fp8"):'),
    linear("int8_means_auto", MATMUL, 'if act_quant != "auto":', 'if act_quant not in ("auto", "int8"):'),
    linear(
        "act_group_is_the_default_in_quantising",
        TO_FP8,
        TO_FP8.replace("act_group", "128").replace("return ", "group = act_group\n        q, s = ")
        + "\n        return q, s.repeat_interleave(128, -1)[..., : x.shape[-1]][..., ::group]",
    ),
    linear("scale_format_is_the_default", TO_FP8, "return act_quant_fp8(x, act_group)"),
    linear("scale_format_is_float32", TO_FP8, 'return act_quant_fp8(x, act_group, "float32")'),
    linear(
        "activations_scaled_by_the_tensor",
        TO_FP8,
        "q, s = act_quant_fp8(x.reshape(1, -1), max(x.numel(), 1), scale_format)\n"
        "        groups = -(-x.shape[-1] // act_group)\n"
        "        return q.view(x.shape), s.view(torch.uint8 if s.element_size() == 1 else "
        "s.dtype).expand(x[..., :1].numel(), groups).reshape(*x.shape[:-1], groups).view(s.dtype) if "
        "x.numel() else act_quant_fp8(x, act_group, scale_format)[1]",
        row="Q1",
    ),
    linear(
        "int8_activations_scaled_by_the_tensor",
        TO_INT8,
        'if act_quant == "int8" and x.numel():\n        q, s = act_quant_int8(x.reshape(1, -1))\n'
        "        return q.view(x.shape), s.expand(*x.shape[:-1], 1)\n    " + TO_INT8,
        row="Q1",
    ),
    linear(
        "x_scale_ignored",
        MATMUL,
        "    if x_scale is None:\n        return values\n    group",
        "    return values\n    group",
    ),
    linear(
        "x_scale_inverted",
        MATMUL,
        "return values * spread_groups(x_scale.to(dtype)",
        "return values * spread_groups(1 / x_scale.to(dtype)",
    ),
    linear(
        "x_scale_of_the_first_group",
        MATMUL,
        "return values * spread_groups(x_scale.to(dtype)",
        "return values * spread_groups(x_scale.to(dtype)[..., :1].expand(x_scale.shape)",
    ),
    linear(
        "x_scale_of_the_first_token",
        MATMUL,
        "return values * spread_groups(x_scale.to(dtype)",
        "return values * spread_groups(x_scale.to(dtype)[:1].expand(x_scale.shape)",
    ),
    linear(
        "x_scale_of_the_next_group",
        MATMUL,
        "return values * spread_groups(x_scale.to(dtype)",
        "return values * spread_groups(x_scale.to(dtype).roll(-1, -1)",
    ),
    linear(
        "x_scale_columnwise_in_memory",
        MATMUL,
        "return values * spread_groups(x_scale.to(dtype)",
        "return values * spread_groups(x_scale.to(dtype).mT.reshape(x_scale.shape)",
    ),
    linear(
        "x_scale_in_groups_of_128",
        MATMUL,
        GROUP,
        GROUP.replace("else act_group", "else 128")
        + "\n    x_scale = x_scale.repeat(*[1] * (x_scale.dim() - 1), -(-x.shape[-1] // (128 * x_scale.shape[-1])))",
    ),
    linear(
        "weight_scale_ignored",
        MATMUL,
        "    values = decode(weight, dtype)\n    if scale is None:",
        "    values = decode(weight, dtype)\n    if True:",
    ),
    linear(
        "e2m1_groups_of_64",
        MATMUL,
        "    rows, columns = blocks_of(weight, block_n, block_k)\n    return values",
        "    rows, columns = blocks_of(weight, block_n, block_k)\n    if weight.dtype == torch.uint8:\n"
        "        columns, scale = 64, scale[..., ::2]\n    return values",
    ),
    mutant(
        "quant_linear",
        "block_n_for_block_k",
        (MATMUL, BLOCKS, BLOCKS.replace("(block_n, block_k)", "(block_n, block_n)")),
        *CLAMPED,
    ),
    mutant(
        "quant_linear",
        "blocks_are_the_default",
        (MATMUL, BLOCKS, BLOCKS.replace("(block_n, block_k)", "(128, 128)")),
        *CLAMPED,
    ),
    mutant(
        "quant_linear",
        "blocks_swapped",
        (MATMUL, BLOCKS, BLOCKS.replace("(block_n, block_k)", "(block_k, block_n)")),
        *CLAMPED,
    ),
    linear(
        "int8_scale_of_the_first_output",
        MATMUL,
        "    rows, columns = blocks_of(weight, block_n, block_k)\n    return values",
        "    rows, columns = blocks_of(weight, block_n, block_k)\n    if weight.dtype == torch.int8:\n"
        "        scale = scale[:1].expand(scale.shape)\n    return values",
    ),
    linear(
        "scales_below_2_to_minus_64_flushed",
        MATMUL,
        "    rows, columns = blocks_of(weight, block_n, block_k)\n    return values",
        "    scale = torch.where(scale.float() < 2.0**-64, 0.0, scale.float())\n"
        "    rows, columns = blocks_of(weight, block_n, block_k)\n    return values",
        row="Q12",
    ),
    linear(
        "scales_multiplied_first_in_float16",
        PRODUCT,
        "y = (x.to(wide) @ weight.to(wide).T) * (x_scale.half() * weight_scale[:, 0].half()).to(wide) if "
        "x.dtype == torch.int8 == weight.dtype else values @ dequantise_weight(weight, weight_scale, "
        "block_n, block_k, wide).T",
    ),
]
