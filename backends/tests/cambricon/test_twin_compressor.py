"""The twin's compressors, by hand: one lane carries a number, ape makes some tokens count and others not."""

import pytest
import torch

DIM, BLOCK = 128, 16
OFF = -1e30  # a score of no weight


def packed(values):
    """kv [tokens, 2 * DIM]: the value in the window's own lanes, and 100 times it in those for the window behind."""
    row = torch.tensor(values)[:, None].expand(-1, DIM)
    return torch.cat((100 * row, row), dim=-1).bfloat16()


def prefill(tmo, int32, values, first=0, state=None, out=2, ape=None, **changed):
    kv, tokens = packed(values), len(values)
    state = torch.zeros(9, BLOCK, 4 * DIM) if state is None else state
    given = {
        "kv": kv,
        "score": torch.zeros_like(kv),
        "state_cache": state,
        "state_block_table": torch.arange(1, 9, dtype=torch.int32)[None],
        "cu_seqlens": int32([0, tokens]),
        "positions": torch.arange(first, first + tokens, dtype=torch.int32),
        "ape": torch.zeros(4, 2 * DIM) if ape is None else ape,
        "max_seqlen": tokens,
        "overlap": True,
        "compressed_kv": torch.full((out, DIM), 7.0, dtype=torch.bfloat16),
    }
    return tmo.fused_compress_multi_kv(**given | changed)


def test_first_window_has_none_before_it(tmo, int32):
    _, rows = prefill(tmo, int32, [1.0, 2.0, 3.0, 4.0], out=1)
    assert rows[0, 0].item() == 2.5


