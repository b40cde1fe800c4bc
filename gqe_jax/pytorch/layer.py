"""One attention layer's parameters as a PyTorch state dict, and back. Needs no torch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.attention import Attention, Buffer
from gqe_jax.pytorch.names import ATTENTION_ROWS, TensorPart


def layer_to_torch(layer: Attention) -> dict[str, np.ndarray]:
    """Returns the parameters under PyTorch's names and in its layout, for all kinds of attention here.

    | name | shape | |
    |---|---|---|
    | `q_proj.weight` | [N·D, d] | rows ordered g, m, D; N = G·M experts, or the query heads of a dense layer |
    | `k_proj.weight`, `v_proj.weight` | [G·D, d] | |
    | `o_proj.weight` | [d, slots·D] | columns: routed slots by g, k; ō; shared head (dense: heads) |
    | `q_norm.weight`, `k_norm.weight` | [D] | with QK norm |
    | `router.weight` | [G·M, d] | GQE |
    | `q_shared.weight` | [D, d] | variant "gqe" |
    | `head_mask` | [G, R] | unequal groups: 1 where a place of a group holds a head |
    | `heads_per_kv`, `key_norm`, `allocation_steps` | [G], [G], [1] | key-driven: runs of query heads, and state |
    | `router.bias_correction` | [G·M] | loss-free balancing: added to the probabilities for the selection only |
    | `kv_down.weight`, `k_rope.weight` | [r, d], [R, d] | MLA, which has no k_proj and v_proj |
    | `k_up.weight`, `v_up.weight` | [G·D, r] | MLA, whose q_proj has H·(D + R) rows |
    | `latent_norm.weight` | [r] | MLA with a norm of the latent |

    With `bias`, `q_proj.bias`, `k_proj.bias`, `v_proj.bias`, `o_proj.bias` and `q_shared.bias` stand beside them. A
    dense layer's names and shapes are those of a Llama (with QK norm: Qwen3) attention block.

    The router kinds "fixed" and "random" have no parameters; they get a `router.weight` of zeros. With it all
    probabilities tie, and ties resolve to the lower index: for "fixed" that is the same layer. The names cannot say
    "random": whoever loads them without the configuration computes the "fixed" layer.

    Returns:
      name → array in the parameter's own dtype (bfloat16 is `ml_dtypes.bfloat16`); float32 for truth values and counts.

    Raises:
      ValueError: a parameter that the name table does not know (a kind of attention without this layout).
    """
    variables = _variables(layer)
    state = {}
    for name, parts in _rows(variables).items():
        columns = [part.to_torch(np.asarray(variables[part.path].get_value())) for part in parts]
        state[name] = np.ascontiguousarray(np.concatenate(columns, axis=-1))
    for name, shape in layer.config.zero_tensors(layer.d_model).items():
        state[name] = np.zeros(shape, np.float32)
    return state


def layer_from_torch(layer: Attention, state: Mapping[str, Any]) -> None:
    """Sets the parameters of `layer`, in place, to a PyTorch state dict with the names of `layer_to_torch`.

    Each parameter keeps its dtype and its placement on devices; one that is not bound to a device stays unbound.

    Args:
      layer: of the shape that the state was made for.
      state: name → array: numpy, anything that `np.asarray` takes, or a torch tensor on any device (bfloat16 too).
        `router.weight` of a layer whose router is not learned must be zero, or be left out.

    Raises:
      ValueError: missing, unexpected or misshaped tensors, all listed; the layer is then as it was before.
    """
    variables = _variables(layer)
    rows = _rows(variables)
    wanted = {name: _torch_shape(parts, variables) for name, parts in rows.items()}
    arrays = {name: _to_numpy(value) for name, value in state.items()}
    problems = []
    for name, shape in layer.config.zero_tensors(layer.d_model).items():
        zeros = arrays.pop(name, np.zeros(shape, np.float32))
        if zeros.shape != shape:
            problems.append(f"{name} has shape {zeros.shape}, expected {shape}")
        elif zeros.any():
            problems.append(f"{name} is not zero, but this layer has no parameter for it ({layer.config.summary})")
    problems += [f"{name} is missing, expected shape {wanted[name]}" for name in wanted if name not in arrays]
    for name, array in arrays.items():
        if name not in wanted:
            problems.append(f"{name} is unexpected (shape {array.shape})")
        elif array.shape != wanted[name]:
            problems.append(f"{name} has shape {array.shape}, expected {wanted[name]}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{name} has dtype {array.dtype}, expected floating point")
    if problems:
        raise ValueError(
            f"the state does not fit this {type(layer).__name__}; make the layer with the sizes and options that the "
            f"state was made for:\n  " + "\n  ".join(problems)
        )
    values = {}
    for name, parts in rows.items():
        shapes = [variables[part.path].shape for part in parts]
        ends = np.cumsum([part.torch_shape(shape)[-1] for part, shape in zip(parts, shapes, strict=True)])
        columns = np.split(arrays[name], ends[:-1], axis=-1)
        for part, column, shape in zip(parts, columns, shapes, strict=True):
            old = variables[part.path].get_value()
            value = part.from_torch(column, shape).astype(old.dtype)
            # Where nobody has placed the parameter, JAX stays free to move it to the devices of a mesh.
            placed = old.sharding if getattr(old, "committed", True) else None
            values[tuple(part.path.split("."))] = jax.device_put(value, placed)
    nnx.update(layer, nnx.traversals.unflatten_mapping(values))


def _variables(layer: Attention) -> dict[str, nnx.Variable]:
    state = nnx.to_flat_state(nnx.state(layer, nnx.Any(nnx.Param, Buffer)))
    return {".".join(path): variable for path, variable in state}


def _rows(variables: dict[str, nnx.Variable]) -> dict[str, tuple[TensorPart, ...]]:
    """Returns the rows of the table that a layer has, with the parts that it has."""
    rows = {name: tuple(part for part in parts if part.path in variables) for name, parts in ATTENTION_ROWS.items()}
    unknown = variables.keys() - {part.path for parts in rows.values() for part in parts}
    if unknown:
        raise ValueError(f"PyTorch's names are not known for the parameters {', '.join(sorted(unknown))}")
    return {name: parts for name, parts in rows.items() if parts}


def _torch_shape(parts: tuple[TensorPart, ...], variables: dict[str, nnx.Variable]) -> tuple[int, ...]:
    shapes = [part.torch_shape(variables[part.path].shape) for part in parts]
    return *shapes[0][:-1], sum(shape[-1] for shape in shapes)


def _to_numpy(value: Any) -> np.ndarray:
    # torch is known by its methods, so that it need not be imported (or installed). Its bfloat16 has no numpy
    # equivalent in torch's eyes; float32 holds every bfloat16 exactly.
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
    return np.asarray(value)
