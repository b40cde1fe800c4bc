"""The optimizer against plain float64 statements of its equations."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqe_jax.config import OptimizerConfig
from gqe_jax.train.optimizer import clip_gradients, clip_state, decay_mask, learning_rate, make_optimizer

SHAPES = {
    "embed": {"embedding": (7, 4)},
    "blocks": {"attention": {"q": (2, 4, 3), "scale": (2, 4), "bias": (2, 4)}, "norm": {"scale": (2, 4)}},
}


def random_tree(seed: int, size: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: size * rng.standard_normal(shape), SHAPES, is_leaf=is_shape)


def to_float32(tree: dict) -> dict:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


# ---------------------------------------------------------------- schedules


def test_wsd_is_exact_at_every_edge():
    """The corners of the trapezium are stated by the config; between them the line is straight: midpoints suffice."""
    config = OptimizerConfig(learning_rate=3e-4, min_learning_rate=1e-5, warmup_steps=10, decay_steps=20)
    rate = learning_rate(config, 100)
    peak, floor = np.float32(3e-4), np.float32(1e-5)
    assert rate(0) == 0
    assert rate(5) == pytest.approx(1.5e-4, rel=1e-6)
    assert [rate(10), rate(50), rate(80)] == [peak] * 3
    assert rate(90) == pytest.approx((3e-4 + 1e-5) / 2, rel=1e-6)
    assert [rate(100), rate(1000)] == [floor] * 2


def test_cosine_is_exact_at_every_edge():
    """Warm-up as in wsd, then half a cosine whose quarter points are known in closed form."""
    config = OptimizerConfig(schedule="cosine", learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=20)
    rate = learning_rate(config, 100)
    assert rate(0) == 0
    assert [rate(20), rate(100), rate(101)] == [np.float32(1e-3), np.float32(1e-4), np.float32(1e-4)]
    assert rate(60) == pytest.approx(5.5e-4, rel=1e-6)
    assert rate(40) == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, rel=1e-6)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_schedule_without_warmup_starts_at_the_peak(schedule):
    """With no step to warm up in, the first step already takes the peak (0 / 0 must not appear)."""
    config = OptimizerConfig(schedule=schedule, warmup_steps=0, decay_steps=4)
    rate = learning_rate(config, 8)
    assert rate(0) == np.float32(config.learning_rate)
    assert rate(8) == np.float32(config.min_learning_rate)


def test_wsd_without_decay_stays_at_the_peak():
    """No decaying part means none, also at and beyond the last step."""
    rate = learning_rate(OptimizerConfig(warmup_steps=2, decay_steps=0), 8)
    assert {float(rate(step)) for step in (2, 7, 8, 9)} == {float(np.float32(5e-4))}


def test_wsd_of_warmup_and_decay_only():
    """Warm-up and decay may touch: the peak is then one step wide."""
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, min_learning_rate=0.0, warmup_steps=4, decay_steps=4), 8)
    np.testing.assert_allclose([rate(s) for s in range(9)], [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0], atol=1e-7)


# ---------------------------------------------------------------- clipping


def zclip_float64(norms, *, threshold, decay, warmup):
    """Algorithm of the paper, kept as it says: a list of the first norms, then mean and variance by recursion."""
    buffer, mean, variance, clipped = [], None, None, []
    for norm in norms:
        if not math.isfinite(norm):
            clipped.append(norm)
            continue
        if mean is None:
            buffer.append(norm)
            clipped.append(norm)
            if len(buffer) == warmup:
                mean, variance = np.mean(buffer), np.var(buffer)
            continue
        z = (norm - mean) / math.sqrt(variance)
        if z > threshold:
            norm = mean + threshold**2 / z * math.sqrt(variance)
        clipped.append(norm)
        mean = decay * mean + (1 - decay) * norm
        variance = decay * variance + (1 - decay) * (norm - mean) ** 2
    return clipped, mean, variance


def run_clip(config: OptimizerConfig, norms):
    """Feeds gradients of the given norms; returns the norms after clipping, the states' fields and the last state."""
    clip = clip_gradients(config)
    direction = random_tree(1)
    length = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(direction)))
    update = jax.jit(clip.update)
    state, after, states = clip.init(direction), [], []
    for norm in norms:
        grads = to_float32(jax.tree.map(lambda g, norm=norm: g / length * norm, direction))
        clipped, state = update(grads, state)
        after.append(math.sqrt(sum(float((np.float64(leaf) ** 2).sum()) for leaf in jax.tree.leaves(clipped))))
        states.append(state)
    return after, states


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), warmup=st.integers(2, 30), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_zclip_follows_the_paper(seed, warmup, scale):
    """Norms that wander, spikes of 2 to 50 times: every clipped norm and the final statistics agree with float64."""
    rng = np.random.default_rng(seed)
    norms = scale * (1 + 0.1 * rng.standard_normal(60)).clip(0.5)
    norms[35::9] *= rng.uniform(2, 50, norms[35::9].shape)
    config = OptimizerConfig(zclip_warmup_steps=warmup)
    after, states = run_clip(config, norms)
    expected, mean, variance = zclip_float64(norms, threshold=2.5, decay=0.97, warmup=warmup)
    np.testing.assert_allclose(after, expected, rtol=2e-4)
    np.testing.assert_allclose(states[-1].mean, mean, rtol=1e-4)
    np.testing.assert_allclose(states[-1].variance, variance, rtol=5e-3)
    np.testing.assert_allclose([s.norm for s in states], norms, rtol=1e-5)
    np.testing.assert_allclose([s.factor for s in states], np.asarray(expected) / norms, rtol=2e-4)


