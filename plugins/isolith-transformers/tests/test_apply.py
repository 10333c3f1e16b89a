"""What apply changes, what undo restores, and what both refuse."""

import copy

import isolith_transformers
import pytest
import torch
from isolith_transformers import tiny
from transformers.models.deepseek_v4 import modeling_deepseek_v4

import isolith
from isolith import ArgumentError, dispatch

COMMON = {"rms_norm", "rope", "swiglu", "quant_linear", "moe_gate", "fused_moe", "kv_cache_write"}
V4 = {"head_rms_norm", "hc_pre", "hc_post", "hc_head", "hybrid_attention", "grouped_output_proj"}
CALLED = {
    "window": COMMON | V4,
    "csa": COMMON | V4 | {"kv_compress", "lightning_indexer"},
    "hca": COMMON | V4 | {"kv_compress"},
    "hash": (COMMON - {"moe_gate"}) | V4 | {"kv_compress", "lightning_indexer", "moe_hash_gate"},
    "v3": COMMON | {"mla_attention"},
    "v3.2": COMMON | {"mla_attention", "lightning_indexer"},
}


@pytest.fixture
def model():
    return tiny.v4(["window", "csa"], hash_layers=1)


@pytest.mark.parametrize("name", CALLED)
def test_exactly_the_expected_operators_are_called(pairs, name, monkeypatch):
    names, call = set(), dispatch.call

    def recorded(operator, args, kwargs):
        names.add(operator.name)
        return call(operator, args, kwargs)

    monkeypatch.setattr(dispatch, "call", recorded)
    pairs(name).changed(tiny.ids(2, 30), use_cache=True)
    parts = {part for operator in CALLED[name] for part in isolith.OPERATORS[operator].composed_of}
    inner = {part for operator in parts for part in isolith.OPERATORS[operator].composed_of}
    assert names - (parts | inner) == CALLED[name] - (parts | inner)


@pytest.mark.parametrize("name", ["v4", "v3", "v3.2"])
def test_nothing_falls_back(pairs, name):
    with isolith.override(fallback="error"):
        pairs(name).changed.generate(tiny.ids(2, 30), max_new_tokens=3, do_sample=False)
        assert isolith.fallbacks() == ()


def test_the_backend_and_a_kernel_can_be_chosen_by_name(pairs, monkeypatch):
    model, chosen = pairs("v4").changed, []
    with isolith.override(backend="cpu", kernels="rms_norm=reference", fallback="error"):
        norm = model.model.norm
        chosen.append(isolith.explain(isolith.rms_norm, torch.ones(1, 64), norm.weight, 1e-6).chosen.name)
        model(tiny.ids(1, 20))
    assert chosen == ["reference"]


def test_a_prefill_expands_the_latents_and_a_decode_step_absorbs_the_projections(pairs, monkeypatch):
    absorbed, call = [], dispatch.call

    def recorded(operator, args, kwargs):
        if operator.name == "mla_attention":
            absorbed.append(kwargs["absorbed"])
        return call(operator, args, kwargs)

    monkeypatch.setattr(dispatch, "call", recorded)
    pairs("v3").changed.generate(tiny.ids(1, 9), max_new_tokens=2, do_sample=False)
    assert absorbed == [False] * 3 + [True] * 3


def test_parameters_keep_their_names_and_their_memory(model):
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    isolith_transformers.apply(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_no_class_is_changed(model):
    classes = {type(module) for module in model.modules()}
    before = {kind: kind.forward for kind in classes}
    isolith_transformers.apply(model)
    assert {kind: kind.forward for kind in classes} == before


def test_another_model_of_the_class_stays_as_it_was(model):
    other, ids = copy.deepcopy(model), tiny.ids(1, 20)
    before = other(ids).logits
    isolith_transformers.apply(model)
    assert torch.equal(other(ids).logits, before)


def test_undo_restores_every_attribute(model):
    def attributes():
        return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]

    before, experts = attributes(), model.config._experts_implementation
    isolith_transformers.apply(model).undo()
    assert attributes() == before
    assert model.config._experts_implementation == experts


def test_undo_restores_the_output_to_the_bit(model):
    ids = tiny.ids(1, 40)
    before = model(ids).logits
    isolith_transformers.apply(model)
    model(ids)
    isolith_transformers.undo(model)
    assert torch.equal(model(ids).logits, before)


