"""Cost-optimal head counts against the paper's figures, planted curves, and costs written out here."""

import math

import numpy as np
import pytest

from gqe_jax import cost
from gqe_jax.config import ConfigError
from gqe_jax.config_files import load_config
from gqe_jax.flops import forward_flops, parameter_count


def test_figure_1_of_the_paper():
    """At 128K tokens (8, 1) with 1.58B parameters in 29 layers keeps 50.2% less than (32, 8) with 1.2B in 22, and takes
    57.9% fewer FLOPs: the two ratios that the paper states."""
    context, dim = 131_072, 64
    small, large = {"layers": 22, "head_dim": dim}, {"layers": 29, "head_dim": dim}
    kept = cost.kept_numbers(1.58e9, context, kv_heads=1, **large)
    kept /= cost.kept_numbers(1.2e9, context, kv_heads=8, **small)
    flops = cost.decode_flops(1.58e9, context, attending=8, **large)
    flops /= cost.decode_flops(1.2e9, context, attending=32, **small)
    assert round(kept - 1, 3) == -0.502 and round(flops - 1, 3) == -0.579


def test_parameter_counts_and_attention_ratio_of_the_configurations():
    """What the README states, and k·G + 1 of H heads' attention."""
    models = {name: load_config(name).model for name in ("gqe_250m", "gqa_250m", "sqa_250m")}
    counts = {name: parameter_count(model)["total"] for name, model in models.items()}
    assert counts == {"gqe_250m": 247_890_944, "gqa_250m": 252_871_680, "sqa_250m": 236_094_464}
    attention = {name: forward_flops(model, 2048) for name, model in models.items()}
    gqe = attention["gqe_250m"].attention + attention["gqe_250m"].shared_head
    assert gqe * 16 == attention["gqa_250m"].attention * 9


def test_costs_are_affine_in_the_context():
    """So a mixture of lengths costs what its mean length costs."""
    lengths, shares = np.array([512.0, 4096.0, 131_072.0]), np.array([0.5, 0.3, 0.2])
    for count, heads in ((cost.decode_flops, {"attending": 9}), (cost.kept_numbers, {"kv_heads": 8})):
        each = [count(2.5e8, length, layers=16, head_dim=64, **heads) for length in lengths]
        mean = count(2.5e8, float(shares @ lengths), layers=16, head_dim=64, **heads)
        np.testing.assert_allclose(shares @ each, mean, rtol=1e-14)


@pytest.mark.parametrize("amplitude, exponent, floor", [(3e2, 0.31, 1.7), (18.0, 0.12, 0.0), (4e5, 0.9, 2.2)])
def test_planted_constants_come_back(amplitude, exponent, floor):
    """Losses of a curve determine it: to 1e-4, at any scale of the exponent. Its inverse is that of the formula."""
    sizes = np.geomspace(2e6, 4e8, 6)
    found = cost.fit(sizes, amplitude * sizes**-exponent + floor)
    np.testing.assert_allclose([found.exponent, found.floor], [exponent, floor], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.amplitude, amplitude, rtol=2e-3)  # N^b · 1e-4 of the exponent
    assert found.residual < 1e-6
    target = floor + 0.3
    np.testing.assert_allclose(found.size(target), (amplitude / 0.3) ** (1 / exponent), rtol=1e-2)
    assert math.isinf(cost.Fit(amplitude, exponent, floor, 0.0).size(floor))


def test_a_fit_is_the_least_square_of_its_family():
    """No other exponent with its own best amplitude and floor leaves less of losses with noise: a grid is asked."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e6, 1e8, 7)
    losses = 50 * sizes**-0.25 + 1.5 + rng.normal(0, 0.01, 7)
    found = cost.fit(sizes, losses)
    left = np.sum((losses - [found.loss(size) for size in sizes]) ** 2)
    for exponent in np.geomspace(0.01, 2, 2000):
        design = np.stack([sizes**-exponent, np.ones(7)], axis=1)
        solution, squares, *_ = np.linalg.lstsq(design, losses, rcond=None)
        if solution[1] >= 0:
            assert left <= squares[0] * (1 + 1e-6)
    np.testing.assert_allclose(found.residual, math.sqrt(left / 7), rtol=1e-9)


def test_a_curve_that_falls_below_zero_or_rises_is_clipped():
    """Amplitude and floor are at least 0: a negative floor would promise any loss, a rising curve is none of size."""
    sizes = np.geomspace(1e6, 1e8, 5)
    assert cost.fit(sizes, 3 - 0.15 * np.log(sizes)).floor == 0
    rising = cost.fit(sizes, np.linspace(2, 3, 5))
    assert rising.amplitude == 0 and rising.floor == 2.5


def test_fewer_than_four_sizes_are_refused():
    """Three constants pass through three sizes whatever the losses are; seeds of one size are one size."""
    with pytest.raises(ConfigError, match=r"3 size.* at least 4 sizes of"):
        cost.fit([1e6, 1e6, 2e6, 3e6], [3.0, 3.1, 2.9, 2.8])


@pytest.mark.parametrize("size", [1e8, 2.7e9, 2e11])
def test_shape_has_the_size_and_the_aspect(size):
    """Parameters and d / L of the shape, counted here; between published models the aspect lies between theirs."""
    heads, groups, dim = 16, 8, 64
    form = cost.shape(size, 2 * dim * (heads + groups))
    width, layers = form.d_model, form.layers
    attention = width * dim * heads * 2 + width * dim * groups * 2
    np.testing.assert_allclose(layers * (attention + 3 * width * (8 * width / 3)), size, rtol=1e-6)
    ratios = {1e8: (1536 / 36, 1536 / 36), 2.7e9: (2560 / 48, 2048 / 36), 2e11: (8192 / 80, 8192 / 80)}[size]
    assert ratios[0] - 1e-9 <= width / layers <= ratios[1] + 1e-9


def test_search_takes_the_least_cost_and_fewer_heads_of_equals():
    """Each candidate's Z is recomputed from its own numbers; of candidates that are equal the fewer query heads win,
    then the fewer KV heads; what reaches no loss comes last."""
    curves = {heads: cost.Fit(300.0, 0.3, 1.5, 0.0) for heads in [(8, 4), (4, 4), (4, 1)]}
    ranked = cost.search(curves | {(1, 1): cost.Fit(290.0, 0.3, 2.7, 0.0)}, 2.6, 8192, head_dim=64, vocab_size=50_304)
    assert math.isinf(ranked[-1].cost) and len(ranked) == 4
    assert [each.cost for each in ranked] == sorted(each.cost for each in ranked)
    for each in ranked[:-1]:
        np.testing.assert_allclose(each.size, (300 / 1.1) ** (1 / 0.3), rtol=1e-12)
        total = each.size + 50_304 * each.shape.d_model
        memory = total + 2 * 8192 * each.shape.layers * 64 * each.kv_heads
        flops = 2 * total + 4 * 8192 * each.shape.layers * 64 * each.query_heads
        np.testing.assert_allclose(each.cost, 0.9 * memory**0.5 + 0.1 * flops ** (1 / 3), rtol=1e-12)
    unreached = dict.fromkeys([(8, 4), (8, 2), (2, 2)], cost.Fit(0.0, 0.3, 9.0, 0.0))
    tied = cost.search(unreached, 2.6, 8192, head_dim=64, vocab_size=1)
    assert [(each.query_heads, each.kv_heads) for each in tied] == [(2, 2), (8, 2), (8, 4)]
