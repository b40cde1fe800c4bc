"""The one table of where things live: logical axes of arrays → axes of the mesh."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "group": "expert",  # KV heads, each with all its query experts: routing and cache need no communication
    "hidden": "expert",
    "vocabulary": "expert",
    "embed": ("fsdp", "context"),  # of parameters, which are gathered where they are used
    "partial": "expert",  # summands of a result, one for each part of `expert`
    None: None,
}
"""Logical axis → mesh axes it is split over."""

PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocabulary", "embed"),
    "lm_head": ("vocabulary", "embed"),
    "q_proj/kernel": ("embed", "group", None, None),
    "q_proj/bias": ("group", None, None),
    "k_proj/kernel": ("embed", "group", None),
    "k_proj/bias": ("group", None),
    "v_proj/kernel": ("embed", "group", None),
    "v_proj/bias": ("group", None),
    "q_norm/scale": (None,),
    "k_norm/scale": (None,),
    "o_proj/kernel": ("group", None, None, "embed"),
    "o_proj/bias": (None,),
    "q_shared/kernel": ("embed", None),
    "q_shared/bias": (None,),
    "o_extra/kernel": (None, None, "embed"),
    "router/proj/kernel": ("embed", "group", None),
    "router/bias": ("group", None),
    "gate_proj/kernel": ("embed", "hidden"),
    "up_proj/kernel": ("embed", "hidden"),
    "down_proj/kernel": ("hidden", "embed"),
    "attention_norm/scale": (None,),
    "mlp_norm/scale": (None,),
    "final_norm/scale": (None,),
}
"""End of a parameter's path → its logical axes; blocks that are stacked have an axis of layers before them."""

EXACT = frozenset({"router/proj/kernel"})
"""Parameters gathered in their own dtype: the choice of experts hangs on them."""


def spec_of(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes of an array → its PartitionSpec."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def parameter_name(path: Sequence[Any]) -> str:
    """The end of the tree path `path` that `PARAMETERS` knows.

    Raises:
      KeyError: it knows none.
    """
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    names = [name for name in names if name not in ("value", "raw_value")]
    for length in (3, 2, 1):
        if (name := "/".join(names[-length:])) in PARAMETERS:
            return name
    raise KeyError(f"no sharding rule for the parameter {'/'.join(names)}: add it to gqe_jax.parallel.rules.PARAMETERS")


def parameter_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of a parameter; an axis of layers before them is not split."""
    axes = PARAMETERS[name]
    return (None,) * (ndim - len(axes)) + axes


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of each leaf of a tree of parameters, or of what has their paths (moments, gradients).

    Scalars, and arrays of anything but floats (keys, counts), are replicated.
    """

    def sharding(path, leaf):
        if not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return replicated(mesh)
        return NamedSharding(mesh, spec_of(parameter_axes(parameter_name(path), leaf.ndim)))

    return jax.tree.map_with_path(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())