def test_zclip_cuts_larger_spikes_more():
    """Reciprocal clipping: the limit mean + std·thr²/z falls as the spike grows, and never goes below the mean."""
    quiet = [1.0, 1.1, 0.9, 1.05, 0.95] * 5
    mean = np.mean(quiet)
    after = [run_clip(OptimizerConfig(), [*quiet, spike])[0][-1] for spike in (1.3, 2.0, 10.0, 1e4)]
    assert all(larger < smaller for smaller, larger in itertools.pairwise(after))
    assert after[-1] == pytest.approx(mean, rel=1e-3) and after[-1] >= mean * (1 - 1e-6)


@pytest.mark.parametrize("clip", ["zclip", "norm", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_not_enter_the_statistics(clip, bad):
    """One overflowing step must not blind the clipping of all later ones, whenever it comes; the log must see it."""
    norms = [1.0, 1.1, bad, 0.9, 1.05, 0.95, bad, 1.0, 8.0]
    config = OptimizerConfig(clip=clip, zclip_warmup_steps=4)
    after, states = run_clip(config, norms)
    clean, clean_states = run_clip(config, [norm for norm in norms if math.isfinite(norm)])
    assert not math.isfinite(after[2]) and not math.isfinite(states[2].norm)
    np.testing.assert_array_equal([a for a in after if math.isfinite(a)], clean)
    assert [float(x) for x in states[-1]] == [float(x) for x in clean_states[-1]]


def test_zclip_leaves_norms_that_do_not_vary_alone():
    """A standard deviation of 0 must not make spikes of rounding errors, nor divide by 0 (also for a norm of 0)."""
    after, states = run_clip(OptimizerConfig(zclip_warmup_steps=3), [1.0] * 6)
    np.testing.assert_allclose(after, 1.0, rtol=1e-6)
    after, states = run_clip(OptimizerConfig(zclip_warmup_steps=3), [0.0] * 6)
    assert after == [0.0] * 6 and all(np.isfinite(x) for x in states[-1])


def test_norm_clipping():
    """Gradients longer than clip_norm are shortened to it, others are left bit for bit."""
    after, states = run_clip(OptimizerConfig(clip="norm", clip_norm=2.0), [0.5, 2.0, 8.0])
    np.testing.assert_allclose(after, [0.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([s.factor for s in states], [1.0, 1.0, 0.25], rtol=1e-6)
    after, states = run_clip(OptimizerConfig(clip="none"), [0.5, 800.0])
    np.testing.assert_allclose(after, [0.5, 800.0], rtol=1e-6)
    assert [float(s.factor) for s in states] == [1.0, 1.0]


# ---------------------------------------------------------------- AdamW


def adamw_float64(params, grads_by_step, config, rates):
    """Loshchilov & Hutter 2019, algorithm 2, leaf by leaf."""
    decays = {"embedding": True, "q": True, "scale": False, "bias": False}

    def one(path, p, *grads):
        m = v = np.zeros_like(p)
        for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g**2
            step = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
            p = p - rate * (step + decays[path[-1].key] * config.weight_decay * p)
        return p

    return jax.tree.map_with_path(one, params, *grads_by_step)


def train(config, params, grads_by_step, steps):
    optimizer = make_optimizer(config, steps)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in grads_by_step:
        params, state = step(params, state, grads)
    return params, state


def test_adamw_follows_its_equations():
    """Five steps of warm-up and stable phase, decay only where the name allows it, against float64."""
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=2, clip="none")
    params, grads = random_tree(0), [random_tree(seed) for seed in range(1, 6)]
    expected = adamw_float64(params, grads, config, rates=[0, 5e-3, 1e-2, 1e-2, 1e-2])
    got, _ = train(config, to_float32(params), [to_float32(g) for g in grads], steps=7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


def test_decay_mask_goes_by_name():
    """Stacked layers make a norm scale two-dimensional, so only the name can tell it from a matrix."""
    assert decay_mask(SHAPES | {"embed": {"embedding": 0}, "blocks": {"a": {"scale": 0, "bias": 0, "k": 0}}}) == {
        "embed": {"embedding": True},
        "blocks": {"a": {"scale": False, "bias": False, "k": True}},
    }


def test_state_is_float32_for_bfloat16_parameters():
    """bfloat16 second moments would stop moving (b2 = 0.95 needs more than 8 bits); the parameters keep their dtype."""
    config = OptimizerConfig(warmup_steps=0, decay_steps=0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(0))
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(1))
    got, state = train(config, params, [grads], steps=10)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    exact = math.sqrt(sum(float((np.float64(g) ** 2).sum()) for g in jax.tree.leaves(grads)))
    assert clip_state(state).norm == pytest.approx(exact, rel=1e-6)


def test_state_can_be_donated_and_shaped_abstractly():
    """A step that donates its state needs a buffer for each leaf; a restore needs the state's shapes without arrays."""
    config = OptimizerConfig()
    optimizer = make_optimizer(config, 1000)
    params = to_float32(random_tree(0))
    state = optimizer.init(params)
    abstract = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    step = jax.jit(lambda state, grads: optimizer.update(grads, state, params)[1], donate_argnums=0)
    state = step(step(state, params), params)
    assert clip_state(state).observed == 2


def test_every_clip_mode_has_the_same_state():
    """A run may be resumed with another way of clipping: the checkpoint's tree does not depend on it."""
    params = to_float32(random_tree(0))
    structures = {
        str(jax.tree.structure(make_optimizer(dataclasses.replace(OptimizerConfig(), clip=clip), 1000).init(params)))
        for clip in ("zclip", "norm", "none")
    }
    assert len(structures) == 1
