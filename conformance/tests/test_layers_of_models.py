"""Whole layers: their samples are legal, what is right passes, and a composition with a mistake does not."""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from isolith import OPERATORS, ArgumentError, Make, hybrid_attention, kv_cache_write, override, rope
from isolith.dispatch import using
from isolith_conformance.family import copied, evaluate, only_references
from isolith_conformance.judge import judge
from isolith_conformance.layers import LAYERS, attention, decoder_block

block_module = sys.modules[decoder_block.reference.__module__]

SAMPLES = [
    pytest.param(name, sample.name, dtype, id=f"{name}-{sample.name}-{str(dtype).removeprefix('torch.')}")
    for name, layer in LAYERS.items()
    for dtype in layer.sample_dtypes
    for sample in layer.samples(Make(dtype, seed=name))
]
RELATIONS = [
    pytest.param(
        *(name, relation.name, dtype),
        id=f"{name}-{relation.name}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] if dtype != torch.float32 else [],
    )
    for name, layer in LAYERS.items()
    for dtype in layer.sample_dtypes
    for relation in layer.relations(Make(dtype, seed=name))
]


def call_of(name, label, dtype=torch.float32, seed=None):
    made = LAYERS[name].samples(Make(dtype, seed=seed or name))
    return LAYERS[name].arguments(**next(sample for sample in made if sample.name == label).arguments)


def results_of(layer, arguments):
    """Outputs and caches of a layer run by whatever is dispatched."""
    given = copied(arguments)
    outputs = [leaf for leaf in tree_flatten(layer(**given))[0] if isinstance(leaf, Tensor)]
    return outputs + [given[name] for name in layer.mutates]


