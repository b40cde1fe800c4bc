"""KV heads pooled in groups that are searched: of unequal size (after AsymGQA, arXiv 2406.14963), or of equal size."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gqe_jax.attention import AsymGQAConfig, GQAConfig, KeyDrivenConfig
from gqe_jax.config import AttentionConfig, ModelConfig, require
from gqe_jax.convert.align import pair_moments
from gqe_jax.convert.groups import (
    Groups,
    best_groups,
    cost,
    distances,
    neighbours,
    turned,
    turned_in_planes,
    unturned,
)
from gqe_jax.convert.layers import Batch, Calibration, Conversion, Converted, Params, convert_layers
from gqe_jax.convert.pool import QK_NORM_NOTE, aligned, check_kv_heads, dense_source, pooled, to_gqa

Items = Literal["kv", "k", "v", "weights"]
ITEMS: tuple[Items, ...] = ("kv", "k", "v", "weights")
HEADS = "layers.attention.heads"  # of a key-driven model: query heads of each KV head


def asym_gqa(
    params: Mapping[str, Any],
    config: ModelConfig,
    batches: Sequence[Batch],
    *,
    num_kv_heads: int | None = None,
    items: Items | None = None,
    equal: bool = False,
    max_group_size: int | None = None,
    align: bool | None = None,
    refit: bool = True,
    seed: int = 0,
) -> Converted:
    """Converts a dense model to fewer KV heads, each in place of those most alike, or freezes a key-driven one.

    Args:
      params: path → array, the model's (`Converted.params`).
      config: of the model.
      batches: calibration rows.
      num_kv_heads, items, equal, max_group_size, align, seed: see `to_asym_gqa`.
      refit: whether each layer's output projection is fitted to what the source's layer gave.

    Raises:
      ConfigError: as `to_asym_gqa`.
    """
    options = {"items": items, "equal": equal, "max_group_size": max_group_size, "align": align, "seed": seed}
    heads = functools.partial(params.__getitem__, HEADS)
    conversion = to_asym_gqa(config, num_kv_heads=num_kv_heads, heads=heads, **options)
    return convert_layers(conversion, params, config, batches, refit=refit)


def to_asym_gqa(
    model: ModelConfig,
    *,
    num_kv_heads: int | None = None,
    items: Items | None = None,
    equal: bool = False,
    max_group_size: int | None = None,
    align: bool | None = None,
    seed: int = 0,
    heads: Callable[[], Any] | None = None,
) -> Conversion:
    """Returns the conversion to `num_kv_heads` KV heads, in each layer the means of groups that `groups.best_groups`
    finds.

    Args:
      model: of the source.
      num_kv_heads: G', at most the source's G.
      items: what heads are compared by: keys and values that calibration text gives ("kv", the mean of both), one of
        them, or the weights alone, which is QCQA's measure (arXiv 2406.10247); None: "kv".
      equal: groups of equal size: the result is plain GQA with its heads in another order.
      max_group_size: most query heads of a group; None: twice their mean number, which bounds the padding.
      align: turn the heads of a group towards each other first, and compare them so turned; None: yes.
      seed: of the search's random starts.
      heads: gives the buffer of a key-driven source that is called HEADS, int [L, G]. Such a source becomes the same
        function with the allocation that it has; the other arguments say nothing of it.

    Raises:
      ConfigError: a source that is neither dense nor key-driven, or counts that do not fit.
    """
    if isinstance(model.attention, KeyDrivenConfig):
        given = {"--num-kv-heads": num_kv_heads, "--max-group-size": max_group_size, "--equal": equal or None}
        given |= {"--items": items, "--align": align}
        for option, value in given.items():
            require(
                value is None,
                f"{option} says nothing of a run whose attention is 'key_driven': it is frozen in the groups that it "
                f"has; leave it out",
            )
        assert heads is not None
        return _frozen(model.attention, int(np.max(heads())))
    items, align = items or "kv", align is None or align
    source = dense_source(model, "asym_gqa")
    there, members = source.num_kv_heads, source.num_query_heads // source.num_kv_heads
    require(num_kv_heads is not None, "--to asym_gqa needs to know how many KV heads are left: add --num-kv-heads")
    assert num_kv_heads is not None
    require(
        0 < num_kv_heads <= there,
        f"--num-kv-heads={num_kv_heads} must lie between 1 and the run's num_kv_heads={there}: each new head takes the "
        f"place of one or more",
    )
    require(items in ITEMS, f"--items={items!r} is unknown: use one of {', '.join(ITEMS)}")
    if equal:
        check_kv_heads(source, num_kv_heads)
        require(
            max_group_size is None,
            f"--max-group-size={max_group_size} says nothing of groups of equal size: drop it, or --equal",
        )
    most = _most_heads(there, members, num_kv_heads, max_group_size)
    even = there % num_kv_heads == 0

    def layer(params: Params, calibration: Calibration, index: int) -> tuple[Params, str]:
        gaps = _gaps(params, calibration.moments, source, items, align)
        found = {"neighbours": neighbours(there, num_kv_heads)}
        if even:
            found["equal"] = best_groups(gaps, num_kv_heads, np.random.default_rng([seed, index]))
        if not equal:
            rng = np.random.default_rng([seed, index])
            found["unequal"] = best_groups(gaps, num_kv_heads, rng, most=most, start=found.get("equal"))
        *_, groups = found.values()
        costs = ", ".join(f"{name} {cost(gaps, own):.4f}" for name, own in found.items())
        sizes = " ".join(str(len(own) * members) for own in groups)
        ordered = _in_order(params, np.concatenate(groups))
        runs = np.split(np.arange(there), np.cumsum([len(own) for own in groups])[:-1])
        if align:
            ordered = aligned(ordered, runs, calibration.moments, source)
        if equal:
            result = pooled(ordered, np.stack(runs), "mean", model.init_std, np.random.default_rng())
        else:
            result = padded(ordered, runs, most)
        return result, f"groups of {sizes} query heads; J: {costs}"

    shared: dict[str, Any] = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    shared |= {"num_kv_heads": num_kv_heads}
    del shared["kind"]
    config = GQAConfig(**shared) if equal else AsymGQAConfig(max_group_size=most * members, **shared)
    options: dict[str, Any] = {"num_kv_heads": num_kv_heads, "align": align, "seed": seed}
    pools = num_kv_heads < there
    controls = {"neighbours": to_gqa(model, **options)} if pools and even else {}
    if controls and not equal:
        controls["equal groups"] = to_asym_gqa(model, items=items, equal=True, **options)
    return Conversion(
        config,
        layer,
        lossless=not pools,
        moments=True,
        controls=controls,
        finish=None if equal else trimmed,
        notes=(QK_NORM_NOTE,) if pools and align and source.qk_norm else (),
    )


def _frozen(source: KeyDrivenConfig, most: int) -> Conversion:
    """Returns a key-driven layer as the padded one with the same runs of query heads, the longest of them of `most`
    heads."""

    def layer(params: Params, calibration: Calibration, index: int) -> tuple[Params, str]:
        counts = params["heads"].astype(np.int64)
        runs = np.split(np.arange(counts.sum()), np.cumsum(counts)[:-1])
        alone = {path: x for path, x in params.items() if path not in ("heads", "key_norm", "steps")}
        for path, axis in (("q_proj.kernel", 1), ("q_proj.bias", 0), ("o_proj.kernel", 0)):
            if path in alone:
                shape = alone[path].shape
                alone[path] = alone[path].reshape(*shape[:axis], counts.sum(), 1, *shape[axis + 2 :])
        return in_places(alone, runs, most), f"groups of {' '.join(map(str, counts))} query heads"

    kept = {field.name for field in dataclasses.fields(AsymGQAConfig)} - {"kind", "max_group_size"}
    shared: dict[str, Any] = {name: getattr(source, name) for name in kept}
    return Conversion(AsymGQAConfig(max_group_size=most, **shared), layer, lossless=True)


def _most_heads(there: int, members: int, num_kv_heads: int, max_group_size: int | None) -> int:
    """Returns the most KV heads of a group, without places that no partition can fill."""
    least = -(-there // num_kv_heads)
    if max_group_size is None:
        most = max(2 * there // num_kv_heads, least)
    else:
        require(
            max_group_size >= least * members and max_group_size % members == 0,
            f"--max-group-size={max_group_size} must be a multiple of the {members} query heads of each of the run's "
            f"KV heads, and at least {least * members}, for {there} KV heads to fit into {num_kv_heads} groups",
        )
        most = max_group_size // members
    return min(most, there - num_kv_heads + 1)


def _gaps(params: Params, moments: np.ndarray, source: GQAConfig, items: Items, align: bool) -> np.ndarray:
    """Δ of a layer's KV heads."""
    keys = turned_in_planes if source.rope_theta is not None else turned
    overlaps = {
        "k_proj": keys if align and not source.qk_norm else unturned,
        "v_proj": turned if align else unturned,
    }
    if items == "weights":
        moments = np.eye(len(moments))
    if items in ("k", "v"):
        overlaps = {f"{items}_proj": overlaps[f"{items}_proj"]}
    gaps = [
        distances(pair_moments(moments, params[f"{name}.kernel"], params.get(f"{name}.bias")), overlap)
        for name, overlap in overlaps.items()
    ]
    return np.mean(gaps, axis=0)


