"""Reads what arrays' types say of a mesh: the axes they vary along inside `jax.shard_map`, and explicit axes.

Inside `shard_map` a loop's carry must vary along the same axes before and after a step. Zeros vary along none until
they are told to. Outside, and inside with check_vma=False, there are no such axes and nothing happens.
"""

from typing import Any

import jax
from jax.experimental import checkify


def varying_axes(tree: Any) -> tuple[str, ...]:
    """Returns the axes of the mesh along which some array of `tree` varies."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return tuple(sorted({axis for array in arrays for axis in jax.typeof(array).manual_axis_type.varying}))


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns the same arrays with types that vary along all of `axes`."""

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def result(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of a Pallas call's result that varies along the same axes as `like`, an array or a type."""
    kind = like.manual_axis_type if isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def check_not_explicit(**arrays: jax.Array) -> None:
    """Raises ValueError for an array, by name, that is split over an axis of a mesh with explicit sharding."""
    for name, x in arrays.items():
        sharding = jax.typeof(x).sharding
        kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        parts = (part if isinstance(part, tuple) else (part,) for part in sharding.spec)
        used = [axis for part in parts for axis in part if axis is not None]
        if explicit := [axis for axis in used if kinds[axis] == jax.sharding.AxisType.Explicit]:
            raise ValueError(
                f"{name} is split over the explicit mesh axes {', '.join(explicit)}: attention takes automatic axes, "
                f"or a jax.shard_map around it: make the mesh with gqe_jax.make_mesh, or with "
                f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(kinds)})"
            )


def debug_check(holds: jax.Array, message: str, **values: jax.Array) -> None:
    """Calls `checkify.debug_check` where there is no mesh of several devices.

    Under `jax.set_mesh` checkify cannot carry an error into or out of `jax.shard_map` (jax-ml/jax issue 40907): one
    check would make the whole computation fail to trace.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:  # 0: there is none
        checkify.debug_check(holds, message, **values)
