"""A whole model's parameters as PyTorch's tensors, one at a time, and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from gqe_jax.attention import Buffer
from gqe_jax.config import ModelConfig
from gqe_jax.models.transformer import abstract_model
from gqe_jax.parallel.rules import Placed, placed_variables
from gqe_jax.pytorch.names import (
    ATTENTION_PREFIX,
    ATTENTION_ROWS,
    BLOCK_PREFIX,
    BLOCK_ROWS,
    MODEL_ROWS,
    STACKED,
    Rows,
    TensorPart,
)
from gqe_jax.pytorch.safetensors_io import StoredTensor, Tensor


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of the PyTorch model, and the parts of our parameters that it is made of.

    Attributes:
      name: PyTorch's.
      shape: PyTorch's.
      parts: rows of the name table; their paths are whole ones.
      shapes: of the parts, without the axis of layers.
      layer: the slice of the stacked parameters; None outside the blocks.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]
    shapes: tuple[tuple[int, ...], ...]
    layer: int | None

    def gather(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Returns the tensor; `read` gives our parameters by path."""
        columns = [part.to_torch(self._slice(read(part.path))) for part in self.parts]
        return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)

    def scatter(self, value: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the tensor into our parameters, in place; each keeps its dtype."""
        begin = 0
        for part, shape in zip(self.parts, self.shapes, strict=True):
            end = begin + part.torch_shape(shape)[-1]
            self._slice(arrays[part.path])[...] = part.from_torch(value[..., begin:end], shape)
            begin = end

    def _slice(self, array: np.ndarray) -> np.ndarray:
        return array if self.layer is None else array[self.layer]


def torch_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[TorchTensor]:
    """Returns the tensors of the PyTorch model, in the order in which it computes.

    Args:
      shapes: path → shape of our parameters, the blocks' with their leading axis of layers; some of them will do.

    Raises:
      ValueError: a parameter that the name table does not know.
    """
    blocks = {path.removeprefix(f"{STACKED}."): shape for path, shape in shapes.items() if path.startswith(STACKED)}
    outside = {path: shape for path, shape in shapes.items() if not path.startswith(STACKED)}
    known = {part.path for rows in (BLOCK_ROWS, MODEL_ROWS) for parts in rows.values() for part in parts}
    unknown = sorted((blocks.keys() | outside.keys()) - known)
    if unknown:
        raise ValueError(f"PyTorch's names are not known for the parameters {', '.join(unknown)}")
    embedding, *last = _tensors(MODEL_ROWS, outside, "", None) or [None]
    result = [embedding] if embedding else []
    num_layers = next(iter(blocks.values()))[0] if blocks else 0
    one = {path: shape[1:] for path, shape in blocks.items()}
    for layer in range(num_layers):
        result += _tensors(BLOCK_ROWS, one, BLOCK_PREFIX.format(layer=layer), layer)
    return result + last


def _tensors(rows: Rows, shapes: Mapping[str, tuple[int, ...]], prefix: str, layer: int | None) -> list[TorchTensor]:
    result = []
    for name, parts in rows.items():
        parts = tuple(part for part in parts if part.path in shapes)
        if parts:
            ours = tuple(shapes[part.path] for part in parts)
            folded = [part.torch_shape(shape) for part, shape in zip(parts, ours, strict=True)]
            shape = *folded[0][:-1], sum(shape[-1] for shape in folded)
            if layer is not None:
                parts = tuple(TensorPart(f"{STACKED}.{part.path}", part.axes) for part in parts)
            result.append(TorchTensor(prefix + name, shape, parts, ours, layer))
    return result


def abstract_parameters(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape and dtype of a model's parameters, the biases of loss-free balancing among them."""
    return {path: placed.variable.get_value() for path, placed in _variables(config).items()}


def exact_parameters(config: ModelConfig) -> set[str]:
    """Paths of the parameters and buffers that keep their dtype in an export: the choice of experts hangs on them."""
    return {
        path for path, placed in _variables(config).items() if placed.exact or isinstance(placed.variable, Buffer)
    }


def _variables(config: ModelConfig) -> dict[str, Placed]:
    return {path.replace("/", "."): placed for path, placed in placed_variables(abstract_model(config)).items()}


def to_write(
    config: ModelConfig, read: Callable[[str], np.ndarray], dtype: np.dtype | None, *, zero_biases: bool = False
) -> list[Tensor]:
    """Returns the tensors to export, made one by one when they are written.

    The router's stay float32 whatever `dtype` is: it computes in float32, and rounding would change its choices. A
    router without parameters ("fixed", "random") gets a weight of zeros, as in `layer_to_torch`.

    Args:
      config: of the model.
      read: path → parameter, with its axis of layers; asked for each path once, or a few times if that is cheap.
      dtype: of the tensors; None: the parameters' own.
      zero_biases: give the attention's projections that have no bias one of zeros, for a class that has all or none.
    """
    abstract, exact = abstract_parameters(config), exact_parameters(config)
    result = []
    tensors = torch_tensors({path: leaf.shape for path, leaf in abstract.items()})
    for tensor in tensors:
        path = tensor.parts[0].path
        own = np.dtype(abstract[path].dtype)
        own = np.dtype(np.float32) if own.kind in "biu" else own
        target = own if dtype is None or path in exact else np.dtype(dtype)
        make = functools.partial(tensor.gather, read)
        result.append(Tensor(tensor.name, tensor.shape, target, make, source=tensor.parts[0].path))
    for name, shape in _zeros(config, tensors, zero_biases):
        target = np.dtype(np.float32 if ".router." in name else dtype or config.param_dtype)
        result.append(Tensor(name, shape, target, functools.partial(np.zeros, shape, target)))
    return result


def _zeros(
    config: ModelConfig, tensors: Sequence[TorchTensor], zero_biases: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Returns names and shapes of exported tensors of zeros, which correspond to none of our parameters."""
    attention = config.attention
    for layer in range(config.num_layers):
        prefix = ATTENTION_PREFIX.format(layer=layer)
        yield from ((prefix + name, shape) for name, shape in attention.zero_tensors(config.d_model).items())
        if zero_biases:
            own = {tensor.name.removeprefix(prefix): tensor.shape for tensor in tensors if tensor.layer == layer}
            biases = {name: f"{name.removesuffix('.weight')}.bias" for name in own if name.endswith(".weight")}
            for name, bias in biases.items():
                if bias in ATTENTION_ROWS and bias not in own:
                    yield prefix + bias, own[name][:1]


def parameter_bytes(abstract: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Size of the parameters, which are given by path."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())


def fill(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Sequence[TorchTensor],
    stored: Mapping[str, StoredTensor],
    look: Callable[[str, np.ndarray], None] = lambda name, value: None,
) -> dict[str, jax.Array]:
    """Path → array, filled in the order in which the tensors lie on disk: one of them in memory at a time.

    `look` is called with each tensor's name and value.
    """
    arrays = {path: _untouched_zeros(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    places = {tensor.name: (stored[tensor.name].file, stored[tensor.name].begin) for tensor in tensors}
    for tensor in sorted(tensors, key=lambda tensor: places[tensor.name]):
        value = stored[tensor.name].read()
        look(tensor.name, value)
        tensor.scatter(value, arrays)
        del value
    return {path: jax.device_put(array) for path, array in arrays.items()}


def _untouched_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX takes over without a copy (aligned to 64 bytes), and of which only what is written exists."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + 64, np.uint8)
    begin = -buffer.ctypes.data % 64
    return buffer[begin : begin + size].view(dtype).reshape(shape)