def test_window_before_brings_its_first_lanes(tmo, int32):
    _, rows = prefill(tmo, int32, [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert rows[1, 0].item() == pytest.approx(1000 / 8)


def test_ape_is_that_of_the_place_in_the_window(tmo, int32):
    ape = torch.full((4, 2 * DIM), OFF)
    ape[2] = 0.0
    assert prefill(tmo, int32, [1.0, 2.0, 3.0, 4.0], out=1, ape=ape)[1][0, 0].item() == 3.0


def test_state_holds_kv_and_the_score_with_ape_at_the_position(tmo, int32):
    state, _ = prefill(
        tmo, int32, [5.0], first=17, ape=torch.arange(4.0)[:, None].expand(4, 2 * DIM).contiguous(), out=0
    )
    assert state[2, 1, [0, DIM, 2 * DIM]].tolist() == [500.0, 5.0, 1.0]


def test_a_chunk_goes_on_from_the_state(tmo, int32):
    state, _ = prefill(tmo, int32, [1.0, 2.0, 3.0], out=0)
    assert prefill(tmo, int32, [6.0], first=3, state=state, out=1)[1][0, 0].item() == 3.0


def test_rows_without_a_window_stay(tmo, int32):
    assert prefill(tmo, int32, [1.0, 2.0])[1][:, 0].tolist() == [7.0, 7.0]


def test_a_row_of_the_state_that_two_tokens_share_is_undefined(tmo, int32):
    state, _ = prefill(tmo, int32, [1.0] * 17, out=4, state_block_table=int32([[3] * 8]))
    assert state[3, :2, 0].isnan().tolist() == [True, False]


def test_state_table_covers_128_tokens(tmo, int32):
    with pytest.raises(RuntimeError, match="must cover 128 tokens, but covers 112"):
        prefill(tmo, int32, [1.0], state_block_table=int32([[1] * 7]))


def test_prefill_is_of_bfloat16(tmo, int32):
    with pytest.raises(RuntimeError, match="kv must be one of"):
        prefill(tmo, int32, [1.0], kv=packed([1.0]).float())


@pytest.mark.parametrize(("ratio", "overlap"), [(8, True), (4, False), (128, True)])
def test_there_are_three_modes(tmo, int32, ratio, overlap):
    with pytest.raises(RuntimeError, match=r"\(overlap, ratio, head_dim\) must be one of"):
        prefill(tmo, int32, [1.0], ape=torch.zeros(ratio, 2 * DIM), overlap=overlap)


def decode(call, int32, at, state, value=6.0, slot=1, **changed):
    kv = packed([value])
    given = {
        "kv": kv,
        "score": torch.zeros_like(kv),
        "position": int32([at]),
        "ape": torch.zeros(4, 2 * DIM),
        "gamma": torch.ones(DIM),
        "sin": torch.zeros(9, 64),
        "cos": torch.ones(9, 64),
        "hadamard_matrix": None,
        "slot_mapping": int32([slot]),
        "kv_cache": torch.zeros(1, 4, DIM),
        "kv_cache_scale": None,
        "eps": 0.0,
        "overlap": True,
        "state_cache": state,
        "state_bt": torch.arange(1, 9, dtype=torch.int32)[None],
        "state_width": 2 * DIM,
        "state_block_size": BLOCK,
        "cu_query_len": int32([0, 1]),
    }
    return call(**given | changed)


def test_a_slot_before_the_end_of_its_window_is_undefined(tmo, int32):
    _, cache, _ = decode(tmo.fused_compress_single_kv, int32, 2, torch.zeros(9, BLOCK, 4 * DIM))
    assert cache[0, :, 0].isnan().tolist() == [False, True, False, False]


def test_last_token_emits_a_normed_row(tmo, int32):
    state, _ = prefill(tmo, int32, [1.0, 2.0, 3.0], out=0)
    _, cache, _ = decode(tmo.fused_compress_single_kv, int32, 3, state)
    assert cache[0, 1].tolist() == [1.0] * DIM


def test_the_last_64_lanes_turn_at_the_windows_first_position(tmo, int32):
    state, _ = prefill(tmo, int32, [0.0] * 4 + [1.0, 2.0, 3.0], out=1)
    sin, cos = torch.zeros(9, 64), torch.ones(9, 64)
    sin[4], cos[4] = 1.0, 0.0
    _, cache, _ = decode(tmo.fused_compress_single_kv, int32, 7, state, sin=sin, cos=cos)
    assert cache[0, 1, [63, 64, 65]].tolist() == [1.0, -1.0, 1.0]


def test_rotation_is_a_product_with_the_matrix(tmo, int32):
    state, _ = prefill(tmo, int32, [1.0, 2.0, 3.0], out=0)
    _, cache, _ = decode(tmo.fused_compress_single_kv, int32, 3, state, hadamard_matrix=torch.eye(DIM) * 2)
    assert cache[0, 1, 0].item() == 2.0


def test_a_negative_slot_is_not_skipped(tmo, int32):
    with pytest.raises(RuntimeError, match=r"slot_mapping must lie in \[0, 4\)"):
        decode(tmo.fused_compress_single_kv, int32, 0, torch.zeros(9, BLOCK, 4 * DIM), slot=-1)


def test_several_tokens_of_a_sequence_need_k(tmo, int32):
    kv = packed([1.0, 1.0])
    both = {
        "kv": kv,
        "score": kv,
        "position": int32([0, 1]),
        "slot_mapping": int32([0, 0]),
        "cu_query_len": int32([0, 2]),
    }
    with pytest.raises(RuntimeError, match="K is 0, but a sequence has 2 tokens"):
        decode(tmo.fused_compress_single_kv, int32, 0, torch.zeros(9, BLOCK, 4 * DIM), **both)


def day0_states():
    return {"kv_state": torch.zeros(2, 8, 2 * DIM), "score_state": torch.full((2, 8, 2 * DIM), -torch.inf)}


def test_day0_prefill_keeps_the_last_window_in_front_and_the_rest_behind(day0, int32):
    states, kv = day0_states(), packed([1.0, 2.0, 3.0, 4.0, 5.0]).float()
    day0.fused_compress_multi_kv(
        kv=kv,
        score=torch.zeros_like(kv),
        **states,
        cu_seqlens=int32([0, 5]),
        batch_ids=int32([1]),
        ape=torch.zeros(4, 2 * DIM),
        max_seqlen=5,
        overlap=True,
        compressed_kv=torch.zeros(1, DIM),
    )
    assert states["kv_state"][1, :, DIM].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0]


def decode_day0(day0, int32, position, value, states, **changed):
    dropped = ("state_cache", "state_bt", "state_width", "state_block_size", "cu_query_len")

    def call(**given):
        kept = {name: tensor for name, tensor in given.items() if name not in dropped}
        return day0.fused_compress_single_kv(
            **{**kept, **states, "kv": given["kv"][:, None], "score": given["score"][:, None]}
        )

    return decode(call, int32, position, None, value, state_ids=int32([0]), **changed)


def test_day0_shifts_the_state_where_a_window_ends(day0, int32):
    states = day0_states()
    for position in range(4):
        decode_day0(day0, int32, position, position + 1.0, states)
    assert states["kv_state"][0, :4, DIM].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_day0_pools_over_both_windows(day0, int32):
    states = day0_states()
    for position in range(7):
        decode_day0(day0, int32, position, 1.0, states)
    ape = torch.full((4, 2 * DIM), OFF)
    ape[3] = 0.0
    states["score_state"][0, :4] = OFF
    states["score_state"][0, 0] = 0.0
    cache = decode_day0(day0, int32, 7, 3.0, states, ape=ape, gamma=torch.ones(DIM) * 2)
    assert cache[0, 1, 0].item() == pytest.approx(2.0)