@pytest.mark.parametrize(("name", "label", "dtype"), SAMPLES)
def test_sample_is_legal_and_its_fake_tells_the_result(name, label, dtype):
    layer, arguments = LAYERS[name], call_of(name, label, dtype)
    layer.validate(arguments)
    layer.check_values(**arguments)
    result = evaluate(layer, layer.reference, arguments)[0]
    told = layer.fake(**arguments)
    assert (told.shape, told.dtype) == (result.shape, result.dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_bad_call_gets_its_sentence(name):
    for sample in LAYERS[name].errors(Make(torch.float32, seed=name)):
        with pytest.raises(ArgumentError) as caught:
            LAYERS[name](**sample.arguments)
        assert str(caught.value) == sample.says


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_dispatched_part_by_part_to_the_backend(name):
    arguments = call_of(name, "chunks")
    with override(backend="cpu", fallback="error"):
        results = results_of(LAYERS[name], arguments)
    assert judge(LAYERS[name], arguments, results).problem is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label", "dtype"), SAMPLES)
def test_every_sample_passes_on_the_host(name, label, dtype):
    arguments = call_of(name, label, dtype)
    assert judge(LAYERS[name], arguments, results_of(LAYERS[name], arguments)).problem is None


@pytest.mark.parametrize(("name", "label", "dtype"), RELATIONS)
def test_decode_and_chunks_are_prefill(name, label, dtype):
    layer = LAYERS[name]
    relation = next(each for each in layer.relations(Make(dtype, seed=name)) if each.name == label)
    made, carried = [], {}
    for part in relation.parts:
        arguments = layer.arguments(**{**part, **carried})
        made.append(evaluate(layer, layer.reference, arguments))
        carried = dict(zip(layer.mutates, made[-1][1:], strict=True))
    assert judge(layer, layer.arguments(**relation.whole), relation.assemble(made)).problem is None


@pytest.mark.parametrize("name", ["csa_layer", "decoder_block"])
def test_bfloat16_selects_what_float64_does(name):
    # Were a gap narrow, rounding would move whole entries, and the error with them.
    for seed in range(3):
        arguments = call_of(name, "prefill", torch.bfloat16, seed=f"{name}{seed}")
        results = evaluate(LAYERS[name], LAYERS[name].reference, arguments)
        assert judge(LAYERS[name], arguments, results).problem is None


def without_inverse(*args, **given):
    return rope(*args, **{**given, "inverse": False})


def without_rope(x, *_, **__):
    return x.clone()


def without_sink(*args, **given):
    return hybrid_attention(*args[:7], None, *args[8:], **given)


def window_one_short(*args, **given):
    return hybrid_attention(*args[:5], args[5] - 1, *args[6:], **given)


def without_what_is_compressed(*args, **given):
    return hybrid_attention(*args[:8], **given)


def one_slot_on(cache, x, slots):
    size = cache.shape[0] * cache.shape[1]
    kv_cache_write(cache, x, torch.where(slots < 0, slots, (slots + 1) % size))


def not_written(cache, x, slots):
    kv_cache_write(cache, x, torch.full_like(slots, -1))


ATTENTION_MISTAKES = {
    "rope_is_not_undone": {"rope": without_inverse},
    "rope_is_omitted": {"rope": without_rope},
    "sink_is_dropped": {"hybrid_attention": without_sink},
    "window_is_one_short": {"hybrid_attention": window_one_short},
    "cache_is_written_a_slot_on": {"kv_cache_write": one_slot_on},
    "cache_is_not_written": {"kv_cache_write": not_written},
    "head_norm_is_omitted": {"head_rms_norm": lambda x: x.clone()},
}
COMPRESSED_MISTAKES = {
    "compressed_entries_are_not_seen": {"hybrid_attention": without_what_is_compressed},
    "keys_are_not_rotated": {
        "kv_compress": lambda *args: attention_parts["kv_compress"](*args[:-1], False),
    },
    "ape_is_dropped": {"kv_compress": lambda *args: attention_parts["kv_compress"](*args[:11], None, *args[12:])},
}
BLOCK_MISTAKES = {
    "comb_is_transposed": {
        "hc_post": lambda y, x, post, comb: block_parts["hc_post"](y, x, post, comb.mT.contiguous())
    },
    "streams_are_not_mixed": {
        "hc_post": lambda y, x, post, comb: block_parts["hc_post"](
            y, x, post, torch.eye(4).expand_as(comb).contiguous()
        )
    },
    "norm_is_omitted": {"rms_norm": lambda x, _: x.clone()},
    "bias_is_dropped_in_the_choice": {
        "moe_gate": lambda logits, k, bias, routed_scale: block_parts["moe_gate"](
            logits, k, 9 * bias.flip(0), routed_scale=routed_scale
        )
    },
}
attention_parts, block_parts = dict(vars(attention)), dict(vars(block_module))


def problem_with(monkeypatch, module, name, mistake):
    """What the judge says of a layer's prefill with a mistake in it."""
    arguments = call_of(name, "chunks")
    with monkeypatch.context() as patch:
        for part, wrong in mistake.items():
            patch.setattr(module, part, wrong)
        with using(only_references()):
            results = results_of(LAYERS[name], arguments)
    return judge(LAYERS[name], arguments, results).problem


@pytest.mark.parametrize("mistake", ATTENTION_MISTAKES)
@pytest.mark.parametrize("name", ["swa_layer", "hca_layer", "csa_layer"])
def test_a_mistake_in_the_attention_is_caught(monkeypatch, name, mistake):
    assert problem_with(monkeypatch, attention, name, ATTENTION_MISTAKES[mistake])


@pytest.mark.parametrize("mistake", COMPRESSED_MISTAKES)
def test_a_mistake_in_what_is_compressed_is_caught(monkeypatch, mistake):
    assert problem_with(monkeypatch, attention, "csa_layer", COMPRESSED_MISTAKES[mistake])


@pytest.mark.parametrize("mistake", BLOCK_MISTAKES)
def test_a_mistake_in_the_block_is_caught(monkeypatch, mistake):
    assert problem_with(monkeypatch, block_module, "decoder_block", BLOCK_MISTAKES[mistake])


def test_layers_name_the_operators_that_they_are_composed_of():
    for layer in LAYERS.values():
        assert set(layer.composed_of) <= set(OPERATORS)
        assert len(set(layer.composed_of)) == len(layer.composed_of)
