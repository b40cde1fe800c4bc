"""A dense model as the start of a Grouped Query Experts model. Keys, values and all outside the attention stay."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gqe_jax.attention import GQAConfig, GQEConfig, RouterConfig, make_attention
from gqe_jax.config import ModelConfig, OptimizerConfig, require
from gqe_jax.convert.heads import best_heads
from gqe_jax.convert.layers import Batch, Calibration, Conversion, Converted, Params, convert_layers
from gqe_jax.convert.pool import dense_source, listed

Experts = Literal["copies", "own"]
EXPERTS: tuple[Experts, ...] = ("copies", "own")
LEARNED = RouterConfig()
LEARNING_RATE = 2e-3  # of the reconstruction's first half; the second has a quarter of it
RECONSTRUCTED = ("q_proj.kernel", "router.proj.kernel", "q_shared.kernel", "o_proj.kernel", "o_extra.kernel")


def gqe(
    params: Mapping[str, Any],
    config: ModelConfig,
    batches: Sequence[Batch],
    *,
    top_k: int = 1,
    experts: Experts | None = None,
    experts_per_group: int | None = None,
    reconstruct: int = 0,
    exact: bool = False,
    router: RouterConfig = LEARNED,
    refit: bool = True,
    more: Sequence[Batch] = (),
    seed: int = 0,
) -> Converted:
    """Converts a dense model to Grouped Query Experts.

    Args:
      params: path → array, the model's (`Converted.params`).
      config: of the model.
      batches: calibration rows.
      top_k, experts, experts_per_group, reconstruct, exact, router, seed: see `to_gqe`.
      refit: whether each layer's output projection is fitted to what the source's layer gave.
      more: further rows, for the reconstruction.

    Raises:
      ConfigError: as `to_gqe`; or a reconstruction without further rows.
    """
    require(
        not reconstruct or len(more) > 0,
        f"reconstruct={reconstruct} learns from rows that the fit does not see: give batches of them as more",
    )
    options = {"top_k": top_k, "experts": experts, "experts_per_group": experts_per_group, "exact": exact}
    conversion = to_gqe(config, **options, reconstruct=reconstruct, router=router, seed=seed)
    return convert_layers(conversion, params, config, batches, refit=refit, more=more)


def to_gqe(
    model: ModelConfig,
    *,
    top_k: int = 1,
    experts: Experts | None = None,
    experts_per_group: int | None = None,
    reconstruct: int = 0,
    exact: bool = False,
    router: RouterConfig = LEARNED,
    seed: int = 0,
) -> Conversion:
    """Returns the conversion of a dense model, in each KV group M query heads, to GQE with k = `top_k`.

    In each layer the k heads of every group are chosen that predict the layer's output best. Their rows of W_o, and
    zeros for ō and the shared head, are what the output projection is then pulled to as it is fitted. The shared head's
    queries are Σ W_q / √(G M) over the dense heads.

    Args:
      model: of the source.
      top_k: k.
      experts: "copies": all experts of a group start as copies of its one chosen head, which only k = 1 has; "own":
        they are the dense heads. None: copies where k = 1.
      experts_per_group: of copies; None: M.
      reconstruct: steps of Adam, on this layer's queries, router and output projection, towards the layer's output,
        before the output projection is fitted.
      exact: the dense function itself: k = M with a router that is fixed, or copies of the only head of each group.
      router: of the result.
      seed: of the router's kernel.

    Raises:
      ConfigError: a source that is not dense, or settings that exclude each other.
    """
    source = dense_source(model, "gqe")
    groups, members = source.num_kv_heads, source.num_query_heads // source.num_kv_heads
    require(0 < top_k <= members, f"--top-k={top_k} must lie between 1 and the {members} query heads of a KV group")
    experts = experts or ("copies" if top_k == 1 else "own")
    require(experts in EXPERTS, f"--experts={experts!r} is unknown: use one of {', '.join(EXPERTS)}")
    require(
        experts == "own" or top_k == 1,
        f"--experts=copies with --top-k={top_k} would fill the {top_k} slots of a group with the same output: use "
        f"--experts own, or --top-k 1",
    )
    require(
        experts_per_group is None or (experts == "copies" and experts_per_group > 0),
        f"--experts-per-group={experts_per_group} is a number of copies: at least 1, with --experts copies",
    )
    require(reconstruct >= 0, f"--reconstruct={reconstruct} is a number of steps: 0 or more")
    if exact:
        require(
            top_k == members,
            f"--exact needs every one of the {members} query heads of a KV group (--top-k {members}), or an MHA, whose "
            f"groups have one each: with --top-k={top_k} heads are left out",
        )
        require(reconstruct == 0, f"--exact leaves nothing to reconstruct: drop --reconstruct {reconstruct}")
        if members > 1:
            router = RouterConfig(kind="fixed")
    count = members if experts == "own" or experts_per_group is None else experts_per_group
    config = _gqe_config(source, groups * count, top_k, router)

    def layer(params: Params, calibration: Calibration, index: int) -> tuple[Params, str]:
        if exact:
            chosen = np.tile(np.arange(members), (groups, 1))
        else:
            chosen = best_heads(calibration.regress(source, params), groups, members, top_k)
        rng = np.random.default_rng([seed, index])
        result = upcycled(params, chosen, count if experts == "copies" else None, config, rng)
        if reconstruct:
            result = _reconstructed(result, config, model, calibration, reconstruct)
        return result, f"heads {listed(chosen)}"

    controls = {}
    if router.kind == "learned" and not exact:
        fixed = {"experts": experts, "experts_per_group": experts_per_group, "reconstruct": reconstruct, "seed": seed}
        control = to_gqe(model, top_k=top_k, router=RouterConfig(kind="fixed"), **fixed)
        controls = {"the same with a fixed router": control}
    return Conversion(
        config, layer, lossless=exact, reconstructs=reconstruct > 0, recipe=upcycling_recipe, controls=controls
    )


def upcycling_recipe(optimizer: OptimizerConfig, before: int, steps: int) -> OptimizerConfig:
    """Half the peak, ten steps of warm-up or 1% of them, and a cosine down to a fiftieth of the peak."""
    peak = optimizer.learning_rate / 2
    warmup = min(max(10, steps // 100), steps)
    return dataclasses.replace(
        optimizer, learning_rate=peak, min_learning_rate=peak / 50, schedule="cosine", warmup_steps=warmup
    )


def _gqe_config(source: GQAConfig, num_query_experts: int, top_k: int, router: RouterConfig) -> GQEConfig:
    shared = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    for name in ("kind", "num_query_heads", "out_bias"):
        del shared[name]
    shared["bias"] = source.bias or source.has_out_bias
    return GQEConfig(num_query_experts=num_query_experts, top_k=top_k, router=router, **shared)


def upcycled(
    params: Params, chosen: np.ndarray, copies: int | None, config: GQEConfig, rng: np.random.Generator
) -> Params:
    """Returns a GQE layer before its output projection is fitted.

    Args:
      params: of the dense layer.
      chosen: heads of each group [G, k] whose rows of W_o are the slots'.
      copies: experts of each group that are copies of its chosen head; None: the dense heads are the experts.
      config: of the result.
      rng: of the router's kernel.
    """
    queries = params["q_proj.kernel"]
    width, groups, members, dim = queries.shape
    here, scale = np.arange(groups)[:, None], 1 / np.sqrt(groups * members)
    taken = np.tile(np.arange(members), (groups, 1)) if copies is None else np.repeat(chosen, copies, axis=1)
    result = {path: x for path, x in params.items() if not path.startswith(("q_proj", "o_proj"))} | {
        "q_proj.kernel": queries[:, here, taken],
        "q_shared.kernel": queries.sum(axis=(1, 2)) * scale,
        "o_proj.kernel": params["o_proj.kernel"][here, chosen],
        "o_extra.kernel": np.zeros((2, dim, width)),
    }
    if config.bias:
        bias = params.get("q_proj.bias", np.zeros((groups, members, dim)))
        zeros = np.zeros((groups, dim))
        result |= {
            "q_proj.bias": bias[here, taken],
            "q_shared.bias": bias.sum(axis=(0, 1)) * scale,
            "k_proj.bias": params.get("k_proj.bias", zeros),
            "v_proj.bias": params.get("v_proj.bias", zeros),
            "o_proj.bias": params.get("o_proj.bias", np.zeros(width)),
        }
    if config.router.kind == "learned":
        kernel = rng.normal(0.0, config.router.init_std, (width, groups, taken.shape[1]))
        result["router.proj.kernel"] = kernel
    if config.router.bias_update_rate:
        result["router.bias"] = np.zeros((groups, taken.shape[1]))
    return result


def _reconstructed(
    params: Params, config: GQEConfig, model: ModelConfig, calibration: Calibration, steps: int
) -> Params:
    """Returns the layer after `steps` of Adam on |y − target|² / |target|² plus the router's own loss."""
    layer = nnx.eval_shape(lambda: make_attention(config, model.d_model, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(layer)
    flat = {tuple(path.split(".")): jnp.asarray(x, jnp.float32) for path, x in params.items()}
    trained = {path: x for path, x in flat.items() if ".".join(path) in RECONSTRUCTED}
    fixed = {path: x for path, x in flat.items() if path not in trained}
    optimizer = optax.adam(optax.piecewise_constant_schedule(LEARNING_RATE, {steps // 2: 0.25}))

    def loss_of(trained, u, target, batch):
        layer = nnx.merge(graphdef, nnx.traversals.unflatten_mapping(trained | fixed))
        y, report = layer(u, segment_ids=batch["segment_ids"], positions=batch["positions"])
        real = (batch["segment_ids"] != 0)[..., None]
        error = jnp.sum(jnp.square(y - target), where=real) / jnp.sum(jnp.square(target), where=real)
        return error + report.auxiliary_loss

    @jax.jit
    def step(trained, state, u, target, batch):
        updates, state = optimizer.update(jax.grad(loss_of)(trained, u, target, batch), state)
        return optax.apply_updates(trained, updates), state

    state = optimizer.init(trained)
    for _ in range(steps):
        trained, state = step(trained, state, *next(calibration.examples))
    return params | {".".join(path): np.asarray(x, np.float64) for path, x in trained.items()}
