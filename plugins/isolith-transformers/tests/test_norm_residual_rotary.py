"""Norms, residual streams and rotary embedding against transformers' DeepSeek-V4 modules.

In float32, where transformers rounds nothing that the operators do not; its bfloat16 paths round on the way.
"""

import pytest
import torch

import isolith
from isolith.ops.norm import head_rms_norm, rms_norm
from isolith.ops.residual import hc_head, hc_post, hc_pre
from isolith.ops.rotary import rope

pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")

HIDDEN, HEADS, HEAD_DIM, ROPE = 48, 3, 96, 64
COMPRESS = {"theta": 160000.0, "factor": 16.0, "original_length": 65536}
KINDS = [
    pytest.param("main", {"theta": 10000.0}, id="main"),
    pytest.param("compress", COMPRESS, id="compress"),
]


def config(n=4, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6):
    return configuration.DeepseekV4Config(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        qk_rope_head_dim=ROPE,
        compress_ratios=[0, 4, 128, 0],
        hc_mult=n,
        hc_sinkhorn_iters=sinkhorn_iters,
        hc_eps=hc_eps,
        rms_norm_eps=norm_eps,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        max_position_embeddings=1_048_576,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    )


def randomised(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            deviation = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return module.eval()


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coefficients(module):
    return module.fn.detach(), module.scale.detach(), module.base.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_rms_norm_equals_the_weighted_module(dtype, eps):
    module = randomised(modeling.DeepseekV4RMSNorm(HIDDEN, eps=eps), seed=1)
    x = normal(7, HIDDEN, seed=2, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, module.weight.detach(), eps=eps), module(x).detach())


def test_head_rms_norm_equals_the_unweighted_module():
    x = normal(7, HEADS, HEAD_DIM, seed=3)
    expected = modeling.DeepseekV4UnweightedRMSNorm(eps=1e-6)(x)
    torch.testing.assert_close(head_rms_norm(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(
    "settings", [{}, {"sinkhorn_iters": 2, "hc_eps": 0.01, "norm_eps": 0.5}], ids=["v4", "large_eps"]
)
def test_hc_pre_equals_the_module(n, settings):
    module = randomised(modeling.DeepseekV4HyperConnection(config(n, **settings)), seed=4)
    streams = normal(7, n, HIDDEN, seed=5)
    post, comb, x = (result[0].detach() for result in module(streams[None]))
    actual = hc_pre(
        streams,
        *coefficients(module),
        sinkhorn_iters=settings.get("sinkhorn_iters", 20),
        norm_eps=settings.get("norm_eps", 1e-6),
        hc_eps=settings.get("hc_eps", 1e-6),
    )
    torch.testing.assert_close(actual, (x, post, comb), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_hc_head_equals_the_module(n):
    module = randomised(modeling.DeepseekV4HyperHead(config(n)), seed=6)
    streams = normal(7, n, HIDDEN, seed=7)
    weights = (module.hc_fn.detach(), module.hc_scale.detach(), module.hc_base.detach())
    torch.testing.assert_close(hc_head(streams, *weights), module(streams[None])[0].detach(), rtol=1e-5, atol=1e-6)


class Attention(torch.nn.Module):
    """A sublayer in the place of attention that doubles its input."""

    def forward(self, hidden_states, **_):
        return 2 * hidden_states, None


class Experts(torch.nn.Module):
    """A sublayer in the place of the experts that doubles its input."""

    def forward(self, hidden_states, **_):
        return 2 * hidden_states


def test_two_sublayers_equal_the_decoder_layer():
    layer = randomised(modeling.DeepseekV4DecoderLayer(config(), layer_idx=0), seed=8)
    layer.self_attn, layer.mlp = Attention(), Experts()
    streams = normal(7, 4, HIDDEN, seed=9)
    expected = layer(streams[None], input_ids=torch.zeros(1, 7, dtype=torch.long))
    actual = streams
    for mix, norm in ((layer.attn_hc, layer.input_layernorm), (layer.ffn_hc, layer.post_attention_layernorm)):
        x, post, comb = hc_pre(actual, *coefficients(mix))
        actual = hc_post(2 * rms_norm(x, norm.weight.detach()), actual, post, comb)
    torch.testing.assert_close(actual, expected[0].detach(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "yarn"), KINDS)
def test_tables_equal_the_rotary_module_up_to_position_1e6(kind, yarn):
    module = modeling.DeepseekV4RotaryEmbedding(config())
    frequencies = isolith.rope_frequencies(ROPE, **yarn)
    positions = torch.tensor([0, 1, 127, 65_535, 65_536, 999_983, 1_048_575])
    cos, sin = module(torch.empty(0), positions[None], layer_type=kind)
    cos_table, sin_table = isolith.rope_tables(frequencies, 1_048_576)
    assert torch.equal(torch.stack((cos_table[positions], sin_table[positions])), torch.stack((cos[0], sin[0])))


@pytest.mark.parametrize(("kind", "yarn"), KINDS)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rope_equals_apply_rotary_pos_emb(kind, yarn, inverse):
    module = modeling.DeepseekV4RotaryEmbedding(config())
    positions = torch.tensor([0, 1, 5, 127, 128, 4095, 7])
    x = normal(7, HEADS, HEAD_DIM, seed=10)
    cos, sin = module(x, positions[None], layer_type=kind)
    expected = modeling.apply_rotary_pos_emb(x.transpose(0, 1)[None], cos, -sin if inverse else sin)
    tables = isolith.rope_tables(isolith.rope_frequencies(ROPE, **yarn), 4096)
    actual = rope(x, positions, *tables, inverse=inverse)
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
