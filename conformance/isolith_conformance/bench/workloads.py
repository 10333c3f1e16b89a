"""What is timed: every operator that a model has, at the shapes of its layers. Norms, residuals, rotation, experts.

A workload makes its arguments when asked, on any device: on "meta" they have no memory, so that a call's size is known
before it is made. Routing is balanced: each token's experts differ, and as many experts as there can be have rows,
which is what the operators' costs count.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from isolith.models import V4, V32, Model, blocks
from isolith.operator import AnyOperator
from isolith.ops import moe, norm, quant, residual, rotary
from isolith_conformance.bench.fill import E8M0, FP32, Fill

Arguments = dict[str, Any]  # Any: an operator's arguments
Phase = Literal["decode", "prefill"]
KINDS = ("bf16", "fp8", "fp4", "int8")
"""Kinds of weights: bfloat16; e4m3 in blocks of 128 x 128; packed e2m1; int8 with a scale a row."""
GROUPS, TOPK_GROUPS = 8, 4
"""Groups of experts of V3.2, and how many compete (config.json: n_group, topk_group)."""
SWIGLU_LIMIT = 10.0
"""V4's clamp (config.json: swiglu_limit)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One step of a model.

    Args:
        model: Its shapes.
        phase: "decode": `tokens` sequences of one token each; "prefill": one sequence of `tokens` tokens.
        context: The length of every sequence, this step's tokens included.
        tokens: Of this step.
        experts: Routed experts kept.
    """

    model: Model
    phase: Phase
    context: int
    tokens: int
    experts: int

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.tokens if self.phase == "decode" else 1

    @property
    def new(self) -> int:
        """Tokens of each sequence in this step."""
        return 1 if self.phase == "decode" else self.tokens

    @property
    def positions(self) -> Tensor:
        """The position of every token, on the host."""
        return torch.arange(self.context - self.new, self.context).repeat(self.sequences)

    @property
    def words(self) -> str:
        """The step for who waits."""
        return f"context {self.context}, tokens {self.tokens}"

    @property
    def expert_note(self) -> str:
        """What is said of rows with fewer experts than the model's."""
        return "" if self.experts == self.model.experts else f"{self.experts} of {self.model.experts} experts"

    def batch(self, fill: Fill) -> Arguments:
        """cu_seqlens and start_pos."""
        bounds = torch.arange(self.sequences + 1) * self.new
        start = torch.full((self.sequences,), self.context - self.new)
        return {"cu_seqlens": fill.given(bounds), "start_pos": fill.given(start)}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call to time; `note` says in which way it is not the model's own."""

    operator: AnyOperator
    label: str
    make: Callable[[Fill], Arguments]
    note: str = ""


Parts = Iterator[Workload]


def workloads(setting: Setting) -> tuple[Workload, ...]:
    """Every call of a setting, operator by operator."""
    from isolith_conformance.bench.workloads_attention import attention_parts  # it is made of this module

    makers = (norm_parts, residual_parts, rotary_parts, gate_parts, expert_parts, attention_parts, quant_parts)
    return tuple(one for parts in makers for one in parts(setting))


def norm_parts(at: Setting) -> Parts:
    """Norms of the hidden state, of the low-rank query, and of query heads."""
    for label, size in (("hidden", at.model.hidden), ("q_rank", at.model.q_rank)):

        def rms(fill: Fill, size: int = size) -> Arguments:
            return {"x": fill.normal(at.tokens, size), "weight": fill.normal(size, std=0.1, mean=1.0, dtype=FP32)}

        yield Workload(operator=norm.rms_norm, label=label, make=rms)
    if isinstance(at.model, V4):
        yield Workload(operator=norm.head_rms_norm, label="queries", make=lambda fill: {"x": queries(at, fill)})


def head_dim(model: Model) -> int:
    """Width of a query head."""
    if isinstance(model, V4):
        return model.head_dim
    assert isinstance(model, V32), "there are two families of models"
    return model.nope_dim + model.rope_dim


def queries(at: Setting, fill: Fill) -> Tensor:
    """Queries of every head."""
    return fill.normal(at.tokens, at.model.heads, head_dim(at.model))


