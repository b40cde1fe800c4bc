"""Checks the arguments of an attention layer's call before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention.caches import Cache
from gqe_jax.kernels.mesh_axes import check_not_explicit
from gqe_jax.parallel.on_mesh import axis_size

if TYPE_CHECKING:
    from gqe_jax.attention.base import Attention


def require_type(name: str, value: Any, kind: type, remedy: str) -> None:
    """Raises ValueError unless the argument called `name` is a `kind`."""
    if not isinstance(value, kind):
        shown = " ".join(repr(value).split())  # the repr of a random key has several lines
        raise ValueError(f"{name}={shown} is no {kind.__name__}: {remedy}")


def check_call(
    layer: Attention,
    x: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    cache: Cache | None,
    rngs: nnx.Rngs | None,
) -> None:
    """Raises ValueError unless the arguments of the layer's call fit the layer, each other and the mesh."""
    check_not_explicit(x=x)
    if x.ndim != 3 or x.shape[-1] != layer.d_model:
        raise ValueError(f"x has shape {x.shape}, but must be [B, S, d_model={layer.d_model}]")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, but must be [B, S] = {x.shape[:2]} like x")
    if positions is not None and (positions.shape[0] not in (1, x.shape[0]) or positions.shape[1:] != x.shape[1:2]):
        raise ValueError(
            f"positions has shape {positions.shape}, but must be [B or 1, S] with B, S = {x.shape[:2]} of x"
        )
    for name, ids in (("segment_ids", segment_ids), ("positions", positions)):
        if ids is not None and not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {ids.dtype}, but must be integers: pass {name}.astype('int32')")
    kernel_dtype = layer.o_proj.kernel[...].dtype
    dtype = jax.dtypes.canonicalize_dtype(layer.o_proj.dtype or jnp.promote_types(x.dtype, kernel_dtype))
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        raise ValueError(
            f"x has dtype {x.dtype} and the parameters {kernel_dtype}: this layer would compute in {dtype}, but "
            f"attention takes float32, bfloat16 or float16: cast x, or construct the layer with dtype=jnp.float32"
        )
    if rngs is not None:
        require_type("rngs", rngs, nnx.Rngs, "pass nnx.Rngs(router=key_or_seed), or None outside training")
    groups, expert, context = layer.config.num_kv_heads, axis_size("expert"), axis_size("context")
    if groups % expert:
        fits = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
        raise ValueError(
            f"num_kv_heads={groups} groups cannot be shared out over the {expert} devices of the mesh's `expert` "
            f"axis: sizes that work are {fits}"
        )
    if expert > 1 and layer.config.unsplit:
        raise ValueError(
            f"the mesh's `expert` axis of {expert} devices cannot share out the KV heads: {layer.config.unsplit}; give "
            f"its devices to `data` or `fsdp`"
        )
    rows = axis_size("data") * axis_size("fsdp")
    if x.shape[0] % rows:
        raise ValueError(
            f"B={x.shape[0]} rows cannot be shared out over the {rows} devices on `data` and `fsdp` of the mesh: "
            f"make B a multiple of {rows}, or give the devices to `expert`"
        )
    if cache is not None:
        cache.check(x.shape[0], layer.cached_shape, parts=expert)
    if context > 1 and cache is not None:
        raise ValueError(
            f"a cache is not split along the sequence, as the mesh's `context` axis of {context} devices would "
            f"have it: generate on a mesh with context=1, and give its devices to `expert` or `data`"
        )
    if x.shape[1] % (2 * context) and context > 1:
        raise ValueError(
            f"S={x.shape[1]} tokens do not divide into the {2 * context} chunks that the mesh's `context` axis of "
            f"{context} devices holds: pad the sequence to a multiple of {2 * context}"
        )
