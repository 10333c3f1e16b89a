"""Every kind of model and of call gives the logits of the untouched model, in float32."""

import pytest
import torch
from isolith_transformers import pages, tiny

import isolith

NAMES = ("window", "csa", "hca", "hash", "v4", "v3", "v3 without yarn", "v3 amplified", "v3.2")
LIMIT = 2e-5  # logits are of order 1
LENGTH = 70


def in_steps(model, ids, steps):
    """Logits of `ids`, the cache passed from call to call."""
    cache, outputs, start = None, [], 0
    for step in steps:
        output = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + step
        outputs.append(output.logits)
    assert start == ids.shape[1], "the steps must make up the length"
    return torch.cat(outputs, dim=1)


def difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_prefill_without_cache_gives_the_same_logits(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, LENGTH)
    assert difference(pair.changed(ids, use_cache=False).logits, pair.untouched(ids, use_cache=False).logits) < LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "steps",
    [(LENGTH,), (37, 1, 20, 12), (21, *[1] * 49)],
    ids=["prefill", "chunks", "decode"],
)
def test_a_cache_gives_the_same_logits(pairs, name, steps):
    pair, ids = pairs(name), tiny.ids(2, LENGTH)
    assert difference(in_steps(pair.changed, ids, steps), pair.untouched(ids, use_cache=False).logits) < LIMIT


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_blocks_that_nobody_wrote_are_never_read(pairs, name, monkeypatch):
    pair, ids = pairs(name), tiny.ids(2, LENGTH)

    def poison(blocks, block_size, width, dtype, device):
        return torch.full((blocks, block_size, width), float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(pages, "blank", poison)
    got = in_steps(pair.changed, ids, (37, 1, 20, 12))
    assert difference(got, pair.untouched(ids, use_cache=False).logits) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_gives_the_same_logits(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 21)
    wanted = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    untouched, changed = pair.untouched.generate(ids, **wanted), pair.changed.generate(ids, **wanted)
    assert difference(torch.stack(changed.logits), torch.stack(untouched.logits)) < LIMIT


@pytest.mark.parametrize("name", ["v4", "v3", "v3.2"])
def test_generation_without_a_cache_gives_the_same_tokens(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 21)
    wanted = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
    assert torch.equal(pair.changed.generate(ids, **wanted), pair.untouched.generate(ids, **wanted))


@pytest.mark.parametrize("name", ["v4", "v3", "v3.2"])
def test_sampling_with_a_seed_gives_the_same_tokens(pairs, name):
    pair, ids, tokens = pairs(name), tiny.ids(2, 21), []
    for model in (pair.untouched, pair.changed):
        torch.manual_seed(5)
        tokens.append(model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.3, num_return_sequences=2))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["window", "csa", "hca", "v4", "v3", "v3.2"])
def test_beam_search_gives_the_same_beams(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 21)
    wanted = {"max_new_tokens": 14, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    assert torch.equal(pair.changed.generate(ids, **wanted), pair.untouched.generate(ids, **wanted))


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_prefill_in_chunks_by_generate_gives_the_same_tokens(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 45)
    wanted = {"max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": 7}
    assert torch.equal(pair.changed.generate(ids, **wanted), pair.untouched.generate(ids, **wanted))


@pytest.mark.parametrize("name", ["window", "v3", "v3.2"])
def test_padding_on_the_left_gives_the_same_logits(pairs, name):
    pair, ids = pairs(name), tiny.ids(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[2, :25] = 0
    changed = pair.changed(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert difference(changed, pair.untouched(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]) < LIMIT


@pytest.mark.parametrize("name", ["window", "v3", "v3.2"])
def test_generation_with_padding_on_the_left_gives_the_same_tokens(pairs, name):
    pair, ids = pairs(name), tiny.ids(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[2, :25] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(pair.changed.generate(ids, **wanted), pair.untouched.generate(ids, **wanted))


@pytest.mark.parametrize("name", ["v4", "v3", "v3.2"])
def test_a_batch_gives_what_its_sequences_give_alone(pairs, name):
    pair, ids = pairs(name), tiny.ids(3, 50)
    alone = torch.cat([pair.changed(row[None], use_cache=False).logits for row in ids])
    assert difference(pair.changed(ids, use_cache=False).logits, alone) < LIMIT


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_hidden_states_are_recorded_as_before(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 30)
    states = [
        torch.cat([state.flatten() for state in model(ids, output_hidden_states=True).hidden_states])
        for model in (pair.untouched, pair.changed)
    ]
    assert difference(*states) < 1e-4  # the residual streams are of order 10


@pytest.mark.parametrize("name", ["v4", "v3"])
def test_router_logits_are_recorded_as_before(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 30)
    logits = [
        torch.cat(model(ids, output_router_logits=True).router_logits) for model in (pair.untouched, pair.changed)
    ]
    assert difference(*logits) < LIMIT


def test_embeddings_do_for_ids_where_no_layer_hashes(pairs):
    pair, ids = pairs("csa"), tiny.ids(2, 30)
    embeddings = pair.untouched.get_input_embeddings()(ids)
    assert difference(pair.changed(inputs_embeds=embeddings).logits, pair.untouched(ids).logits) < LIMIT


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_every_operator_pinned_to_its_reference_gives_the_same_logits(pairs, name):
    pair, ids = pairs(name), tiny.ids(2, 40)
    pins = dict.fromkeys(isolith.OPERATORS, "reference")
    with isolith.override(backend="cpu", kernels=pins, fallback="error"):
        got = pair.changed(ids, use_cache=False).logits
    assert difference(got, pair.untouched(ids, use_cache=False).logits) < LIMIT
