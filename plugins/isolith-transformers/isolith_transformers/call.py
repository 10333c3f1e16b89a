"""One forward call: which tokens of which sequences it has, as the operators take it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from isolith import ArgumentError, rope_tables
from isolith_transformers.cache import PagedLayer, Sequences
from isolith_transformers.pages import slots_of


class Rotary:
    """Tables of rotary angles, as long as the calls so far needed.

    Args:
        frequencies: [dims/2], those of the model's own rotary embedding.
        scaling: The amplitude.
    """

    def __init__(self, frequencies: Tensor, scaling: float) -> None:
        self.frequencies = frequencies
        self.scaling = scaling
        self.tables: tuple[Tensor, Tensor] | None = None

    def covering(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos_table, sin_table) for positions 0..length-1 at least."""
        if self.tables is None or len(self.tables[0]) < length or self.tables[0].device != device:
            # Doubled, since a table of a new shape is a new selection for every operator that takes it.
            rounded = 1 << max(length - 1, 1023).bit_length()
            cos, sin = rope_tables(self.frequencies, rounded, device)
            self.tables = (cos * self.scaling, sin * self.scaling)
        return self.tables


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tokens of a forward call, flat.

    Args:
        batch: Rows of the model's input.
        columns: Tokens of a row, padding included.
        chosen: Of the flat input, the tokens that are no padding; None = all.
        cu_seqlens: [sequences + 1] int32.
        start_pos: [sequences] int32.
        sequence: [tokens] int64, the sequence of each token.
        positions: [tokens] int32.
        starts: Tokens of each sequence before this call.
        ends: Tokens of each sequence after it.
        sequences: Where their items lie.
    """

    batch: int
    columns: int
    chosen: Tensor | None
    cu_seqlens: Tensor
    start_pos: Tensor
    sequence: Tensor
    positions: Tensor
    starts: list[int]
    ends: list[int]
    sequences: Sequences
    slots: dict[str, Tensor] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.ends, default=0)

    @property
    def adds_one_token(self) -> bool:
        """Whether no sequence has more than one token in this call."""
        return all(end - start <= 1 for start, end in zip(self.starts, self.ends, strict=True))

    def pack(self, x: Tensor) -> Tensor:
        """[batch, columns, ..] -> [tokens, ..]."""
        flat = x.flatten(0, 1)
        return flat if self.chosen is None else flat[self.chosen]

    def unpack(self, y: Tensor) -> Tensor:
        """[tokens, ..] -> [batch, columns, ..], zeros in the padding."""
        if self.chosen is not None:
            whole = y.new_zeros(self.batch * self.columns, *y.shape[1:])
            whole[self.chosen] = y
            y = whole
        return y.view(self.batch, self.columns, *y.shape[1:])

    def table(self, kind: str) -> Tensor:
        """The block table of a kind of items."""
        return self.sequences.tables[kind].on(self.cu_seqlens.device)

    def max_items(self, kind: str) -> int:
        """Items that the table of a kind has room for: what a list of all of them must be wide."""
        return self.table(kind).shape[1] * self.sequences.tables[kind].kind.block_size

    def new_slots(self, kind: str) -> Tensor:
        """Where the items that this call adds go: [tokens], or [rows] of kv_compress with -1 behind the last entry."""
        if kind not in self.slots:
            rule = self.sequences.tables[kind].kind
            sequence, items = self.new_entries(rule.ratio) if rule.ratio else (self.sequence, self.positions.long())
            self.slots[kind] = slots_of(self.table(kind), sequence, items, rule.block_size)
        return self.slots[kind]

    def new_entries(self, ratio: int) -> tuple[Tensor, Tensor]:
        """(sequence, entry) of each row that kv_compress gives, entry -1 behind the last."""
        tokens = len(self.positions)
        first = [start // ratio for start in self.starts]
        counts = [end // ratio - low for end, low in zip(self.ends, first, strict=True)]
        rows = min(tokens, tokens // ratio + len(self.starts))
        device = self.cu_seqlens.device
        sequence = [row for row, count in enumerate(counts) for _ in range(count)]
        items = [low + index for low, count in zip(first, counts, strict=True) for index in range(count)]
        spare = rows - len(items)
        return (
            torch.tensor(sequence + [0] * spare, dtype=torch.long, device=device),
            torch.tensor(items + [-1] * spare, dtype=torch.long, device=device),
        )

    def layer(self, cache: object, index: int) -> PagedLayer:
        """The pools of a decoder layer; without a cache, pools that last for this call."""
        layers = getattr(cache, "layers", None)
        return PagedLayer(self.sequences) if layers is None else layers[index]


def begin(
    shape: tuple[int, int],
    device: torch.device,
    sequences: Sequences,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    compresses: bool,
) -> Call:
    """Read a call's mask and positions, and find room for its tokens.

    Args:
        shape: (batch, columns) of the model's input.
        device: Where it is.
        sequences: Those of the call's cache, or new ones.
        attention_mask: [batch, columns before and in this call], 0 in the padding on the left.
        position_ids: [batch or 1, columns].
        compresses: Whether layers compress tokens, by their positions.

    Raises:
        ArgumentError: for a mask or positions that the operators cannot follow.
    """
    batch, columns = shape
    seen = sequences.seen if sequences.columns else [0] * batch
    real = None if attention_mask is None else real_tokens(attention_mask, batch, sequences.columns, columns)
    if real is not None and compresses:
        raise ArgumentError(
            "isolith_transformers: a model that compresses tokens takes no padding, which transformers counts as"
            " tokens; got an attention_mask with zeros. Call it with sequences of one length, or one by one."
        )
    tokens = [columns] * batch if real is None else real.sum(1).tolist()
    sequences.begin(tokens, columns)
    ends = sequences.running or []
    count = torch.tensor(tokens, dtype=torch.int32, device=device)
    start_pos = torch.tensor(seen, dtype=torch.int32, device=device)
    cu_seqlens = torch.cat([count.new_zeros(1), count.cumsum(0, dtype=torch.int32)])
    sequence = torch.repeat_interleave(torch.arange(batch, device=device), count, output_size=sum(tokens))
    token = torch.arange(sum(tokens), dtype=torch.int32, device=device)
    call = Call(
        batch=batch,
        columns=columns,
        chosen=None if real is None else real.flatten().nonzero().flatten(),
        cu_seqlens=cu_seqlens,
        start_pos=start_pos,
        sequence=sequence,
        positions=start_pos[sequence] + token - cu_seqlens[sequence],
        starts=list(seen),
        ends=ends,
        sequences=sequences,
    )
    if position_ids is not None:
        check_positions(call, position_ids, compresses)
    return call


def real_tokens(mask: Tensor, batch: int, before: int, columns: int) -> Tensor | None:
    """[batch, columns] booleans: which tokens of the call are no padding; None = all."""
    if mask.dim() != 2 or mask.shape != (batch, before + columns):
        raise ArgumentError(
            "isolith_transformers: attention_mask must be [batch, tokens so far], "
            f"({batch}, {before + columns}) here; got shape {tuple(mask.shape)}."
        )
    kept = mask != 0
    if kept.all():
        return None
    if not (kept[:, 1:] >= kept[:, :-1]).all():
        raise ArgumentError(
            "isolith_transformers: attention_mask may leave out tokens on the left alone; got a zero behind a one."
        )
    return kept[:, before:]


def check_positions(call: Call, position_ids: Tensor, compresses: bool) -> None:
    """Raise ArgumentError unless position_ids count the tokens; from where is of no account without a compressor."""
    given = call.pack(position_ids.expand(call.batch, call.columns))
    shift = given - call.positions
    if not compresses:
        first = call.cu_seqlens[:-1].long()[call.sequence]
        shift = shift - shift[first]
    if shift.any():
        expected = "from the tokens seen before" if compresses else "within each sequence"
        raise ArgumentError(
            f"isolith_transformers: position_ids must count tokens {expected}; got {given.tolist()[:8]} to begin with."
        )