def _in_order(params: Params, order: np.ndarray) -> Params:
    """Returns the same layer, its KV heads with their query heads in another order."""
    axes = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 0}
    result = dict(params)
    for name, axis in axes.items():
        result[f"{name}.kernel"] = np.take(params[f"{name}.kernel"], order, axis)
        if name != "o_proj" and f"{name}.bias" in params:
            result[f"{name}.bias"] = params[f"{name}.bias"][order]
    return result


def padded(params: Params, groups: Groups, most: int) -> Params:
    """Returns the layer with one KV head, the mean, in place of each group, and room for the query heads of `most`
    heads.

    Args:
      params: of a dense layer.
      groups: its KV heads.
      most: the size of the largest group, or more.
    """
    result = dict(params)
    for name in ("k_proj", "v_proj"):
        for path, axis in ((f"{name}.kernel", 1), (f"{name}.bias", 0)):
            if path in params:
                result[path] = np.stack([params[path].take(own, axis).mean(axis) for own in groups], axis)
    return in_places(result, groups, most)


def trimmed(params: Params, config: AttentionConfig) -> tuple[Params, AttentionConfig]:
    """Stacked layers with as many places in each group as the largest group of any layer has heads."""
    most = int(params["head_mask"].sum(axis=-1).max())
    axes = {"q_proj.kernel": 3, "q_proj.bias": 2, "o_proj.kernel": 2, "head_mask": 2}
    fewer = {path: x.take(range(most), axes[path]) if path in axes else x for path, x in params.items()}
    return fewer, dataclasses.replace(config, **{"max_group_size": most})


def in_places(params: Params, groups: Sequence[Sequence[int] | np.ndarray], most: int) -> Params:
    """Returns the layer with its query heads [d, n, M, D], in groups of the n, in padded places [d, G, most · M, D]."""
    result = dict(params)
    members = params["q_proj.kernel"].shape[2]
    for path, axis in (("q_proj.kernel", 1), ("q_proj.bias", 0), ("o_proj.kernel", 0)):
        if path in params:
            before, after = params[path].shape[:axis], params[path].shape[axis + 2 :]
            result[path] = np.zeros((*before, len(groups), most * members, *after))
            places = np.moveaxis(result[path], axis, 0)
            for place, own in zip(places, groups, strict=True):
                heads = params[path].take(np.asarray(own, np.int64), axis).reshape(*before, -1, *after)
                place[(slice(None),) * axis + (slice(len(own) * members),)] = heads
    sizes = np.array([len(own) * members for own in groups])
    result["head_mask"] = (np.arange(most * members) < sizes[:, None]).astype(np.float64)
    return result
