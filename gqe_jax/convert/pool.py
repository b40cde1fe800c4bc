"""Fewer KV heads (GQA uptraining, arXiv 2305.13245, with the alignment of arXiv 2412.20677), and fewer query heads.

Neighbouring KV heads are turned towards each other and replaced by their mean; query heads keep their order. Fewer
query heads on the same KV heads are SQA (arXiv 2510.01817).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gqe_jax.attention import GQAConfig
from gqe_jax.config import AttentionConfig, ConfigError, ModelConfig, require
from gqe_jax.convert.align import orthogonal_turns, pair_moments, plane_turns, turn_planes
from gqe_jax.convert.heads import best_heads
from gqe_jax.convert.layers import Batch, Calibration, Conversion, Converted, Params, convert_layers

Pool = Literal["mean", "first", "random"]
POOLS: tuple[Pool, ...] = ("mean", "first", "random")


def gqa(
    params: Mapping[str, Any],
    config: ModelConfig,
    batches: Sequence[Batch],
    *,
    num_kv_heads: int | None = None,
    num_query_heads: int | None = None,
    pool: Pool = "mean",
    align: bool = True,
    refit: bool = True,
    seed: int = 0,
) -> Converted:
    """Converts a dense model to fewer KV heads, to fewer query heads, or to both.

    Args:
      params: path → array, the model's (`Converted.params`).
      config: of the model.
      batches: calibration rows.
      num_kv_heads, num_query_heads, pool, align, seed: see `to_gqa`.
      refit: whether each layer's output projection is fitted to what the source's layer gave.

    Raises:
      ConfigError: as `to_gqa`.
    """
    options = {"num_kv_heads": num_kv_heads, "num_query_heads": num_query_heads, "pool": pool, "align": align}
    return convert_layers(to_gqa(config, **options, seed=seed), params, config, batches, refit=refit)


def to_gqa(
    model: ModelConfig,
    *,
    num_kv_heads: int | None = None,
    num_query_heads: int | None = None,
    pool: Pool = "mean",
    align: bool = True,
    seed: int = 0,
) -> Conversion:
    """Returns the conversion to `num_kv_heads` KV heads and `num_query_heads` query heads; None: as many as the source
    has.

    Args:
      model: of the source.
      num_kv_heads: G', a divisor of the source's G; each takes the place of R = G / G' neighbours.
      num_query_heads: H', a multiple of the source's G: the H' / G heads of each group that predict the layer's output
        best are kept.
      pool: "mean" of the heads, the "first", or a "random" projection, normal with the model's init_std.
      align: turn the heads of a group towards each other first, which changes nothing by itself.
      seed: of the random projections.

    Raises:
      ConfigError: a source that is not dense, or counts that do not divide.
    """
    source = dense_source(model, "gqa")
    kv_heads = source.num_kv_heads if num_kv_heads is None else num_kv_heads
    heads = source.num_query_heads if num_query_heads is None else num_query_heads
    check_kv_heads(source, kv_heads)
    keep = _kept(source, heads)
    require(pool in POOLS, f"--pool={pool!r} is unknown: use one of {', '.join(POOLS)}")
    pools = kv_heads < source.num_kv_heads
    aligns = pools and align and pool != "random"
    notes = (QK_NORM_NOTE,) if aligns and source.qk_norm else ()

    def layer(params: Params, calibration: Calibration, index: int) -> tuple[Params, str]:
        said = []
        if keep < source.num_query_heads // source.num_kv_heads:
            groups = source.num_kv_heads
            chosen = best_heads(calibration.regress(source, params), groups, source.num_query_heads // groups, keep)
            params = kept_heads(params, chosen)
            said.append(f"query heads {listed(chosen)}")
        if pools:
            members = np.arange(source.num_kv_heads).reshape(kv_heads, -1)
            if aligns:
                assert calibration.moments is not None  # asked for below
                params = aligned(params, members, calibration.moments, source)
            rng = np.random.default_rng([seed, index])
            params = pooled(params, members, pool, model.init_std, rng)
            said.append(f"{members.shape[1]} KV heads in one")
        return params, ", ".join(said)

    config = dataclasses.replace(source, num_kv_heads=kv_heads, num_query_heads=heads)
    return Conversion(config, layer, moments=aligns, notes=notes)


QK_NORM_NOTE = (
    "QK norm: its scale does not commute with turns of the keys, so keys are pooled as they are; values are aligned"
)


def dense_source(model: ModelConfig, target: str) -> GQAConfig:
    """Returns the source's attention. Raises ConfigError if it is not dense."""
    if not isinstance(model.attention, GQAConfig):
        raise ConfigError(
            f"--to {target} converts dense attention (model.attention.kind='gqa'), and the run's is "
            f"{model.attention.kind!r}: name the run of a dense model, such as one that gqe import made"
        )
    return model.attention


