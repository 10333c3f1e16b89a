"""The paged cache: what it holds, and what can be done with it between calls."""

import pytest
import torch
from isolith_transformers import tiny
from isolith_transformers.pages import Kind, Table
from transformers import DynamicCache, StaticCache

from isolith import ArgumentError

LIMIT = 2e-5
KINDS = ["window", "csa", "hca", "v4", "v3", "v3.2"]


def difference(a, b):
    return float((a - b).abs().max())


def filled(model, ids):
    """The cache after `ids`."""
    return model(ids, use_cache=True).past_key_values


def last(model, ids, cache):
    """Logits of the last of `ids`, which follow what the cache holds."""
    return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]


def test_an_empty_dynamic_cache_of_the_caller_is_filled_in_place(pairs):
    pair, ids, cache = pairs("v4"), tiny.ids(2, 40), DynamicCache()
    pair.changed(ids[:, :30], past_key_values=cache)
    pair.changed(ids[:, 30:39], past_key_values=cache)
    assert difference(last(pair.changed, ids[:, 39:], cache), pair.untouched(ids).logits[:, -1]) < LIMIT


def test_the_length_is_the_number_of_tokens_seen(pairs):
    cache = filled(pairs("v4").changed, tiny.ids(2, 40))
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("name", KINDS)
def test_reset_starts_afresh_with_another_batch_size(pairs, name):
    pair, ids = pairs(name), tiny.ids(3, 40, seed=1)
    cache = filled(pair.changed, tiny.ids(2, 70))
    cache.reset()
    assert difference(pair.changed(ids, past_key_values=cache).logits, pair.untouched(ids).logits) < LIMIT


@pytest.mark.parametrize("name", KINDS)
def test_reorder_goes_on_with_the_sequences_chosen(pairs, name):
    pair, ids = pairs(name), tiny.ids(3, 60)
    cache, rows = filled(pair.changed, ids[:, :41]), torch.tensor([2, 0, 2])
    cache.reorder_cache(rows)
    got = last(pair.changed, ids[rows][:, 41:], cache)
    assert difference(got, pair.untouched(ids[rows]).logits[:, -1]) < LIMIT


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_selecting_and_repeating_sequences_changes_the_batch(pairs, name):
    pair, ids = pairs(name), tiny.ids(3, 60)
    cache = filled(pair.changed, ids[:, :41])
    cache.batch_select_indices(torch.tensor([False, True, True]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([1, 1, 2, 2])
    got = last(pair.changed, ids[rows][:, 41:], cache)
    assert difference(got, pair.untouched(ids[rows]).logits[:, -1]) < LIMIT


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [(50,), (33, *[1] * 17), (20, 30)], ids=["prefill", "decode", "chunk"])
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_tokens_taken_back_leave_no_trace(pairs, name, steps, tokens):
    pair, ids, wrong = pairs(name), tiny.ids(2, 60), tiny.ids(2, 60, seed=7)
    wrong[:, : 50 - tokens] = ids[:, : 50 - tokens]
    cache, start = DynamicCache(), 0
    for step in steps:
        pair.changed(wrong[:, start : start + step], past_key_values=cache)
        start += step
    cache.crop(-tokens)
    got = last(pair.changed, ids[:, 50 - tokens :], cache)
    assert difference(got, pair.untouched(ids).logits[:, -1]) < LIMIT


def test_crop_shortens_the_length(pairs):
    cache = filled(pairs("v4").changed, tiny.ids(2, 40))
    cache.crop(-3)
    assert cache.get_seq_length() == 37


def test_crop_by_more_tokens_than_states_are_kept_for_is_refused(pairs):
    cache = filled(pairs("hca").changed, tiny.ids(1, 60))
    with pytest.raises(ArgumentError) as error:
        cache.crop(-40)
    assert str(error.value) == (
        "isolith_transformers: crop takes back as many tokens as their states are kept for, 16 at the least of"
        " each sequence's own; got 40 of 60."
    )


def test_a_positive_crop_is_refused(pairs):
    cache = filled(pairs("v3").changed, tiny.ids(1, 20))
    with pytest.raises(ArgumentError) as error:
        cache.crop(5)
    assert str(error.value) == "isolith_transformers: crop takes minus the number of tokens to remove; got 5."


def test_the_window_pool_forgets_what_no_window_reaches(pairs):
    model, ids = pairs("window").changed, tiny.ids(1, 600)
    cache = filled(model, ids[:, :590])
    for token in range(590, 600):
        model(ids[:, token : token + 1], past_key_values=cache)
    # 16 tokens of the window and 16 for crop, in blocks of 8.
    assert cache.layers[0].pools["window"].entries.shape[0] <= 6


def test_a_compressed_pool_grows_by_a_block_for_ratio_times_block_size_tokens(pairs):
    model = pairs("csa").changed
    cache = filled(model, tiny.ids(1, 200))
    assert cache.layers[0].pools["entries"].entries.shape[0] == 7  # 50 entries in blocks of 8


def test_a_compressor_keeps_the_states_of_its_open_groups_alone(pairs):
    model = pairs("csa").changed
    cache = filled(model, tiny.ids(1, 200))
    # The open group of 4, the one before it and 16 tokens for crop, in blocks of 8.
    assert cache.layers[0].pools["entries states"].entries.shape[0] <= 4


def test_blocks_of_a_finished_table_are_used_again():
    table = Table(Kind(block_size=4, window=3))
    table.clear(1)
    for seen in range(500):
        table.begin([seen], [1])
    assert table.blocks <= 8


def test_two_sequences_never_share_a_block():
    table = Table(Kind(block_size=4))
    table.clear(2)
    table.begin([0, 0], [9, 30])
    table.select([1, 1, 0])
    table.begin([30, 30, 9], [7, 0, 4])
    blocks = [block for row in table.rows for block in row if block >= 0]
    assert len(blocks) == len(set(blocks)) == 10 + 8 + 4


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (lambda model: StaticCache(config=model.config, max_cache_len=64), "StaticCache"),
        (lambda model: DynamicCache(offloading=True), "offloading DynamicCache"),
    ],
    ids=["static", "offloading"],
)
def test_another_class_of_cache_is_refused(pairs, cache, says):
    model = pairs("v3").changed
    with pytest.raises(ArgumentError) as error:
        model(tiny.ids(1, 5), past_key_values=cache(model))
    assert str(error.value) == (f"isolith_transformers: past_key_values must be None or a DynamicCache; got {says}.")


