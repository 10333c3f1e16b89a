"""A DeepSeek-V4 decoder at V4-Flash's layer shapes, few layers and experts, through the operators.

It has one layer of each kind (sliding window, compressed sparse, heavily compressed), random bfloat16 weights, float32
activations and paged caches. It reads a prompt in two chunks, writes some tokens, prints which kernel ran each
operator, runs the same again on the references alone, and compares the logits.

With --quantised the weights and caches are in the released formats: fp8 linears, fp4 experts, 584-byte entries and fp4
indexer keys, with bfloat16 activations that are quantised before every product. The logits then differ by more, since a
difference in the last bit of an activation can move a code or an expert's choice; the figure is printed, not judged.

    python examples/deepseek_v4_decoder.py [--quantised] [--experts 16] [--prompt 260] [--new 4] [--full-vocabulary]
"""

import argparse
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

import isolith
from isolith import rope_frequencies, rope_tables

HIDDEN, HEADS, DIM, ROPE, Q_RANK = 4096, 64, 512, 64, 1024
GROUPS, O_RANK, WINDOW = 8, 1024, 128
INDEX_HEADS, INDEX_DIM, INDEX_TOPK = 64, 128, 512
INTER, PER_TOKEN, STREAMS, LIMIT = 2048, 6, 4, 10.0
RATIOS = (0, 4, 128)
PAGE = 64


@dataclass(frozen=True)
class Linear:
    """A weight with its scale, as the checkpoints hold it."""

    weight: Tensor
    scale: Tensor | None = None

    def __call__(self, x: Tensor, out_dtype: str | None = None) -> Tensor:
        out_dtype = out_dtype or str(x.dtype).removeprefix("torch.")
        return isolith.quant_linear(x, self.weight, self.scale, out_dtype=out_dtype)


