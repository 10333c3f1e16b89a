"""Dispatch and combination on one rank: moe_gen_idx, moe_expand_input and moe_combine_result of tmo 1.12.1
(domesticated_torch_mlu_ops@9fbf7df6 _ops.py; the offset of moe_combine_result from vllm-mlu@b9925203).

The order of an expert's rows is not stated: here the last token comes first, so that nothing can rest on another.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    need,
    need_dtype,
    need_int32,
    need_shape,
    need_within,
    undefined,
)


def moe_gen_idx(expert_id: Tensor, expert_num: int, return_token2expert_idx: bool = False) -> list[Tensor]:
    call = "moe_gen_idx"
    need_int32(call, expert_id=expert_id)
    need_shape(call, expert_id=(expert_id, (-1, -1)))
    need_within(call, expert_num, expert_id=expert_id)
    flat = expert_id.flatten().long()
    last_first = flat.flip(0).sort(stable=True).indices
    order = flat.numel() - 1 - last_first
    combine = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel()))
    count = flat.bincount(minlength=expert_num)
    cusum = torch.cat((count.new_zeros(1), count.cumsum(0)))
    results = [order // expert_id.shape[1], combine, count, cusum]
    if return_token2expert_idx:
        results.append(order)
    return [result.int() for result in results]


def moe_expand_input(
    input: Tensor,
    gather_idx: Tensor,
    cusum_token_count: Tensor | None = None,
    start_expert_id: int = 0,
    expert_size: int = 0,
    output: Tensor | None = None,
) -> Tensor:
    call = "moe_expand_input"
    need_dtype(call, (torch.int8, *FLOATS), input=input)
    need_int32(call, gather_idx=gather_idx, cusum_token_count=cusum_token_count)
    need_shape(call, input=(input, (-1, -1)), gather_idx=(gather_idx, (-1,)))
    low, high = bounds(call, cusum_token_count, start_expert_id, expert_size, gather_idx.shape[0])
    index = gather_idx[low:high]
    need_within(call, input.shape[0], gather_idx=index)
    # As many rows as there are pairs, of which a rank's own come first.
    rows = undefined((gather_idx.shape[0], input.shape[1]), input.dtype) if output is None else output
    need_dtype(call, (input.dtype,), output=rows)
    need_shape(call, output=(rows, (-1, input.shape[1])))
    need(high - low <= rows.shape[0], f"{call}: output must hold {high - low} rows, but holds {rows.shape[0]}.")
    rows[: high - low] = input[index.long()]
    return rows


def moe_combine_result(
    input: Tensor,
    reduce_weight: Tensor,
    gather_ids: Tensor,
    residual: Tensor | None,
    cusum_token_count: Tensor | None,
    start_expert_id: int,
    expert_size: int,
    bias: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    call = "moe_combine_result"
    tokens, k = reduce_weight.shape
    need_dtype(call, FLOATS, input=input)
    need_dtype(call, (input.dtype,), residual=residual, output=output)
    need_dtype(call, (torch.float32,), reduce_weight=reduce_weight)
    need_int32(call, gather_ids=gather_ids, cusum_token_count=cusum_token_count)
    need(bias is None, f"{call}: bias must be None.")
    need_shape(call, input=(input, (-1, -1)), gather_ids=(gather_ids, (tokens * k,)))
    need_shape(call, residual=(residual, (tokens, input.shape[1])), output=(output, (tokens, input.shape[1])))
    low, high = bounds(call, cusum_token_count, start_expert_id, expert_size, tokens * k)
    row = gather_ids.long() - low
    mine = (row >= 0) & (row < high - low)
    need(cusum_token_count is not None or bool(mine.all()), f"{call}: gather_ids must lie in [0, {tokens * k}).")
    need_within(call, input.shape[0], gather_ids=row[mine])
    # Rows of other ranks are undefined: they are left out, not multiplied by 0.
    rows = torch.zeros(tokens * k, input.shape[1])
    rows[mine] = input[row[mine]].float()
    result = (rows.view(tokens, k, -1) * reduce_weight[..., None]).sum(1)
    result = (result if residual is None else result + residual.float()).to(input.dtype)
    return result if output is None else output.copy_(result)


def bounds(call: str, cusum: Tensor | None, start_expert_id: int, expert_size: int, total: int) -> tuple[int, int]:
    """The expanded rows of experts start .. start + size - 1; all without prefix sums."""
    if cusum is None:
        need(start_expert_id == 0 and expert_size == 0, f"{call}: a range of experts needs cusum_token_count.")
        return 0, total
    last = start_expert_id + expert_size
    need(0 <= start_expert_id <= last < cusum.shape[0], f"{call}: experts {start_expert_id}..{last - 1} are not there.")
    return int(cusum[start_expert_id]), int(cusum[last])