def residual_parts(at: Setting) -> Parts:
    """Hyper-connections of V4."""
    model = at.model
    if not isinstance(model, V4):
        return
    n, hidden = model.streams, model.hidden

    def mixing(fill: Fill, rows: int, scales: int) -> Arguments:
        return {
            "streams": fill.normal(at.tokens, n, hidden),
            "fn": fill.normal(rows, n * hidden, std=(n * hidden) ** -0.5, dtype=FP32),
            "scale": fill.uniform(scales, low=0.5, high=1.5),
            "base": fill.normal(rows, std=0.5, dtype=FP32),
        }

    def post(fill: Fill) -> Arguments:
        return {
            "x": fill.normal(at.tokens, hidden),
            "streams": fill.normal(at.tokens, n, hidden),
            "post": fill.uniform(at.tokens, n, high=2.0),
            "comb": fill.uniform(at.tokens, n, n, high=0.5),
        }

    def logits(fill: Fill) -> Arguments:
        return {"logits": fill.normal(at.tokens, n, n, dtype=FP32)}

    yield Workload(operator=residual.hc_pre, label="layer", make=lambda fill: mixing(fill, (2 + n) * n, 3))
    yield Workload(operator=residual.sinkhorn, label="layer", make=logits)
    yield Workload(operator=residual.hc_post, label="layer", make=post)
    yield Workload(operator=residual.hc_head, label="head", make=lambda fill: mixing(fill, n, 1))


def rotary_parts(at: Setting) -> Parts:
    """Rotation of the queries, Hadamard of the indexer's."""
    model = at.model
    pairs = (model.rope_dim if isinstance(model, V4 | V32) else head_dim(model)) // 2

    def rope(fill: Fill) -> Arguments:
        cos, sin = fill.angles(at.context, pairs)
        given = {"x": queries(at, fill), "cos_table": cos, "sin_table": sin}
        return given | {"positions": fill.given(at.positions, torch.int64)}

    def hadamard(fill: Fill) -> Arguments:
        return {"x": fill.normal(at.tokens, model.index_heads, model.index_dim)}

    yield Workload(operator=rotary.rope, label="queries", make=rope)
    yield Workload(operator=rotary.hadamard, label="indexer queries", make=hadamard)


def gate_parts(at: Setting) -> Parts:
    """The router; of V4 also that of the hash layers."""
    model, experts, k = at.model, at.experts, at.model.experts_per_token
    flash = isinstance(model, V4)

    def gate(fill: Fill) -> Arguments:
        given: Arguments = {"logits": fill.normal(at.tokens, experts, dtype=FP32), "k": k, "routed_scale": 2.5}
        given["bias"] = fill.normal(experts, std=0.1, dtype=FP32)
        return given if flash else given | {"score": "sigmoid", "groups": GROUPS, "topk_groups": TOPK_GROUPS}

    def hashed(fill: Fill) -> Arguments:
        return {
            "logits": fill.normal(at.tokens, experts, dtype=FP32),
            "token_ids": fill.integers(model.vocab, at.tokens),
            "table": fill.integers(experts, model.vocab, k),
        }

    yield Workload(operator=moe.moe_gate, label="layer", make=gate, note=at.expert_note)
    if flash:
        yield Workload(operator=moe.moe_hash_gate, label="layer", make=hashed, note=at.expert_note)


def routing(at: Setting, fill: Fill) -> Tensor:
    """topk_idx of a balanced routing."""
    k = at.model.experts_per_token
    order = fill.permutation(at.experts)
    return fill.given(order[torch.arange(at.tokens * k) % at.experts].view(at.tokens, k))


def expert_parts(at: Setting) -> Parts:
    """Dispatch, the grouped products, the activation, combination, and the layer as a whole."""
    model, k, note = at.model, at.model.experts_per_token, at.expert_note
    hidden, inter, pairs = model.hidden, model.inter, at.tokens * model.experts_per_token

    def permute(fill: Fill) -> Arguments:
        return {"x": fill.normal(at.tokens, hidden), "topk_idx": routing(at, fill), "experts": at.experts}

    def unpermute(fill: Fill) -> Arguments:
        given = {"rows": fill.normal(pairs, hidden), "residual": fill.normal(at.tokens, hidden)}
        given["pair_to_pos"] = fill.given(fill.permutation(pairs).view(at.tokens, k))
        return given | {"topk_weights": fill.uniform(at.tokens, k, high=2.5 / k)}

    def swiglu(fill: Fill) -> Arguments:
        weight = fill.uniform(pairs, low=0.1)
        return {"x": fill.normal(pairs, 2 * inter), "limit": SWIGLU_LIMIT, "row_weight": weight}

    yield Workload(operator=moe.moe_permute, label="layer", make=permute, note=note)
    for kind in KINDS:
        for label, rows, columns in (("up", 2 * inter, hidden), ("down", hidden, inter)):

            def grouped(fill: Fill, kind: str = kind, rows: int = rows, columns: int = columns) -> Arguments:
                counts = torch.arange(pairs).remainder(at.experts).bincount(minlength=at.experts)
                return {
                    **activations(at, fill, kind, pairs, columns),
                    **weight_of(at, fill, kind, "weight", at.experts, rows, columns),
                    "expert_counts": fill.given(counts),
                }

            yield Workload(operator=moe.grouped_gemm, label=f"{label} {kind}", make=grouped, note=note)
    yield Workload(operator=moe.swiglu, label="rows of experts", make=swiglu)
    for kind in KINDS:
        yield Workload(operator=moe.fused_moe, label=kind, make=partial(layer, at, kind), note=note)
    yield Workload(operator=moe.moe_unpermute, label="layer", make=unpermute)