@dataclass
class Pool:
    """One sequence's paged pool: its blocks in a shuffled order."""

    cache: Tensor
    table: Tensor

    @classmethod
    def of(cls, items: int, entry: int, dtype: torch.dtype) -> "Pool":
        blocks = -(-max(items, 1) // PAGE)
        return cls(torch.zeros(blocks, PAGE, entry, dtype=dtype), torch.randperm(blocks)[None].int())

    def slots(self, items: Tensor) -> Tensor:
        return self.table[0].long()[items // PAGE] * PAGE + items % PAGE


@dataclass
class Layer:
    """The weights of one decoder layer, and its caches."""

    ratio: int
    experts: int
    tokens: int
    vocab: int
    quantised: bool
    w: dict[str, Linear] = field(default_factory=dict)
    t: dict[str, Tensor] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        linear_shapes = {
            "wq_a": (Q_RANK, HIDDEN),
            "wq_b": (HEADS * DIM, Q_RANK),
            "wkv": (DIM, HIDDEN),
            "wo_b": (HIDDEN, GROUPS * O_RANK),
            "shared_13": (2 * INTER, HIDDEN),
            "shared_2": (HIDDEN, INTER),
        }
        if self.ratio == 4:
            linear_shapes["index_q"] = (INDEX_HEADS * INDEX_DIM, Q_RANK)
            self.w["index_w"] = Linear(normal(INDEX_HEADS, HIDDEN, fan_in=HIDDEN))
        dense, packed = (fp8, fp4) if self.quantised else (plain, plain)
        self.w |= {name: dense(*shape) for name, shape in linear_shapes.items()}
        self.w["wo_a"] = dense(GROUPS, O_RANK, HEADS * DIM // GROUPS)
        self.w["w13"] = packed(self.experts, 2 * INTER, HIDDEN)
        self.w["w2"] = packed(self.experts, HIDDEN, INTER)
        self.w["gate"] = Linear(normal(self.experts, HIDDEN, fan_in=HIDDEN))
        self.t["sink"] = torch.randn(HEADS)
        self.t["bias"] = 0.1 * torch.randn(self.experts)
        if self.ratio == 0:  # the first layers route by a table of token ids
            self.t["hash"] = torch.rand(self.vocab, self.experts).topk(PER_TOKEN).indices.int()
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("q_norm", Q_RANK), ("kv_norm", DIM)):
            self.t[name] = 1 + 0.1 * torch.randn(size)
        mixes = (2 + STREAMS) * STREAMS
        for name in ("attn", "ffn"):
            self.t[f"{name}_fn"] = torch.randn(mixes, STREAMS * HIDDEN) / (STREAMS * HIDDEN) ** 0.5
            self.t[f"{name}_scale"], self.t[f"{name}_base"] = torch.ones(3), 0.5 * torch.randn(mixes)
        self.pools["window"] = self.pool(self.tokens, DIM, 584)
        if self.ratio:
            self.add_compressor("main", DIM, 584)
        if self.ratio == 4:
            self.add_compressor("index", INDEX_DIM, 68)

    def pool(self, items: int, dim: int, entry_bytes: int) -> Pool:
        return Pool.of(items, entry_bytes, torch.uint8) if self.quantised else Pool.of(items, dim, torch.float32)

    def add_compressor(self, name: str, dim: int, entry_bytes: int) -> None:
        wide = dim * (2 if self.ratio == 4 else 1)
        for weight in ("wkv", "wgate"):
            self.t[f"{name}_{weight}"] = normal(wide, HIDDEN, fan_in=HIDDEN)
        self.t[f"{name}_ape"], self.t[f"{name}_norm"] = torch.randn(self.ratio, wide), 1 + 0.1 * torch.randn(dim)
        self.pools[name] = self.pool(self.tokens // self.ratio, dim, entry_bytes)
        self.pools[f"{name}_state"] = Pool.of(self.tokens, 2 * wide, torch.float32)


@dataclass(frozen=True)
class Step:
    """The tokens of one call, all of one sequence."""

    ids: Tensor
    start: int
    tables: dict[str, tuple[Tensor, Tensor]]

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.start, self.start + len(self.ids))

    @property
    def batch(self) -> dict[str, Tensor]:
        return {"cu_seqlens": torch.tensor([0, len(self.ids)]).int(), "start_pos": torch.tensor([self.start]).int()}


def normal(*shape: int, fan_in: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=fan_in**-0.5)


def plain(*shape: int) -> Linear:
    return Linear(normal(*shape, fan_in=shape[-1]))


def fp8(*shape: int) -> Linear:
    """Random e4m3 codes with 128 x 128 power-of-two scales; values of about the size that a trained layer has."""
    codes = torch.empty(shape, dtype=torch.bfloat16).normal_(std=64.0).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    exponent = round(-6 - 0.5 * torch.tensor(float(shape[-1])).log2().item())
    return Linear(codes, torch.full(blocks, 2.0**exponent).to(torch.float8_e8m0fnu))


def fp4(experts: int, rows: int, columns: int) -> Linear:
    """Random e2m1 codes, two a byte, with a power-of-two scale for each 32."""
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    exponent = round(-1.5 - 0.5 * torch.tensor(float(columns)).log2().item())
    scale = torch.full((experts, rows, columns // 32), 2.0**exponent).to(torch.float8_e8m0fnu)
    return Linear(codes, scale)


def compress(layer: Layer, name: str, x: Tensor, step: Step) -> None:
    """Run one compressor and write the entries that the tokens complete."""
    t, state, ratio = layer.t, layer.pools[f"{name}_state"], layer.ratio
    entries, _ = isolith.kv_compress(
        x,
        t[f"{name}_wkv"],
        t[f"{name}_wgate"],
        t[f"{name}_norm"],
        *step.tables["compress"],
        state.cache,
        state.table,
        **step.batch,
        ratio=ratio,
        ape=t[f"{name}_ape"],
        overlap=ratio == 4,
        rotate=name == "index",
    )
    first, end = step.start // ratio, (step.start + len(step.ids)) // ratio
    slots = torch.full((len(entries),), -1)
    slots[: end - first] = layer.pools[name].slots(torch.arange(first, end))
    isolith.kv_cache_write(layer.pools[name].cache, entries, slots)


def select_entries(layer: Layer, x: Tensor, q_low: Tensor, step: Step) -> dict[str, Tensor]:
    """The indexer's choice for every token."""
    q = layer.w["index_q"](q_low).view(len(x), INDEX_HEADS, INDEX_DIM)
    q = isolith.hadamard(isolith.rope(q, step.positions, *step.tables["compress"]))
    codes, scale = isolith.act_quant_fp4(q) if layer.quantised else (q, None)
    keys = layer.pools["index"]
    topk, length = isolith.lightning_indexer(
        codes,
        layer.w["index_w"](x, out_dtype="float32"),
        keys.cache,
        keys.table,
        **step.batch,
        ratio=4,
        k=INDEX_TOPK,
        max_entries=max((step.start + len(x)) // 4, 1),
        softmax_scale=(INDEX_DIM * INDEX_HEADS) ** -0.5,
        q_scale=scale,
    )
    return {"topk_indices": topk, "topk_length": length}


def attention(layer: Layer, x: Tensor, step: Step) -> Tensor:
    """One attention sublayer: write the caches, select, attend, turn back, project."""
    tables = step.tables["compress" if layer.ratio else "main"]
    q_low = isolith.rms_norm(layer.w["wq_a"](x), layer.t["q_norm"])
    q = isolith.head_rms_norm(layer.w["wq_b"](q_low).view(len(x), HEADS, DIM))
    q = isolith.rope(q, step.positions, *tables)
    kv = isolith.rope(isolith.rms_norm(layer.w["wkv"](x), layer.t["kv_norm"]), step.positions, *tables)
    window = layer.pools["window"]
    isolith.kv_cache_write(window.cache, kv, window.slots(step.positions))
    compressed: dict[str, Tensor] = {}
    if layer.ratio:
        compress(layer, "main", x, step)
        pool = layer.pools["main"]
        compressed = {"compressed_cache": pool.cache, "compressed_block_table": pool.table}
    if layer.ratio == 4:
        compress(layer, "index", x, step)
        compressed |= select_entries(layer, x, q_low, step)
    out, _ = isolith.hybrid_attention(
        q,
        window.cache,
        window.table,
        **step.batch,
        window=WINDOW,
        softmax_scale=DIM**-0.5,
        sink=layer.t["sink"],
        ratio=layer.ratio,
        **compressed,
    )
    out = isolith.rope(out, step.positions, *tables, inverse=True)
    a, b = layer.w["wo_a"], layer.w["wo_b"]
    return isolith.grouped_output_proj(out, a.weight, b.weight, a.scale, b.scale)


def experts(layer: Layer, x: Tensor, step: Step) -> Tensor:
    """One MoE sublayer."""
    logits = layer.w["gate"](x, out_dtype="float32")
    if layer.ratio == 0:
        idx, weights = isolith.moe_hash_gate(logits, step.ids, layer.t["hash"], routed_scale=1.5)
    else:
        idx, weights = isolith.moe_gate(logits, PER_TOKEN, layer.t["bias"], routed_scale=1.5)
    w = layer.w
    return isolith.fused_moe(
        x,
        idx,
        weights,
        w["w13"].weight,
        w["w2"].weight,
        w["w13"].scale,
        w["w2"].scale,
        w["shared_13"].weight,
        w["shared_2"].weight,
        w["shared_13"].scale,
        w["shared_2"].scale,
        swiglu_limit=LIMIT,
    )


def forward(layers: list[Layer], ends: dict[str, Tensor], step: Step) -> Tensor:
    """Logits of the last token."""
    dtype = torch.bfloat16 if layers[0].quantised else torch.float32
    streams = ends["embed"][step.ids.long()].to(dtype)[:, None].expand(-1, STREAMS, -1).contiguous()
    for layer in layers:
        for name, sublayer in (("attn", attention), ("ffn", experts)):
            mix = (layer.t[f"{name}_{part}"] for part in ("fn", "scale", "base"))
            x, post, comb = isolith.hc_pre(streams, *mix)
            y = sublayer(layer, isolith.rms_norm(x, layer.t[f"{name}_norm"]), step)
            streams = isolith.hc_post(y, streams, post, comb)
    x = isolith.hc_head(streams[-1:], ends["head_fn"], ends["head_scale"], ends["head_base"])
    x = isolith.rms_norm(x, ends["norm"])
    return isolith.quant_linear(x, ends["lm_head"], out_dtype="float32")[0]


def decode(options: argparse.Namespace, vocab: int) -> tuple[list[int], Tensor, float]:
    """Build the decoder from a seed, read the prompt, write tokens; (tokens, their logits, seconds a new token)."""
    torch.manual_seed(options.seed)
    tokens = options.prompt + options.new
    layers = [Layer(ratio, options.experts, tokens, vocab, options.quantised) for ratio in RATIOS]
    ends = {
        "embed": normal(vocab, HIDDEN, fan_in=1),
        "lm_head": normal(vocab, HIDDEN, fan_in=HIDDEN),
        "norm": torch.ones(HIDDEN),
        "head_fn": torch.randn(STREAMS, STREAMS * HIDDEN) / (STREAMS * HIDDEN) ** 0.5,
        "head_scale": torch.ones(1),
        "head_base": torch.zeros(STREAMS),
    }
    yarn = rope_frequencies(ROPE, 160000.0, factor=16.0, original_length=65536)
    tables = {
        "main": rope_tables(rope_frequencies(ROPE, 10000.0), tokens),
        "compress": rope_tables(yarn, tokens),
    }
    prompt = torch.randint(0, vocab, (options.prompt,), dtype=torch.int32)
    half = options.prompt // 2
    forward(layers, ends, Step(prompt[:half], 0, tables))
    logits = [forward(layers, ends, Step(prompt[half:], half, tables))]
    written: list[int] = []
    started = time.perf_counter()
    for place in range(options.new):
        written.append(int(logits[-1].argmax()) if options.follow is None else options.follow[place])
        ids = torch.tensor(written[-1:], dtype=torch.int32)
        logits.append(forward(layers, ends, Step(ids, options.prompt + place, tables)))
    return written, torch.stack(logits), (time.perf_counter() - started) / max(options.new, 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=16, help="routed experts a layer; V4-Flash has 256")
    parser.add_argument("--prompt", type=int, default=260, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=4, help="tokens to write")
    parser.add_argument("--quantised", action="store_true", help="fp8 and fp4 weights, quantised caches")
    parser.add_argument("--full-vocabulary", action="store_true", help="129,280 tokens instead of 4,096")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    vocab = 129280 if options.full_vocabulary else 4096
    options.follow = None
    kind = "fp4" if options.quantised else "bfloat16"
    print(f"V4-Flash layer shapes: hidden {HIDDEN}, {HEADS} heads of {DIM}, layers with ratios {RATIOS},")
    print(f"{options.experts} {kind} experts of {INTER}, top {PER_TOKEN}; prompt {options.prompt}, new {options.new}")
    with isolith.record() as calls:
        written, logits, seconds = decode(options, vocab)
    print("\noperator              ran                             calls")
    for (operator, ran), count in sorted(calls.items()):
        print(f"{operator:20}  {ran:30}  {count:5}")
    print(f"\ntokens {written}, {seconds:.2f} s each")
    options.follow = written
    print("the same tokens on the references alone ...")
    with isolith.override(kernels=dict.fromkeys(isolith.OPERATORS, "reference")):
        _, expected, reference_seconds = decode(options, vocab)
    largest = (logits - expected).abs().max().item()
    print(
        f"{reference_seconds:.2f} s each; logits of order {expected.std().item():.2f} differ by at most {largest:.1e}"
    )
    if options.quantised:
        return 0
    # Float32 throughout: what remains is the order of sums, some 1e-7 of a value each over three layers.
    agrees = largest <= 1e-4 * expected.std().item()
    print("the logits agree" if agrees else "THE LOGITS DISAGREE")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
