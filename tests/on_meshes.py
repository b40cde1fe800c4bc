"""What `test_parallel` computes in a child process with eight CPU devices: their number is fixed when JAX starts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import checkify

from gqe_jax import GQAttention, GQEAttention, natural, zigzag
from gqe_jax.attention import (
    AsymGQAConfig,
    GQAConfig,
    GQEConfig,
    GQEMLAConfig,
    KeyDrivenConfig,
    MLAConfig,
    RouterConfig,
)
from gqe_jax.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gqe_jax.models.transformer import Transformer
from gqe_jax.parallel.mesh import check_batch, check_model, make_mesh, shard_batch
from gqe_jax.train.step import Step

B, S, V, STEPS = 8, 32, 64, 5
HEADS = {"num_kv_heads": 8, "head_dim": 8}
QUICK = {"implementation": "reference"}  # to compile; what is under test here goes on around the kernels
GQE = {"num_query_experts": 16, **HEADS, **QUICK}
ALL = {"qk_norm": True, "bias": True, "softcap": 20.0, "num_query_experts": 32, "top_k": 2}
NOISY = RouterConfig(init_std=0.5, jitter=0.1, bias_update_rate=0.01, z_loss_weight=0.01)
RANDOM = RouterConfig(kind="random")
LATENT = {"num_query_heads": 16, "latent_dim": 12, "rope_dim": 4, **HEADS, **QUICK}
LATENT_GQE = {"latent_dim": 12, "rope_dim": 4, "router": RouterConfig(init_std=0.5), **GQE}
PLAIN = GQEConfig(**GQE, router=RouterConfig(init_std=0.5))

# name → attention, mesh (data, fsdp, expert, context), microbatches
CASES = {
    "data": (PLAIN, (8, 1, 1, 1), 1),
    "fsdp": (PLAIN, (1, 8, 1, 1), 1),
    "expert": (PLAIN, (1, 1, 8, 1), 1),
    "context": (PLAIN, (1, 1, 1, 8), 1),
    "data, fsdp, expert": (PLAIN, (2, 2, 2, 1), 1),
    "fsdp, expert, context": (PLAIN, (1, 2, 2, 2), 1),
    "ring": (GQEConfig(**GQE | ALL, window=9, context_parallel="ring", router=NOISY), (1, 1, 2, 4), 1),
    "microbatches": (GQEConfig(**GQE, variant="weighted_concat", router=RANDOM), (1, 2, 4, 1), 2),
    "unequal groups": (AsymGQAConfig(num_query_heads=12, max_group_size=4, **HEADS, **QUICK), (1, 2, 2, 2), 1),
    "key-driven": (
        KeyDrivenConfig(num_query_heads=16, **HEADS, **QUICK, perturb=True, context_parallel="ring"),
        (2, 2, 1, 2),
        2,
    ),
    "latent": (MLAConfig(**LATENT, bias=True, latent_norm=True, context_parallel="ring"), (1, 2, 2, 2), 1),
    "latent, routed": (GQEMLAConfig(**LATENT_GQE), (1, 2, 2, 2), 1),
    "dense": (GQAConfig(num_query_heads=16, **HEADS, **QUICK, bias=True, context_parallel="ring"), (2, 1, 2, 2), 1),
}


def run_config(attention, accumulate):
    model = ModelConfig(
        vocab_size=V, d_model=32, num_layers=2, d_ff=64, context=S, dtype="float32", attention=attention
    )
    optimizer = OptimizerConfig(warmup_steps=0, decay_steps=0, learning_rate=1e-2, eps=1e-5, clip="none")
    train = TrainConfig(steps=10, loss_chunk=8, accumulate=accumulate)
    return RunConfig(model=model, data=DataConfig(batch_size=B), optimizer=optimizer, train=train)


def make_batch(rng):
    """Packed rows: two or three documents each, some with padding behind them."""
    segments = np.sort(rng.integers(0, 3, (B, S)), axis=1)[:, ::-1].astype(np.int32).copy()
    positions = np.stack([np.concatenate([np.arange((row == i).sum()) for i in (2, 1, 0)]) for row in segments])
    tokens, targets = rng.integers(0, V, (2, B, S)).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
        "mask": segments != 0,
    }


def train(config, mesh, initial_state):
    """Five steps; the first gradient is read from Adam's first moment, which is (1 − b1) of it."""
    check_model(mesh, config.model)
    check_batch(mesh, B // config.train.accumulate, S)
    rng = np.random.default_rng(0)
    losses, gradient = [], None
    with jax.set_mesh(mesh):
        step = Step(config, mesh)
        state = jax.tree.map(lambda x, sharding: jax.device_put(x.copy(), sharding), initial_state, step.shardings)
        for _ in range(STEPS):
            state, metrics = step.train(state, shard_batch(mesh, make_batch(rng)))
            losses.append(float(metrics["loss"]))
            if gradient is None:
                gradient = jax.device_get(state.opt_state["adam"].mu)
        return {"losses": losses, "gradient": gradient, "after": jax.device_get(state.params)}


def near_ties(config, state):
    """Tokens of the first batch, over layers and groups, whose k-th and next probability are closer than 1e-6."""
    step, batch = Step(config), make_batch(np.random.default_rng(0))
    segments, positions = jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["positions"])

    @jax.jit
    def count(params, buffers):
        model = step.model(params, buffers)
        x = model.vocabulary.embed(jnp.asarray(batch["tokens"]))
        graph, layers = nnx.split(model.layers)
        ties = 0
        for index in range(config.model.num_layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], layers))
            stats = block.attention(block.attention_norm(x), segment_ids=segments, positions=positions)[1]
            probs = jnp.sort(stats.router_probs, axis=-1, descending=True)
            k = config.model.attention.top_k
            ties += (probs[..., k - 1] - probs[..., k] < 1e-6).sum()
            x, _, _ = block(x, segment_ids=segments, positions=positions, cache=None, rngs=None, layer_index=index)
        return ties

    return int(count(state.params, state.buffers))


