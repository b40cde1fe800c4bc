"""Where things live on a mesh: the one table from logical axes of arrays to axes of the mesh.

A module says the logical axes of its parameters where it makes them, in its attribute `placement`: pairs of a
parameter's name and its axes. (Not as the parameters' metadata: flax's bridge would hand those to Linen in boxes.) A
parameter that nobody places is refused, for a guess could split it silently in the wrong place.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context")

LogicalAxes = tuple[str | None, ...]

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


def spec_of(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes of an array → its PartitionSpec."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


@dataclasses.dataclass(frozen=True)
class Placed:
    """A variable of a module, and what its module says of it.

    Attributes:
      variable: a parameter or a buffer; abstract in an abstract module.
      axes: its logical axes, one for each axis of the array; those of layers, before the others, are not split.
      exact: it is used in its own dtype whatever the computation's is: the choice of experts hangs on it.
    """

    variable: nnx.Variable
    axes: LogicalAxes
    exact: bool


def placed_variables(module: nnx.Module) -> dict[str, Placed]:
    """Path ("layers/attention/q_proj/kernel") → variable of a module, abstract or not.

    Raises:
      ValueError: a variable that neither its module nor one around it places.
    """
    state = nnx.to_flat_state(nnx.state(module))
    return {"/".join(map(str, path)): _placed(module, path, variable) for path, variable in state}


def _placed(module: Any, path: tuple[Any, ...], variable: nnx.Variable) -> Placed:
    for depth, name in enumerate(path):
        stated = dict(getattr(module, "placement", ())).get("/".join(map(str, path[depth:])))
        if stated is not None:
            axes = (None,) * (variable.get_value().ndim - len(stated)) + tuple(stated)
            return Placed(variable, axes, exact=getattr(module, "exact", False))
        module = module[name] if isinstance(name, int) else getattr(module, name)
    raise ValueError(
        f"nobody says where the {type(variable).__name__} {'/'.join(map(str, path))} lies on a mesh: give its module "
        f"an attribute placement = ((name, axes),), with names of gqe_jax.parallel.rules.RULES or None for the axes"
    )


def state_shardings(mesh: Mesh, tree: Any, model: nnx.Module) -> Any:
    """NamedSharding of each leaf of a tree of the model's parameters, or of what has their paths (moments, gradients).

    Scalars, and arrays of anything but floats (keys, counts), are replicated.

    Args:
      mesh: over which they are split.
      tree: nested dictionaries, in which the path of each array ends with the whole path of a variable of `model`.
      model: may be abstract (`nnx.eval_shape`).

    Raises:
      ValueError: an array that is none of the model's, or a variable that nobody places.
    """
    variables = placed_variables(model)

    def sharding(path, leaf):
        if not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return replicated(mesh)
        return NamedSharding(mesh, spec_of(variables[_path_in(variables, path)].axes))

    return jax.tree.map_with_path(sharding, tree)


def _path_in(variables: Mapping[str, Placed], path: Sequence[Any]) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    for start in range(len(names)):
        if (name := "/".join(names[start:])) in variables:
            return name
    raise ValueError(f"the array {'/'.join(names)} is none of the model's variables: make both by one configuration")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())