def layer(at: Setting, kind: str, fill: Fill) -> Arguments:
    """A layer of experts; those of packed e2m1 have a shared expert in fp8, as V4 does."""
    model, shared = at.model, "fp8" if kind == "fp4" else kind
    hidden, inter = model.hidden, model.inter
    given: Arguments = {"x": fill.normal(at.tokens, hidden), "topk_idx": routing(at, fill)}
    given["topk_weights"] = fill.uniform(at.tokens, model.experts_per_token, high=2.5 / model.experts_per_token)
    for name, rows, columns in (("w13", 2 * inter, hidden), ("w2", hidden, inter)):
        given |= weight_of(at, fill, kind, name, at.experts, rows, columns)
        given |= weight_of(at, fill, shared, f"shared_{name}", rows, columns)
    return given | {"swiglu_limit": SWIGLU_LIMIT if isinstance(model, V4) else 0.0}


def weight_of(at: Setting, fill: Fill, kind: str, name: str, *shape: int) -> Arguments:
    """A weight [.., rows, columns] and its scale, by their names; products with values of order 1 are of order 1."""
    *lead, rows, columns = shape
    power = -round(torch.tensor(float(columns)).log2().item() / 2)
    if kind == "bf16":
        return {name: fill.normal(*shape, std=columns**-0.5)}
    if kind == "int8":
        size = columns**-0.5 / 64
        scale = fill.uniform(*lead, rows, 1, low=0.5 * size, high=1.5 * size)
        return {name: fill.int8(*shape), f"{name}_scale": scale}
    if kind == "fp4":
        scale = fill.scales(*lead, rows, columns // 32, exponent=power - 1)
        return {name: fill.bytes(*lead, rows, columns // 2), f"{name}_scale": scale}
    dtype = E8M0 if isinstance(at.model, V4) else FP32
    scale = fill.scales(*lead, blocks(rows), blocks(columns), exponent=power + 1, dtype=dtype)
    return {name: fill.codes(*shape), f"{name}_scale": scale}


def activations(at: Setting, fill: Fill, kind: str, rows: int, columns: int) -> Arguments:
    """Rows as the products of a kind of weights take them: quantised before."""
    if kind == "bf16":
        return {"x": fill.normal(rows, columns)}
    if kind == "int8":
        return {"x": fill.int8(rows, columns), "x_scale": fill.uniform(rows, 1, low=0.5 / 64, high=1.5 / 64)}
    dtype = E8M0 if isinstance(at.model, V4) else FP32
    return {"x": fill.codes(rows, columns), "x_scale": fill.scales(rows, blocks(columns), exponent=1, dtype=dtype)}


def quant_parts(at: Setting) -> Parts:
    """Linear layers by kind of weight, and quantisation by itself."""
    model = at.model
    up = (model.heads * head_dim(model), model.q_rank)

    def linear(kind: str, shape: tuple[int, int], out_dtype: str, fill: Fill) -> Arguments:
        weight = weight_of(at, fill, kind, "weight", *shape)
        return {"x": fill.normal(at.tokens, shape[1]), **weight, "out_dtype": out_dtype}

    def rows(fill: Fill) -> Arguments:
        return {"x": fill.normal(at.tokens, model.hidden)}

    def packed(fill: Fill) -> Arguments:
        return {"x": fill.normal(at.tokens, model.index_heads, model.index_dim)}

    def weight(fill: Fill, kind: str, **more: int) -> Arguments:
        made: Mapping[str, Tensor] = weight_of(at, fill, kind, "q", *up)
        return {"q": made["q"], "scale": made["q_scale"], **more}

    product = quant.quant_linear
    for kind in KINDS:
        yield Workload(operator=product, label=f"q_up {kind}", make=partial(linear, kind, up, "bfloat16"))
    head, gate = (model.vocab, model.hidden), (at.experts, model.hidden)
    yield Workload(operator=product, label="lm_head bf16", make=partial(linear, "bf16", head, "bfloat16"))
    note = at.expert_note
    yield Workload(operator=product, label="gate bf16", make=partial(linear, "bf16", gate, "float32"), note=note)
    yield Workload(operator=quant.act_quant_fp8, label="hidden", make=rows)
    yield Workload(operator=quant.act_quant_fp4, label="indexer queries", make=packed)
    yield Workload(operator=quant.act_quant_int8, label="hidden", make=rows)
    yield Workload(operator=quant.block_dequant, label="q_up fp8", make=lambda fill: weight(fill, "fp8"))
    yield Workload(
        operator=quant.block_dequant, label="q_up fp4", make=lambda fill: weight(fill, "fp4", block_n=1, block_k=32)
    )
