"""Slices of TPUs that can be compiled for: their chips, how these are linked, and their devices without a TPU."""

import contextlib
import dataclasses
import math
import re

from gqe_jax.config import ConfigError
from gqe_jax.tpu import GENERATIONS, Generation, UnknownGeneration, find_generation


@dataclasses.dataclass(frozen=True)
class Topology:
    """Describes slices of one shape: chips of one generation, linked as a torus.

    Attributes:
      generation: of the chips.
      shape: chips along each dimension of a slice.
      slices: how many, joined by the data centre's network.
    """

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """The name of one slice as libtpu has it, "v5p:4x4x4"."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """"v5p:4x4x4", or "2 x v5p:4x4x4"."""
        return self.slice_name if self.slices == 1 else f"{self.slices} x {self.slice_name}"

    @property
    def slice_devices(self) -> int:
        """The number of devices of one slice."""
        return math.prod(self.shape) * self.generation.devices_per_chip

    @property
    def num_devices(self) -> int:
        return self.slices * self.slice_devices

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s that a device can send to other slices."""
        return self.generation.network_bandwidth / self.generation.devices_per_chip

    def axis_bandwidth(self, extents: tuple[int, ...]) -> float:
        """Bytes/s that a device can send along an axis of the mesh.

        Args:
          extents: over how many chips the axis stretches along each dimension of the slice.

        Collectives over the whole slice use the links of all its dimensions at a time, others one ring: both of its
        directions where it closes, as it does over two dimensions, or over one that goes round. Devices of one chip
        share its links; what they say to each other is taken to cost as much.
        """
        sizes = zip(extents, self.shape, strict=True)
        both_ways = [extent == size and extent % self.generation.wraps == 0 for extent, size in sizes]
        if tuple(extents) == self.shape:
            links = sum(1 + both for both in both_ways)
        else:
            links = 2 if any(both_ways) or sum(extent > 1 for extent in extents) > 1 else 1
        return links * self.generation.link_bandwidth / self.generation.devices_per_chip

    def devices(self) -> list:
        """JAX's devices of the slice, as they are on a machine that has it. In a child process only (`aot.child`)."""
        from jax.experimental import topologies

        options: dict[str, object] = {"chip_config_name": "megacore"} if self.generation.megacore else {}
        if math.prod(self.shape) == 1:  # libtpu's hosts have four chips otherwise
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.slices > 1:
            options["num_slices"] = self.slices
        return topologies.get_topology_desc(self.slice_name, platform="tpu", **options).devices


def smallest_slice(generation: str) -> Topology:
    """Returns the slice of one chip of a generation, by its name."""
    return topology(f"{generation}:{GENERATIONS[generation].slices[0]}")


def topology(name: str) -> Topology:
    """Returns the slice of that name, GENERATION:CHIPS, or several, "N x GENERATION:CHIPS".

    Raises:
      ConfigError: unknown; lists those that are known.
    """
    several = re.fullmatch(r"([1-9]\d{0,3}) x (.*)", name)
    slices, one = (int(several[1]), several[2]) if several else (1, name)
    spelled, _, shape = one.partition(":")
    with contextlib.suppress(UnknownGeneration):
        generation = find_generation(spelled)
        if shape in generation.slices:
            return Topology(generation, tuple(map(int, shape.split("x"))), slices)
    known = "\n".join(f"  {each.name}: {', '.join(each.slices)}" for each in GENERATIONS.values())
    raise ConfigError(f"--topology={name} is unknown: choose GENERATION:CHIPS from\n{known}")