def check_kv_heads(source: AttentionConfig, kv_heads: int) -> None:
    """Raises ConfigError unless `kv_heads` heads can each take the place of equally many of the source's."""
    groups = source.num_kv_heads
    fits = ", ".join(str(count) for count in range(1, groups + 1) if groups % count == 0)
    require(
        kv_heads > 0 and groups % kv_heads == 0,
        f"--num-kv-heads={kv_heads} does not divide the run's num_kv_heads={groups}: every new head takes the place "
        f"of equally many; use one of {fits}",
    )


def _kept(source: GQAConfig, heads: int) -> int:
    """Query heads that each of the source's groups keeps."""
    groups, members = source.num_kv_heads, source.num_query_heads // source.num_kv_heads
    fits = ", ".join(str(groups * keep) for keep in range(1, members + 1))
    require(
        heads > 0 and heads % groups == 0 and heads <= source.num_query_heads,
        f"--num-query-heads={heads} does not leave each of the run's {groups} KV heads equally many of its {members} "
        f"query heads: use one of {fits}",
    )
    return heads // groups


def kept_heads(params: Params, chosen: np.ndarray) -> Params:
    """Returns the layer with the query heads [G, k] of each group alone."""
    groups = np.arange(len(chosen))[:, None]
    result = params | {
        "q_proj.kernel": params["q_proj.kernel"][:, groups, chosen],
        "o_proj.kernel": params["o_proj.kernel"][groups, chosen],
    }
    if "q_proj.bias" in params:
        result["q_proj.bias"] = params["q_proj.bias"][groups, chosen]
    return result


def aligned(
    params: Params,
    groups: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    moments: np.ndarray,
    config: AttentionConfig,
) -> Params:
    """Returns the same layer, the KV heads of each group turned towards each other.

    Args:
      params: of a dense layer.
      groups: the heads of each group.
      moments: of the layer's input; see `Calibration`.
      config: of the layer: keys turn by planes with a rotary embedding, freely without, not at all with QK norm.
    """
    params = {path: x.copy() for path, x in params.items()}
    values = pair_moments(moments, params["v_proj.kernel"], params.get("v_proj.bias"))
    keys = pair_moments(moments, params["k_proj.kernel"], params.get("k_proj.bias"))
    for own in map(np.asarray, groups):
        if len(own) == 1:
            continue
        pairs = np.ix_(own, own)
        for head, turn in zip(own, orthogonal_turns(values[pairs]), strict=True):
            params["v_proj.kernel"][:, head] @= turn
            if "v_proj.bias" in params:
                params["v_proj.bias"][head] @= turn
            params["o_proj.kernel"][head] = turn.T @ params["o_proj.kernel"][head]
        if config.qk_norm:
            continue
        rotary = config.rope_theta is not None
        turns = plane_turns(keys[pairs]) if rotary else orthogonal_turns(keys[pairs])
        turned = turn_planes if rotary else np.matmul
        for head, turn in zip(own, turns, strict=True):
            for path in ("k_proj.kernel", "q_proj.kernel"):
                params[path][:, head] = turned(params[path][:, head], turn)
            if "q_proj.bias" in params:
                for path in ("k_proj.bias", "q_proj.bias"):
                    params[path][head] = turned(params[path][head], turn)
    return params


def pooled(params: Params, groups: np.ndarray, pool: Pool, init_std: float, rng: np.random.Generator) -> Params:
    """Returns the layer with one KV head in place of each group of neighbours.

    Args:
      params: of a dense layer.
      groups: [G', R], 0 … G − 1 in order.
      pool, init_std, rng: see `to_gqa`.
    """
    result = dict(params)
    for name in ("k_proj", "v_proj"):
        kernel = params[f"{name}.kernel"]
        shape = (kernel.shape[0], len(groups), kernel.shape[2])
        result[f"{name}.kernel"] = rng.normal(0.0, init_std, shape) if pool == "random" else _one(kernel, groups, pool)
        if f"{name}.bias" in params:
            bias = _one(params[f"{name}.bias"][None], groups, pool)[0]
            result[f"{name}.bias"] = np.zeros_like(bias) if pool == "random" else bias
    for path, axis in (("q_proj.kernel", 1), ("q_proj.bias", 0), ("o_proj.kernel", 0)):
        if path in params:
            shape = params[path].shape
            result[path] = params[path].reshape(*shape[:axis], len(groups), -1, *shape[axis + 2 :])
    return result


def _one(heads: np.ndarray, groups: np.ndarray, pool: Pool) -> np.ndarray:
    """[d, G, D] → [d, G', D]."""
    return heads[:, groups[:, 0]] if pool == "first" else heads[:, groups].mean(axis=2)


def listed(chosen: np.ndarray) -> str:
    """Heads of each group, as "0 1, 2 3"."""
    return ", ".join(" ".join(map(str, own)) for own in chosen)
