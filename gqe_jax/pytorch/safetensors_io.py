"""Safetensors files, one tensor in memory at a time: a folder's shards read and written without torch.

The format (huggingface.co/docs/safetensors): 8 bytes, little-endian, length of the header; the header, JSON, name →
{dtype, shape, data_offsets}; the tensors' bytes, row-major, back to back. A folder holds `model.safetensors`, or shards
and `model.safetensors.index.json` that says which tensor is in which. The library of that name writes a file from
tensors that are all in memory; here each is made when its turn comes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gqe_jax.checked_json import read_object
from gqe_jax.config import ConfigError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = 5 * 10**9  # bytes

FLOATING = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in FLOATING.items()}
# Of what else a file may hold, only the size is needed: to check the file, and to say what it is.
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
SIZES = OTHER_SIZES | {"U64": 8, "I64": 8} | {name: np.dtype(dtype).itemsize for name, dtype in FLOATING.items()}
LONGEST_HEADER = 10**8  # bytes; the library's own limit


class Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name, shape, dtype: as they will be stored.
      make: gives the values, of any floating dtype, when they are needed.
      source: tensors of the same source are written one after the other, wherever they lie.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    source: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """Where a tensor is: `dtype` as the format names it, `begin` in bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def rows(self, first: int, count: int) -> StoredTensor:
        """Reads a number of rows of the first axis."""
        shape = (count, *self.shape[1:])
        row = math.prod(self.shape[1:]) * SIZES[self.dtype]
        return StoredTensor(self.file, self.dtype, shape, self.begin + first * row)

    def read(self) -> np.ndarray:
        """Returns the tensor, of a floating dtype."""
        dtype = np.dtype(FLOATING[self.dtype])
        with self.file.open("rb") as file:
            file.seek(self.begin)
            values = np.fromfile(file, dtype, math.prod(self.shape))
        return values.reshape(self.shape)


# ---------------------------------------------------------------------------- writing


def write_weights(directory: Path, tensors: Sequence[Tensor], max_shard_size: int = MAX_SHARD_SIZE) -> list[str]:
    """Writes the tensors into `directory`: one file, or shards and an index above `max_shard_size` bytes.

    Returns:
      The names of the files, the index among them.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_files({directory / WEIGHTS_FILE: tensors})
        return [WEIGHTS_FILE]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    write_files({directory / name: shard for name, shard in zip(names, shards, strict=True)})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    return [*names, INDEX_FILE]


def write_files(files: Mapping[Path, Sequence[Tensor]]) -> None:
    """Writes each file, all headers first, then the tensors source by source."""
    places = [
        (tensor, path, begin) for path, tensors in files.items() for tensor, begin in _write_header(path, tensors)
    ]
    for tensor, path, begin in sorted(places, key=lambda place: place[0].source):
        values = _row_major(tensor.make(), tensor.dtype)
        assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(values.reshape(-1).view(np.uint8).data)


def _write_header(path: Path, tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Starts a file; returns each tensor and where it begins. Wide dtypes come first, so that all are aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = []
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = entry
        offsets.append((tensor, begin))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
    return [(tensor, 8 + len(text) + begin) for tensor, begin in offsets]


def _row_major(values: np.ndarray, dtype: np.dtype, block: int = 256) -> np.ndarray:
    """Returns the values in C order, of `dtype`. A transposed matrix is copied in blocks: four times as fast as in
    rows."""
    if values.ndim != 2 or values.flags.c_contiguous:
        return np.asarray(values, dtype, order="C")
    result = np.empty(values.shape, dtype)
    for i in range(0, values.shape[0], block):
        for j in range(0, values.shape[1], block):
            result[i : i + block, j : j + block] = values[i : i + block, j : j + block]
    return result


# ---------------------------------------------------------------------------- reading


def read_folder(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a folder, by name; reads headers only.

    Raises:
      ConfigError: no weights, pickles only, a damaged file, an index that points elsewhere or at what is not there.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return read_file(directory / WEIGHTS_FILE)
    index = directory / INDEX_FILE
    if not index.is_file():
        raise ConfigError(_no_weights(directory))
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ConfigError(
            f"{index} is no index of safetensors files (weight_map must be an object of texts): copy it again from "
            f"where the folder came from"
        )
    names = sorted(set(places.values()))
    # No path, link out of the folder aside (the Hub's cache consists of links), and nothing that no file is called.
    odd = [
        name for name in names if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable()
    ]
    if odd:
        raise ConfigError(
            f"{index} names {', '.join(map(repr, odd))}, but a shard is a .safetensors file in the same folder: do not "
            f"trust this folder, or correct its index"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ConfigError(f"{directory} lacks the shards {', '.join(missing)} that {INDEX_FILE} names: copy them too")
    stored = {name: tensor for shard in names for name, tensor in read_file(directory / shard).items()}
    absent = [f"{name} is not in {shard}" for name, shard in places.items() if name not in stored]
    if absent:
        raise ConfigError(f"{index} does not fit its shards ({'; '.join(absent)}): copy index and shards together")
    return stored


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, by name; reads the header only.

    Raises:
      ConfigError: a file that is cut off, is altered, or is none of this format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header should have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        begin = 8 + length
        stored = {}
        end = begin
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and 0 <= number <= size for number in (*shape, first, last)):
                raise ValueError(f"{name} has a shape or data_offsets that are no whole numbers up to the file's size")
            needed = math.prod(shape) * SIZES[entry["dtype"]]
            if begin + first != end or last - first != needed:
                raise ValueError(f"{name} lies at bytes {first} to {last}, and should have {needed}")
            stored[name] = StoredTensor(path, entry["dtype"], shape, begin + first)
            end = begin + last
        if end != size:
            what = "truncated" if size < end else "longer than its header says"
            raise ValueError(f"it is {what}: {size} bytes, {end} expected")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as a safetensors file ({error}): copy or download it again"
        ) from error
    return stored


PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_NEVER = "unpickling runs whatever code is in it, so gqe never does"


def refuse_pickle(path: Path) -> None:
    """Raises ConfigError, with the conversion to type, if `path` is a file that only unpickling can read."""
    if path.suffix in PICKLES:
        code = (
            f"import torch, safetensors.torch as s; w = torch.load({str(path)!r}, map_location='cpu', "
            f"weights_only=True); s.save_file({{n: t.clone().contiguous() for n, t in w.items()}}, "
            f"{str(path.with_suffix('.safetensors'))!r})"
        )
        raise ConfigError(
            f"{path} is a pickle, and {_NEVER}. Where PyTorch is, convert it with\n  python -c {shlex.quote(code)}"
        )


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    if not pickles:
        return (
            f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: give a folder that save_pretrained or gqe "
            f"export wrote"
        )
    code = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(directory)!r}, dtype='auto')"
        f".save_pretrained({f'{directory}-safetensors'!r})"
    )
    return (
        f"{directory} has its weights as a pickle ({', '.join(pickles)}), and {_NEVER}. Where PyTorch and transformers "
        f"are, convert it with\n  python -c {shlex.quote(code)}"
    )
