"""Makes the device mesh, checks that a model and a batch can be split over it, and puts batches on it."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from gqe_jax.config import ConfigError, MeshConfig, ModelConfig
from gqe_jax.parallel.rules import AXES, spec_of
from gqe_jax.parallel.zigzag import zigzag
from gqe_jax.rounding import round_up


def make_mesh(
    config: MeshConfig = MeshConfig(),
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (for JAX it is a variable)
) -> Mesh:
    """Makes the mesh ("data", "fsdp", "expert", "context") of all devices, or of those given.

    Every axis always exists, of size 1 where unused. Neighbours on the inner axes, which communicate in every layer,
    are neighbours in the machine. Several slices (groups of devices that only the data centre's network joins) lie
    along `data`, its outermost part.

    Raises:
      ConfigError: the product of the sizes is not the number of devices, or `data` does not hold all slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        if -1 in sizes.values():
            need, remedy = "a multiple of ", f"make the product of the others a divisor of {len(devices)}"
        else:
            need, remedy = "", f"make the product of the sizes {len(devices)}, or set one of them to -1 (what is left)"
        raise ConfigError(f"{asked} need {need}{fixed} devices, but there are {len(devices)}: {remedy}")
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if shape[0] % len(slices):
        raise ConfigError(
            f"mesh.data={shape[0]} is no multiple of the {len(slices)} slices, which lie along it: give the other axes "
            f"fewer devices"
        )
    within = (shape[0] // len(slices), *shape[1:])
    grid = np.concatenate([_grid(within, slices[index]) for index in sorted(slices)])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Arranges the devices of one slice."""
    if max(getattr(device, "core_on_chip", 0) for device in devices) == 0:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Two devices of a chip are joined by more than any link: they go to the innermost axis that is used.
    chips: dict[tuple[int, ...], _Chip] = {}
    for device in devices:
        chips.setdefault(tuple(device.coords), _Chip(device.coords)).devices.append(device)
    axis = max(place for place, size in enumerate(shape) if size % 2 == 0)
    halved = tuple(size // 2 if place == axis else size for place, size in enumerate(shape))
    grid = mesh_utils.create_device_mesh(halved, list(chips.values()), allow_split_physical_axes=True)
    pairs = np.array([chip.devices for chip in grid.flat]).reshape(*halved, 2)
    return np.moveaxis(pairs, -1, axis + 1).reshape(shape)


@dataclasses.dataclass
class _Chip:
    """Stands for the two devices of a chip where JAX arranges chips as a torus."""

    coords: Sequence[int]
    devices: list[Any] = dataclasses.field(default_factory=list)
    core_on_chip: int = 0
    device_kind: str = "chip"
    platform: str = "tpu"


def parse_mesh(text: str) -> MeshConfig:
    """Reads the text of `--mesh`, such as "fsdp=2,expert=4"; axes that it does not name have size 1.

    Raises:
      ConfigError: there is no such axis, or its size is no number.
    """
    sizes = dict.fromkeys(AXES, 1)
    for assignment in text.split(","):
        axis, _, size = assignment.partition("=")
        if axis not in sizes or not re.fullmatch(r"-?\d+", size):
            raise ConfigError(
                f"--mesh {text}: {assignment!r} is no AXIS=DEVICES: the axes are {', '.join(AXES)}, and -1 devices are "
                f"what the others leave, as in --mesh data=-1,expert=2"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def describe(mesh: Mesh) -> str:
    """Describes for the log the devices, and the axes that have more than one of them."""
    split = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}" + (f" ({split})" if split else "")


def check_model(mesh: Mesh, model: ModelConfig) -> None:
    """Raises ConfigError, listing all that does not divide, unless the parameters can be split over `mesh`."""
    groups, expert = model.attention.num_kv_heads, mesh.shape["expert"]
    spread = mesh.shape["fsdp"] * mesh.shape["context"]
    problems = []
    if groups % expert:
        fits = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
        problems.append(
            f"mesh.expert={expert} does not divide model.attention.num_kv_heads={groups}, whose groups it shares out: "
            f"set it to one of {fits}"
        )
    if expert > 1 and model.attention.unsplit:
        problems.append(f"mesh.expert={expert} cannot share out the KV heads: {model.attention.unsplit}; set it to 1")
    for name, size in (("d_ff", model.d_ff), ("vocab_size", model.vocab_size)):
        if size % expert:
            unused = " (the ids beyond the tokenizer's stay unused)" if name == "vocab_size" else ""
            problems.append(
                f"mesh.expert={expert} does not divide model.{name}={size}: the next that fits is "
                f"{round_up(size, expert)}{unused}"
            )
    for name, size in ({"d_model": model.d_model} | model.attention.spread_sizes).items():
        if size % spread:
            problems.append(
                f"mesh.fsdp={mesh.shape['fsdp']} × mesh.context={mesh.shape['context']}, over which parameters are "
                f"spread, do not divide model.{name}={size}: choose divisors of {size}"
            )
    if problems:
        raise ConfigError("; ".join(problems))


def check_batch(mesh: Mesh, batch_size: int, length: int) -> None:
    """Raises ConfigError unless `batch_size` rows of `length` tokens divide evenly over the devices."""
    rows, pieces = mesh.shape["data"] * mesh.shape["fsdp"], 2 * mesh.shape["context"]
    if batch_size % rows:
        raise ConfigError(
            f"data.batch_size={batch_size} (divided by train.accumulate where that is set) is not a multiple of the "
            f"{rows} devices that share a batch (mesh.data={mesh.shape['data']} × mesh.fsdp={mesh.shape['fsdp']}): "
            f"change data.batch_size, or give more devices to mesh.expert or mesh.context"
        )
    if mesh.shape["context"] > 1 and length % pieces:
        raise ConfigError(
            f"rows of {length} tokens do not divide into the 2 × mesh.context={pieces} pieces that the devices hold: "
            f"prepare rows of a multiple of {pieces} tokens, or lower mesh.context"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays [B, S]."""
    return NamedSharding(mesh, spec_of(("batch", "sequence")))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that this process has to read, ascending: its devices hold a part of each.

    Processes read the same rows where `expert` or `context` stretches over the devices of several.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size, mesh.shape["context"]))
    slices = [index[0] for index in places.values() if index is not None]
    return sorted({row for rows in slices for row in range(*rows.indices(batch_size))})


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes the global arrays [B, S], split over the devices, from the rows [b, S] that `local_rows` names.

    Where `context` splits the sequence, the tokens of a row are in the order of `zigzag` from here on.
    """
    sharding = batch_sharding(mesh)
    pieces, parts = mesh.shape["context"], mesh.shape["data"] * mesh.shape["fsdp"]

    def split(rows: np.ndarray) -> jax.Array:
        batch_size = len(rows) * parts // len(local_rows(mesh, parts))
        first = {row: place for place, row in enumerate(local_rows(mesh, batch_size))}

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return rows[first[start] : first[start] + stop - start, index[1]]

        return jax.make_array_from_callback((batch_size, rows.shape[1]), sharding, part)

    return {name: split(np.asarray(zigzag(rows, pieces))) for name, rows in batch.items()}