def parameters(model):
    return nnx.to_pure_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(0)), nnx.Param))


def generation():
    """Largest difference of logits, 4 devices on `expert` against one: a prompt of 9 tokens, then 3 one by one."""
    routed = dataclasses.replace(PLAIN, window=7, softcap=5.0, qk_norm=True)
    latent = MLAConfig(**LATENT, window=7), GQEMLAConfig(**LATENT_GQE, softcap=5.0)
    return max(difference_of_logits(attention) for attention in (routed, *latent))


def difference_of_logits(attention):
    model_config = run_config(attention, 1).model
    tokens = np.random.default_rng(0).integers(0, V, (2, 12)).astype(np.int32)
    logits = []
    for sizes, devices in ((MeshConfig(), 1), (MeshConfig(expert=4), 4)):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            graph, state = nnx.split(Transformer(model_config, rngs=nnx.Rngs(0)))

            @jax.jit
            def advance(state, tokens, cache, graph=graph):
                model = nnx.merge(graph, state)
                cache = model.init_cache(2, 16) if cache is None else cache
                x, _, cache = model(tokens, cache=cache)
                return model.logits(x), cache

            found, cache = advance(state, tokens[:, :9], None)
            parts = [found]
            for at in range(9, 12):
                found, cache = advance(state, tokens[:, at : at + 1], cache)
                parts.append(found)
            logits.append(np.concatenate(parts, axis=1))
    return float(np.abs(logits[0] - logits[1]).max())


def layer_errors():
    """What a layer says of calls that its mesh cannot compute."""
    errors = []
    for sizes, groups, shape in (
        ({"expert": 8}, 2, (1, 8, 16)),
        ({"data": 8}, 8, (3, 8, 16)),
        ({"context": 8}, 8, (1, 12, 16)),
        ({"context": 8}, 8, (1, 16, 16)),
        ({"fsdp": 8}, 4, (8, 8, 60)),
    ):
        layer = GQEAttention(shape[-1], 2 * groups, groups, 1, 8, rngs=nnx.Rngs(0))
        cache = layer.init_cache(1, 16) if shape[1] == 16 else None
        with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1} | sizes)))):
            try:
                layer(jnp.zeros(shape), cache=cache)
            except ValueError as error:
                errors.append(str(error))
    return errors


def layer_alone():
    """Prints what a layer says and computes on its own: errors, distance from one device, checkify's error."""
    x = jax.random.normal(jax.random.key(0), (2, 32, 16))
    layer = GQEAttention(16, 16, 8, 1, 8, rngs=nnx.Rngs(0), **QUICK)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        y = jax.jit(lambda x: natural(layer(zigzag(x, 4))[0], 4))(x)
    difference = float(jnp.abs(y - layer(x)[0]).max() / jnp.abs(y).max())
    dense = GQAttention(16, 16, 8, 8, rngs=nnx.Rngs(0), **QUICK)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        said = []
        for kind in (layer, dense):
            check = jax.jit(checkify.checkify(lambda x, cache, kind=kind: kind(x, cache=cache)[0]))
            said.append(check(x, kind.init_cache(2, 32))[0].get())
    print(json.dumps({"errors": layer_errors(), "context": difference, "checkify": said}))


def distance(a, b):
    return np.sqrt(sum(np.sum(np.square(x - y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def main():
    """Trains a small model on each mesh and on one device; prints the relative differences of each case."""
    one = make_mesh(devices=jax.devices()[:1])
    results, alone = {}, {}
    for name, (attention, shape, accumulate) in CASES.items():
        config = run_config(attention, accumulate)
        if config not in alone:
            state = Step(config).initial_state()
            alone[config] = state, train(config, one, state)
        state, theirs = alone[config]
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "expert", "context"), shape, strict=True))))
        ours = train(config, mesh, state)
        leaves = zip(jax.tree.leaves(ours["gradient"]), jax.tree.leaves(theirs["gradient"]), strict=True)
        losses = np.asarray([ours["losses"], theirs["losses"]])
        results[name] = {
            "losses": np.abs(losses[0] / losses[1] - 1).tolist(),
            "gradient": max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in leaves),
            "moved": float(distance(ours["after"], theirs["after"]) / distance(theirs["after"], state.params)),
        }
    plain = run_config(PLAIN, 1)
    print(json.dumps(results | {"generation": generation(), "near_ties": near_ties(plain, alone[plain][0])}))