def test_apply_after_undo_changes_the_model_again(model):
    ids = tiny.ids(1, 40)
    isolith_transformers.apply(model)
    first = model(ids).logits
    isolith_transformers.undo(model)
    isolith_transformers.apply(model)
    assert torch.equal(model(ids).logits, first)


def test_a_copy_of_a_changed_model_is_a_changed_model_of_its_own(model):
    ids = tiny.ids(1, 20)
    isolith_transformers.apply(model)
    before, copied = model(ids).logits, copy.deepcopy(model)
    isolith_transformers.undo(model)
    assert torch.equal(copied(ids).logits, before)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_the_block_size_does_not_show(pairs, block_size):
    pair, ids = pairs("v4"), tiny.ids(2, 70)
    changed = copy.deepcopy(pair.untouched)
    isolith_transformers.apply(changed, block_size=block_size)
    assert float((changed(ids).logits - pair.changed(ids).logits).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["v4", "v3", "v3.2"])
def test_a_bfloat16_model_is_as_near_to_float32_as_the_untouched_one(pairs, name):
    # By the median token: a rounding that flips a choice of experts moves a token far, in either model.
    ids, errors = tiny.ids(2, 60), []
    wanted = pairs(name).untouched(ids).logits
    for model in (pairs(name).untouched, pairs(name).changed):
        logits = copy.deepcopy(model).bfloat16()(ids).logits
        errors.append((logits - wanted).square().mean(-1).sqrt().median())
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("name", ["v4", "v3", "v3.2"])
def test_a_float64_model_agrees_as_far_as_transformers_keeps_float64(pairs, name):
    # Its norms and tables of angles are float32 in float64 models too.
    ids, untouched = tiny.ids(2, 60), copy.deepcopy(pairs(name).untouched).double()
    untouched.set_experts_implementation("eager")
    changed = copy.deepcopy(untouched)
    isolith_transformers.apply(changed)
    assert float((changed(ids).logits - untouched(ids).logits).abs().max()) < 1e-5


def test_no_mask_is_made(pairs, monkeypatch):
    def fail(**arguments):
        raise AssertionError("a mask was made")

    monkeypatch.setattr(modeling_deepseek_v4, "create_sliding_window_causal_mask", fail)
    assert pairs("v4").changed(tiny.ids(1, 20)).logits.isfinite().all()


def test_a_csa_layer_attends_through_lists_of_the_entries_selected(pairs, monkeypatch):
    widths, call = [], dispatch.call

    def recorded(operator, args, kwargs):
        if operator.name == "hybrid_attention":
            widths.append(kwargs["topk_indices"].shape[1])
        return call(operator, args, kwargs)

    monkeypatch.setattr(dispatch, "call", recorded)
    model = pairs("csa").changed
    model(tiny.ids(1, 90))  # 22 entries
    assert widths == [model.config.index_topk] * 2 == [8, 8]


def refusal(call):
    """The message of the ArgumentError that a call raises."""
    with pytest.raises(ArgumentError) as error:
        call()
    return str(error.value)


def test_another_model_is_refused():
    says = (
        "isolith_transformers: model must be one of DeepseekV3ForCausalLM, DeepseekV32ForCausalLM, "
        "DeepseekV4ForCausalLM; got Linear."
    )
    assert refusal(lambda: isolith_transformers.apply(torch.nn.Linear(2, 2))) == says


def test_another_transformers_is_refused(model, monkeypatch):
    monkeypatch.setattr(isolith_transformers, "version", lambda name: "5.24.1")
    says = "isolith_transformers: transformers must be 5.23, whose modules this knows; got 5.24.1."
    assert refusal(lambda: isolith_transformers.apply(model)) == says


def test_applying_twice_is_refused(model):
    isolith_transformers.apply(model)
    says = "isolith_transformers: a model is changed once; got one that apply has changed before."
    assert refusal(lambda: isolith_transformers.apply(model)) == says


def test_undoing_twice_is_refused(model):
    isolith_transformers.apply(model).undo()
    says = "isolith_transformers: undo takes a model that apply has changed; got one that it has not."
    assert refusal(lambda: isolith_transformers.undo(model)) == says


