"""Places arrays on a mesh: the one table from the logical axes of arrays to the axes of the mesh.

A module states the logical axes of its parameters where it makes them, in its attribute `placement`: pairs of a
parameter's name and its axes. (They are not the parameters' metadata, which flax's bridge would give to Linen in
boxes.) A parameter that no module places is refused, for a guess could silently split it along the wrong axis.
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
"""Logical axis → the mesh axes that it is split over."""


def spec_of(axes: Sequence[str | None]) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


@dataclasses.dataclass(frozen=True)
class Placed:
    """Holds a variable of a module, and what its module says of it.

    Attributes:
      variable: a parameter or a buffer; abstract in an abstract module.
      axes: its logical axes, one for each axis of the array; None for a leading axis of stacked layers.
      exact: whether it is used in its own dtype whatever the computation's is, as the choice of experts depends on it.
    """

    variable: nnx.Variable
    axes: LogicalAxes
    exact: bool


def placed_variables(module: nnx.Module) -> dict[str, Placed]:
    """Returns path ("layers/attention/q_proj/kernel") → variable for all variables of a module, abstract or not.

    Raises:
      ValueError: neither a variable's module nor one around it places the variable.
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
    """Returns the NamedSharding of each leaf of a tree of parameters, or of arrays like them (moments, gradients).

    Scalars, and arrays of anything but floats (keys, counts), are replicated.

    Args:
      mesh: the mesh that the arrays are split over.
      tree: nested dictionaries, in which the path of each array ends with the whole path of a variable of `model`.
      model: the model, which may be abstract (`nnx.eval_shape`).

    Raises:
      ValueError: an array belongs to no variable of the model, or no module places a variable.
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
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
