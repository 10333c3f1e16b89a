"""The indexer's scores of one sequence's entries, in pieces that stay in cache, and the largest of them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from isolith_backends.cpu.entries import entries_of_blocks

PIECE = 2 << 20  # bytes of keys or products at a time: what a second-level cache holds, and threads share well


def score(out: Tensor, q: Tensor, weights: Tensor, k_cache: Tensor, blocks: Tensor, counts: Tensor) -> None:
    """Write the scores of tokens of one sequence; -inf from a token's count on.

    Args:
        out: [tokens, n] float32, n at least the largest count.
        q: [tokens, heads, head_dim] float32.
        weights: [tokens, 1, heads] float32, scales included.
        k_cache: The pool.
        blocks: The sequence's row of the block table.
        counts: [tokens], how many entries each token sees, ascending.
    """
    (tokens, heads, dim), block_size, last = q.shape, k_cache.shape[1], int(counts[-1])
    blocks = pad(blocks, (0, max(0, -(-last // block_size) - blocks.shape[0])), value=-1)
    step = block_size * max(1, PIECE // (4 * max(tokens * heads, dim) * block_size))
    rows = min(step, block_size * -(-last // block_size))
    # Keys and products go to the same places again and again, which stay in cache. Keys stand along the rows of the
    # product: with one thread the same, with two a fifth faster than along the columns.
    room, products = q.new_empty(rows, dim), q.new_empty(rows, tokens * heads)
    query = q.flatten(0, 1).T
    for low in range(0, last, step):
        high = min(low + step, last)
        some = blocks[low // block_size : -(-high // block_size)]
        keys = entries_of_blocks(k_cache, some, room)
        if (some < 0).any():
            keys.unflatten(0, (-1, block_size))[some < 0] = 0.0
        dots = torch.mm(keys[: high - low], query, out=products[: high - low]).relu_()
        out[:, low:high] = torch.bmm(weights, dots.unflatten(1, (tokens, heads)).permute(1, 2, 0))[:, 0]
    first = int(counts[0])
    hidden = torch.arange(first, out.shape[1]) >= counts[:, None]
    out[:, first:].masked_fill_(hidden, -torch.inf)


def largest(scores: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, by (-score, column), -1 behind the row's count; and how many there are.

    The k-th largest of some thousand columns' maxima is at most the k-th largest of all: what lies below it is out, and
    few are left to be sorted, about k where scores are unlike. `scores` has -inf from a row's count on; it is written.
    """
    width = min(k, scores.shape[1])
    scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    strides = max(1, scores.shape[1] // (4 * width))
    columns = scores.shape[1] // strides
    maxima = scores[:, : strides * columns].unflatten(1, (strides, columns)).amax(1)
    row, column = (scores >= maxima.topk(width, dim=1).values[:, -1:]).nonzero(as_tuple=True)
    # Two stable sorts: by score, ties staying in the order of columns; then by row.
    order = scores[row, column].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    begin = torch.searchsorted(row, torch.arange(scores.shape[0]))
    chosen = column[order[begin[:, None] + torch.arange(width)]]
    number = counts.clamp(max=width)
    indices = torch.where(torch.arange(width) < number[:, None], chosen, -1)
    return pad(indices, (0, k - width), value=-1).int(), number.int()
