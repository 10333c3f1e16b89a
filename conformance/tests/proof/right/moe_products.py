"""Right grouped products and whole layers, computed otherwise than the references do."""

import torch
from torch import Tensor
from variation import right

RIGHT = []

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
OUT = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def expanded(weight, scale, block_n, block_k, dtype=torch.float32):
    """[N,K] values of one weight of any kind."""
    if weight.dtype == torch.uint8:
        codes = torch.empty(weight.shape[0], 2 * weight.shape[1], dtype=torch.long)
        codes[:, 0::2], codes[:, 1::2] = (weight % 16).long(), (weight // 16).long()
        values, block_n, block_k = E2M1[codes].to(dtype), 1, 32
    else:
        values = weight.to(dtype)
    if scale is None:
        return values
    if weight.dtype == torch.int8:
        block_n, block_k = 1, max(weight.shape[1], 1)
    row, column = torch.arange(values.shape[0]) // block_n, torch.arange(values.shape[1]) // block_k
    return values * scale.to(dtype)[row][:, column]


def activations(x, scale, group, dtype=torch.float32):
    """[R,K] values of activations of any kind."""
    if scale is None:
        return x.to(dtype)
    group = max(x.shape[-1], 1) if x.dtype == torch.int8 else group
    return x.to(dtype) * scale.to(dtype)[..., torch.arange(x.shape[-1]) // group]


def whole(a, b):
    return a @ b.T


def backwards(a, b):
    return a.flip(-1) @ b.flip(-1).T


def split(parts, order=1):
    """K in interleaved parts, each a sum of its own."""

    def product(a, b):
        sums = [a[..., part::parts] @ b[:, part::parts].T for part in range(parts)][::order]
        return torch.stack(sums).sum(0)

    return product


def blocked(step):
    """One running sum over blocks of K."""

    def product(a, b):
        y = a.new_zeros(*a.shape[:-1], b.shape[0])
        for k in range(0, a.shape[-1], step):
            y = y + a[..., k : k + step] @ b[:, k : k + step].T
        return y

    return product


def padded(a, b):
    """Rows, columns and inputs filled up with zeros to multiples of 16."""
    rows, k, n = a.shape[0], a.shape[1], b.shape[0]
    a = torch.nn.functional.pad(a, (0, -k % 16, 0, -rows % 16))
    b = torch.nn.functional.pad(b, (0, -k % 16, 0, -n % 16))
    return (b @ a.T).T[:rows, :n]


def by_segments(product, dtype, x, weight, expert_counts, alignment, x_scale, weight_scale, act_group, blocks, outside):
    """float32 or float64 sums of every expert's rows; the others are left as `outside`."""
    values = activations(x, x_scale, act_group, dtype)
    y = torch.full((*x.shape[:-1], weight.shape[1]), outside, dtype=dtype)
    end = 0
    for expert in reversed(range(len(expert_counts))):
        count = int(expert_counts[expert])
        if count == 0:
            continue
        before = [int(c) for c in expert_counts[:expert]]
        start = sum((c + alignment - 1) // alignment * alignment for c in before)
        matrix = expanded(weight[expert], None if weight_scale is None else weight_scale[expert], *blocks, dtype)
        if x.dim() == 3:
            y[expert, :count] = product(values[expert, :count], matrix)
        else:
            y[start : start + count] = product(values[start : start + count], matrix)
        end = max(end, start + count)
    return y


def grouped(name, product, dtype=torch.float32, outside=float("nan")):
    def kernel(
        x, weight, expert_counts, alignment, x_scale, weight_scale, act_group, block_n, block_k, out_dtype
    ) -> Tensor:
        given = (x, weight, expert_counts, alignment, x_scale, weight_scale, act_group, (block_n, block_k), outside)
        return by_segments(product, dtype, *given).to(OUT[out_dtype])

    kernel.__name__ = name
    right(RIGHT, "grouped_gemm")(kernel)


grouped("experts_backwards", whole)
grouped("inputs_backwards", backwards)
grouped("split_k_of_8", split(8))
grouped("split_k_of_3_added_backwards", split(3, -1))
grouped("blocks_of_16", blocked(16), outside=1e30)
grouped("blocks_of_64", blocked(64))
grouped("one_product_at_a_time", blocked(1))
grouped("tiles_padded_with_zeros", padded)
grouped("products_in_float64", whole, torch.float64)


def e4m3(x, group, scale_format):
    """Codes and scales of groups, the last one short."""
    x = x.float()
    codes, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), []
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        amax = part.abs().max(1, keepdim=True).values.clamp(min=1e-4) if len(part) else part[:, :1]
        scale = amax / 448
        if scale_format == "ue8m0":
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        codes[:, start : start + group] = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales.append(scale)
    return codes, torch.cat(scales, 1)


def int8(x):
    x = x.float()
    scale = (x.abs().max(1, keepdim=True).values if len(x) else x[:, :1]).clamp(min=1e-10) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


class Plan:
    """How a layer is computed.

    Args:
        product: Of activations and a weight.
        dtype: What it computes in.
        between: What results between the parts are rounded to; None = not.
        experts: In which order experts are run.
        late: The routing weight multiplies the sum, where nothing is quantised before.
    """

    def __init__(self, product=whole, dtype=torch.float32, between=None, experts=reversed, late=False):
        self.product, self.dtype, self.between, self.experts, self.late = product, dtype, between, experts, late

    def rounded(self, values, x):
        return values.to(x.dtype).to(self.dtype) if self.between else values

    def linear(self, x, values, weight, scale, how):
        """Quantise as the weight asks, multiply."""
        act_quant, group, scale_format, *blocks = how
        auto = {torch.float8_e4m3fn: "fp8", torch.uint8: "fp8", torch.int8: "int8"}.get(weight.dtype, "none")
        kind = auto if act_quant == "auto" else act_quant
        if kind != "none":
            codes, scales = e4m3(values, group, scale_format) if kind == "fp8" else int8(values)
            values = activations(codes, scales, group, self.dtype)
        return self.rounded(self.product(values.to(self.dtype), expanded(weight, scale, *blocks, self.dtype)), x)

    def expert(self, x, rows, weights, up, up_scale, down, down_scale, limit, how):
        """[R,H]: one expert of its rows, weighted before the down projection where weights are given."""
        hidden = self.linear(x, rows, up, up_scale, how)
        gate, raised = hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]
        if limit:
            gate, raised = gate.clamp(max=limit), raised.clamp(-limit, limit)
        activated = raised * (gate / (1 + torch.exp(-gate)))
        if weights is not None:
            activated = activated * weights[:, None].to(self.dtype)
        return self.linear(x, self.rounded(activated, x), down, down_scale, how)


def quantises(act_quant, weight):
    return act_quant not in ("auto", "none") or (act_quant == "auto" and weight.dtype not in OUT.values())


def layer(name, plan):
    """An expert at a time, added into float32."""

    def kernel(x, topk_idx, topk_weights, w13, w2, **given):
        how = [given[each] for each in ("act_quant", "act_group", "scale_format", "block_n", "block_k")]
        limit, before = given["swiglu_limit"], given["weight_before_down"]
        if plan.late and not quantises(given["act_quant"], w2):
            before = False
        y = torch.zeros(x.shape, dtype=plan.dtype)
        if given["shared_w13"] is not None:
            names = ("shared_w13", "shared_w13_scale", "shared_w2", "shared_w2_scale")
            y = y + plan.expert(x, x, None, *(given[each] for each in names), limit, how)
        for expert in plan.experts(range(len(w13))):
            token, slot = (topk_idx == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            scales = [None if given[each] is None else given[each][expert] for each in ("w13_scale", "w2_scale")]
            weight = topk_weights[token, slot]
            given_weight = weight if before else None
            parts = (w13[expert], scales[0], w2[expert], scales[1])
            rows = plan.expert(x, x[token], given_weight, *parts, limit, how)
            y.index_add_(0, token, rows if before else rows * weight[:, None].to(plan.dtype))
        return y.to(x.dtype)

    kernel.__name__ = name
    right(RIGHT, "fused_moe")(kernel)


layer("expert_by_expert", Plan())
layer("expert_by_expert_backwards_in_blocks_of_64", Plan(blocked(64), experts=iter))
layer("rounded_between_the_parts", Plan(between=True))
layer("split_k_of_8_in_layers", Plan(split(8)))
layer("weights_at_the_end", Plan(late=True))
layer("layer_in_float64", Plan(dtype=torch.float64))
