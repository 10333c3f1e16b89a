"""DeepSeek-V4.1's attention, composed of the operators, in every division of a sequence into calls.

One source layer compresses (ratio 1 or 2, disjoint windows, no ape), makes an index key of every latent, ranks blocks
of 8 entries by their largest score and selects entries inside the best blocks. The layers after it read the same pool:
one takes the source's selection, one selects for itself inside the same blocks.
"""

import pytest
import torch

from isolith import Make
from isolith.numerics.pages import slots_of_items
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.ops.attention import hybrid_attention, indexer_score, indexer_topk, kv_compress, lightning_indexer
from isolith.ops.norm import rms_norm

LENGTH, WINDOW, HEADS, DIM, HIDDEN, KEY = 70, 6, 3, 8, 12, 4
BLOCK, BLOCKS, K, EPS, SCALE = 8, 3, 5, 1e-20, 0.4
WIDE = torch.float64
RATIOS = pytest.mark.parametrize("ratio", [1, 2])


class Layers:
    """The parameters and inputs of the three layers, and the pools of one sequence, full of NaN."""

    def __init__(self, ratio):
        make, self.ratio, self.start = Make(WIDE, seed=ratio), ratio, 0
        self.x, self.kv, self.sink = make.normal(LENGTH, HIDDEN), make.normal(LENGTH, DIM), make.normal(HEADS)
        self.q = [make.normal(LENGTH, HEADS, DIM) for _ in range(3)]
        # Index queries and head weights of the two layers that select.
        self.index = [(make.normal(LENGTH, 8, KEY), make.normal(LENGTH, 8)) for _ in range(2)]
        self.compressor = (make.normal(DIM, HIDDEN), make.normal(DIM, HIDDEN), make.normal(DIM, mean=1.0))
        self.key_weight, self.key_norm = make.normal(KEY, DIM), make.normal(KEY, mean=1.0)
        self.tables = [table.double() for table in rope_tables(rope_frequencies(4, 160000.0), LENGTH)]
        rooms = {"state": (LENGTH, 2 * DIM), "window": (LENGTH, DIM), "latent": (LENGTH, DIM), "key": (LENGTH, KEY)}
        self.pools = {name: self.pool(make, *room) for name, room in rooms.items()}

    @staticmethod
    def pool(make, items, width):
        pages = make.pages([items], 4)
        return make.full(torch.nan, pages.blocks, 4, width), pages.block_table

    def put(self, name, first, rows):
        cache, table = self.pools[name]
        slots = slots_of_items(table, torch.tensor(0), torch.arange(first, first + len(rows)), 4)
        cache[slots // 4, slots % 4] = rows

    def latents(self, tokens, batch):
        """Compress, and write the latents and their keys."""
        rows, cu_entries = kv_compress(
            self.x[tokens], *self.compressor, *self.tables, *self.pools["state"], *batch, self.ratio, eps=EPS
        )
        latents = rows[: cu_entries[-1]]
        self.put("latent", tokens.start // self.ratio, latents)
        self.put("key", tokens.start // self.ratio, rms_norm(latents @ self.key_weight.T, self.key_norm, EPS))

    def selections(self, tokens, batch):
        """The blocks, and what the two layers select in them."""
        (q, weights), (later_q, later_weights) = [[part[tokens] for part in pair] for pair in self.index]
        keys, visible = self.pools["key"], (torch.arange(tokens.start, tokens.stop) + 1) // self.ratio
        scores = indexer_score(q, weights, *keys, *batch, self.ratio, 72, out_dtype="float64")
        best_of_blocks = scores.unflatten(1, (-1, BLOCK)).amax(-1)
        blocks, _ = indexer_topk(best_of_blocks, (visible + BLOCK - 1) // BLOCK, BLOCKS)
        first = indexer_topk(scores, visible, K, blocks, BLOCK)
        options = {"out_dtype": "float64", "candidates": blocks, "candidate_block": BLOCK}
        return first, lightning_indexer(later_q, later_weights, *keys, *batch, self.ratio, K, 72, **options)

    def call(self, count):
        """The next tokens through the three layers."""
        tokens, batch = slice(self.start, self.start + count), Make().batch([count], [self.start])
        self.start += count
        self.put("window", tokens.start, self.kv[tokens])
        self.latents(tokens, batch)
        first, second = self.selections(tokens, batch)
        return torch.stack([
            hybrid_attention(
                q[tokens], *self.pools["window"], *batch, WINDOW, SCALE, self.sink, self.ratio, *self.pools["latent"],
                *selection,
            )[0]
            for q, selection in zip(self.q, (first, first, second), strict=True)
        ])  # fmt: skip


def in_calls(ratio, sizes):
    layers = Layers(ratio)
    return torch.cat([layers.call(size) for size in sizes], dim=1)


def pooled(layers):
    """The latents of the formula, before rotation: a softmax over disjoint windows, and a norm."""
    wkv, wgate, norm = layers.compressor
    u, z = ((layers.x @ w.T).unflatten(0, (-1, layers.ratio)) for w in (wkv, wgate))
    c = (z.softmax(1) * u).sum(1)
    return c / c.square().mean(-1, keepdim=True).sqrt() * norm


def rotated(c, layers):
    position = torch.arange(len(c)) * layers.ratio
    cos, sin = (table[position] for table in layers.tables)
    turned = torch.view_as_complex(c[:, -4:].reshape(-1, 2, 2).contiguous()) * torch.complex(cos, sin)
    return torch.cat((c[:, :-4], torch.view_as_real(turned).flatten(1)), dim=1)


def keys_of(latents, layers):
    keys = latents @ layers.key_weight.T
    return keys / keys.square().mean(-1, keepdim=True).sqrt() * layers.key_norm


def chosen(layers, keys, p, blocks_kept=BLOCKS):
    """What the two selecting layers take at position p, by Python's sort."""
    seen = (p + 1) // layers.ratio
    scores = [((keys[:seen] @ q[p].T).relu() @ weights[p]).tolist() for q, weights in layers.index]
    best = [max(scores[0][low : low + BLOCK]) for low in range(0, seen, BLOCK)]
    blocks = sorted(range(len(best)), key=lambda block: -best[block])[:blocks_kept]
    inside = [s for s in range(seen) if s // BLOCK in blocks]
    return [sorted(inside, key=lambda s, row=row: -row[s])[:K] for row in scores]


def dense(ratio):
    """Each token of each layer by itself over the rows that it sees."""
    layers = Layers(ratio)
    latents = rotated(pooled(layers), layers)
    keys = keys_of(latents, layers)
    out = torch.empty(3, LENGTH, HEADS, DIM, dtype=WIDE)
    for p in range(LENGTH):
        first, second = chosen(layers, keys, p)
        for layer, picks in enumerate((first, first, second)):
            rows = torch.cat((layers.kv[max(0, p - WINDOW + 1) : p + 1], latents[picks]))
            logits = torch.cat((layers.q[layer][p] @ rows.T * SCALE, layers.sink[:, None]), dim=1)
            out[layer, p] = logits.softmax(-1)[:, :-1] @ rows
    return out


@RATIOS
@pytest.mark.parametrize("sizes", [[LENGTH], [1] * LENGTH, [33, 1, 1, 0, 28, 7]], ids=["prefill", "decode", "mixed"])
def test_layers_give_dense_attention_over_window_and_selection(ratio, sizes):
    torch.testing.assert_close(in_calls(ratio, sizes), dense(ratio), rtol=1e-10, atol=1e-11)


@RATIOS
def test_blocks_leave_out_entries_that_would_be_selected(ratio):
    layers = Layers(ratio)
    keys = keys_of(rotated(pooled(layers), layers), layers)
    assert chosen(layers, keys, LENGTH - 1) != chosen(layers, keys, LENGTH - 1, blocks_kept=LENGTH)
