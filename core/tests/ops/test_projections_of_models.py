"""What surrounds the attention of each model, composed of the operators, against the formulas without quantisation."""

import pytest
import torch

import isolith
from isolith import Make

POSITIONS = torch.tensor([0, 1, 127, 4000])
MAIN = dict(
    zip(("cos_table", "sin_table"), isolith.rope_tables(isolith.rope_frequencies(64, 10000.0), 4096), strict=True)
)


def fp8_weight(make, n, k, block, scale_format="ue8m0"):
    """(e4m3 codes, scales, values) of a random weight in square blocks."""
    values = make.normal(n, k, std=k**-0.5, dtype=torch.float32)
    tiles = values.unflatten(0, (n // block, block)).unflatten(2, (k // block, block)).transpose(1, 2)
    q, scale = isolith.act_quant_fp8(tiles.flatten(2), block * block, scale_format)
    q = q.unflatten(2, (block, block)).transpose(1, 2).reshape(n, k)
    scale = scale[..., 0]
    return q, scale, isolith.block_dequant(q, scale, block, block, "float64")


def error(actual, expected):
    """The relative error in the Frobenius norm."""
    return float((actual.double() - expected).norm() / expected.norm())


def normed(x, weight, eps):
    return weight.double() * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def turned(x, inverse=False):
    """The last 64 dimensions as complex numbers, turned."""
    angle = torch.complex(MAIN["cos_table"].double(), MAIN["sin_table"].double())[POSITIONS]
    angle = angle.conj() if inverse else angle
    pairs = torch.view_as_complex(x[..., -64:].unflatten(-1, (32, 2)).contiguous())
    rotated = torch.view_as_real(pairs * angle.view(4, *(1,) * (x.dim() - 2), 32)).flatten(-2)
    return torch.cat((x[..., :-64], rotated), dim=-1)


@pytest.mark.parametrize(
    ("block", "scale_format", "eps", "head_norm"),
    [(128, "ue8m0", 1e-6, True), (32, "ue8m0", 1e-20, False), (128, "float32", 1e-6, False)],
    ids=["v4", "v41", "v3"],
)
def test_query_is_the_formula_within_the_error_of_e4m3(block, scale_format, eps, head_norm):
    make = Make(torch.bfloat16, seed=block)
    x, weight = make.normal(4, 256), make.normal(128, std=0.1, mean=1.0)
    (qa, sa, wa), (qb, sb, wb) = (fp8_weight(make, n, k, block, scale_format) for n, k in ((128, 256), (512, 128)))
    rules = {"scale_format": scale_format, "block_n": block, "block_k": block}
    low = isolith.rms_norm(isolith.quant_linear(x, qa, sa, **rules), weight, eps)
    q = isolith.quant_linear(low, qb, sb, **rules).unflatten(1, (4, 128))
    q = isolith.rope(isolith.head_rms_norm(q, eps) if head_norm else q, POSITIONS, **MAIN)
    wanted = (normed(x.double() @ wa.T, weight, eps) @ wb.T).unflatten(1, (4, 128))
    wanted = turned(normed(wanted, torch.ones(128), eps) if head_norm else wanted)
    assert 1e-3 < error(q, wanted) < 0.06


@pytest.mark.parametrize("block", [128, 32], ids=["v4", "v41"])
def test_output_is_turned_back_and_projected_by_groups(block):
    make = Make(torch.bfloat16, seed=block)
    x = make.normal(4, 4, 128)
    wo_a, wo_b = [fp8_weight(make, 128, 256, block) for _ in range(2)], fp8_weight(make, 256, 256, block)
    (codes, scales, values), rules = zip(*wo_a, strict=True), {"block_n": block, "block_k": block}
    o = isolith.rope(x, POSITIONS, **MAIN, inverse=True)
    scales = {"wo_a_scale": torch.stack(scales), "wo_b_scale": wo_b[1]}
    y = isolith.grouped_output_proj(o, torch.stack(codes), wo_b[0], **scales, **rules)
    u = torch.einsum("tak,ark->tar", turned(x.double(), inverse=True).reshape(4, 2, 256), torch.stack(values))
    assert 1e-3 < error(y, u.flatten(1) @ wo_b[2].T) < 0.06


@pytest.mark.parametrize(("entry", "quantised"), [(584, 448), (656, 512)], ids=["v4", "v3"])
def test_row_of_the_cache_keeps_its_turned_dims_and_the_rest_within_the_error_of_e4m3(entry, quantised):
    make = Make(torch.bfloat16, seed=entry)
    kv = isolith.rope(make.normal(4, quantised + 64), POSITIONS, **MAIN)
    cache, slots = torch.zeros(2, 4, entry, dtype=torch.uint8), torch.tensor([5, 0, 7, 2])
    isolith.kv_cache_write(cache, kv, slots)
    back = isolith.kv_cache_read(cache, slots)
    assert torch.equal(back[:, quantised:], kv[:, quantised:])
    assert 1e-3 < error(back[:, :quantised], kv[:, :quantised].double()) < 0.05


@pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])
def test_v32_indexer_scores_survive_rotation_and_one_scale_a_vector(scale_format):
    make = Make(torch.bfloat16, seed=1)
    style = {"interleaved": False, "rope_first": True}
    q, k = (isolith.rope(x, POSITIONS, **MAIN, **style) for x in (make.normal(4, 8, 128), make.normal(4, 128)))
    cache, slots = torch.zeros(1, 4, 132, dtype=torch.uint8), torch.arange(4)
    isolith.kv_cache_write(cache, isolith.hadamard(k), slots, scale_format)
    codes, scale = isolith.act_quant_fp8(isolith.hadamard(q), 128, scale_format)
    scores = codes.float() * scale.float() @ isolith.kv_cache_read(cache, slots, "float32").T
    assert error(scores, q.double() @ k.double().T) < 0.06


@pytest.mark.parametrize("rotate", [True, False], ids=["v4", "v41"])
def test_indexer_scores_survive_e2m1_with_and_without_rotation(rotate):
    make = Make(torch.bfloat16, seed=2)
    q, k = (isolith.rope(x, POSITIONS, **MAIN) for x in (make.normal(4, 8, 128), make.normal(4, 128)))
    spread = isolith.hadamard if rotate else torch.clone
    cache, slots = torch.zeros(1, 4, 68, dtype=torch.uint8), torch.arange(4)
    isolith.kv_cache_write(cache, spread(k), slots)
    values = isolith.block_dequant(*isolith.act_quant_fp4(spread(q)), 1, 32, "float32")
    assert error(values @ isolith.kv_cache_read(cache, slots, "float32").T, q.double() @ k.double().T) < 0.2