def test_quantised_weights_are_refused(model):
    projection = model.model.layers[0].self_attn.q_a_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    says = (
        "isolith_transformers: weights must be bfloat16, float16, float32 or float64; got "
        "model.layers.0.self_attn.q_a_proj.weight in float8_e4m3fn. Load the model without quantisation."
    )
    assert refusal(lambda: isolith_transformers.apply(model)) == says


def test_a_module_that_somebody_else_has_changed_is_refused(model):
    model.model.norm.forward = lambda x: x
    says = "isolith_transformers: modules must have their class's own forward; got another in model.norm."
    assert refusal(lambda: isolith_transformers.apply(model)) == says


def test_a_refused_model_is_unchanged(model):
    model.config.hidden_act = "gelu"
    before = model(tiny.ids(1, 20)).logits
    says = "isolith_transformers: hidden_act must be silu; got 'gelu'."
    assert refusal(lambda: isolith_transformers.apply(model)) == says
    assert torch.equal(model(tiny.ids(1, 20)).logits, before)


def test_frequencies_that_change_with_the_length_are_refused():
    model = tiny.v3(yarn=False)
    model.config.rope_parameters["rope_type"] = "dynamic"
    says = "isolith_transformers: rope_type must be default, linear or yarn; got 'dynamic'."
    assert refusal(lambda: isolith_transformers.apply(model)) == says


def test_another_score_is_refused(model):
    model.config.scoring_func = "softmax"
    says = "isolith_transformers: scoring_func must be sqrtsoftplus or sigmoid; got 'softmax'."
    assert refusal(lambda: isolith_transformers.apply(model)) == says


def test_a_block_of_no_items_is_refused(model):
    says = "isolith_transformers: block_size must be at least 1; got 0."
    assert refusal(lambda: isolith_transformers.apply(model, block_size=0)) == says


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (
            "v4",
            {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
            "a model that compresses tokens takes no padding, which transformers counts as tokens; got an "
            "attention_mask with zeros. Call it with sequences of one length, or one by one.",
        ),
        (
            "v3",
            {"attention_mask": torch.tensor([[1, 1, 0, 1]])},
            "attention_mask may leave out tokens on the left alone; got a zero behind a one.",
        ),
        (
            "v3",
            {"attention_mask": torch.ones(1, 1, 4, 4)},
            "attention_mask must be [batch, tokens so far], (1, 4) here; got shape (1, 1, 4, 4).",
        ),
        (
            "v4",
            {"position_ids": torch.tensor([[1, 2, 3, 4]])},
            "position_ids must count tokens from the tokens seen before; got [1, 2, 3, 4] to begin with.",
        ),
        (
            "v3",
            {"position_ids": torch.tensor([[0, 1, 3, 4]])},
            "position_ids must count tokens within each sequence; got [0, 1, 3, 4] to begin with.",
        ),
        ("v3", {"inputs_embeds": torch.zeros(1, 4, 64)}, "give input_ids or inputs_embeds; got both."),
        (
            "v4",
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 64)},
            "hash layers choose experts by input_ids; got inputs_embeds alone.",
        ),
        (
            "v3",
            {"output_attentions": True},
            "attention weights are never made, so output_attentions must be False; got True.",
        ),
    ],
    ids=["padding", "hole", "mask_rank", "shifted", "gap", "both_inputs", "hash_without_ids", "attention_weights"],
)
def test_a_call_that_cannot_be_followed_is_refused(pairs, name, arguments, says):
    arguments = {"input_ids": tiny.ids(1, 4), **arguments}
    assert refusal(lambda: pairs(name).changed(**arguments)) == f"isolith_transformers: {says}"


def test_positions_that_start_elsewhere_do_for_a_model_without_compressors(pairs):
    model, ids = pairs("v3").changed, tiny.ids(1, 20)
    shifted = model(ids, position_ids=torch.arange(7, 27)[None]).logits
    assert torch.equal(shifted, model(ids).logits)


def test_training_mode_is_refused(pairs):
    model = copy.deepcopy(pairs("v3").changed).train()
    says = "isolith_transformers: a changed model is for inference; got one in training mode."
    assert refusal(lambda: model(tiny.ids(1, 4))) == says