def test_a_cache_that_an_untouched_model_filled_is_refused(pairs):
    pair = pairs("v3")
    cache = filled(pair.untouched, tiny.ids(1, 5))
    with pytest.raises(ArgumentError) as error:
        pair.changed(tiny.ids(1, 1), past_key_values=cache)
    assert str(error.value) == (
        "isolith_transformers: past_key_values must be empty or filled by this model; got a cache of "
        "5 tokens that a model without apply has filled."
    )


def test_a_paged_cache_is_refused_by_an_untouched_model(pairs):
    pair = pairs("v3")
    cache = filled(pair.changed, tiny.ids(1, 5))
    with pytest.raises(ArgumentError) as error:
        pair.untouched(tiny.ids(1, 1), past_key_values=cache)
    assert str(error.value) == (
        "isolith_transformers: this cache belongs to a model that apply has changed; got a model without."
    )


def test_another_batch_size_is_refused(pairs):
    model = pairs("v3").changed
    cache = filled(model, tiny.ids(2, 5))
    with pytest.raises(ArgumentError) as error:
        model(tiny.ids(3, 1), past_key_values=cache)
    assert str(error.value) == "isolith_transformers: the cache holds 2 sequences; got a batch of 3."


def test_a_cache_that_a_failed_call_left_behind_is_refused(pairs, monkeypatch):
    model = pairs("v3").changed
    cache = filled(model, tiny.ids(1, 5))
    monkeypatch.setattr(model.model.layers[2], "forward", None)
    with pytest.raises(TypeError):
        model(tiny.ids(1, 1), past_key_values=cache)
    with pytest.raises(ArgumentError) as error:
        model(tiny.ids(1, 1), past_key_values=cache)
    assert str(error.value) == (
        "isolith_transformers: this cache was left behind by a call that failed; reset it or make a new one."
    )
