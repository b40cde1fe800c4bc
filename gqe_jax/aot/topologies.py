"""TPU generations and the slices of them that can be compiled for: memory, peaks, links.

Peak FLOPs, HBM and its bandwidth: the pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x" of cloud.google.com/tpu/docs,
per chip. Bandwidth of a link, each way: "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter 2; the Cloud
pages state the sum over a chip's links, both ways (v5e 400 GB/s, v5p 1200, v6e 800, TPU7x 1200), a little more.
"""

import dataclasses
import math

from gqe_jax.config import ConfigError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A generation, by what JAX counts as one device.

    Attributes:
      hbm: bytes of the chip's memory that belong to a device; programs get a little less (the compiler says how much).
      peak_flops: dense bf16 FLOP/s.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link between neighbouring chips, each way.
      matrix_unit: width of the matrix unit; a product over fewer elements leaves the rest of it idle.
      devices_per_chip: 2 where JAX sees a chip's two cores apart.
      wraps: chips along a dimension of a slice from which on, in multiples of it, the last is linked to the first.
      slices: sizes of the slices, in chips.
      options: further options of libtpu's topology.
    """

    hbm: int
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    matrix_unit: int
    devices_per_chip: int = 1
    wraps: int
    slices: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

CHIPS = {
    "v4": Chip(
        hbm=32 * GIB, peak_flops=275e12, hbm_bandwidth=1228e9, link_bandwidth=45e9, matrix_unit=128, wraps=4,
        slices=_CUBES, options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(
        hbm=16 * GIB, peak_flops=197e12, hbm_bandwidth=819e9, link_bandwidth=45e9, matrix_unit=128, wraps=16,
        slices=_FLAT,
    ),
    "v5p": Chip(
        hbm=95 * GIB, peak_flops=459e12, hbm_bandwidth=2765e9, link_bandwidth=90e9, matrix_unit=128, wraps=4,
        slices=_CUBES,
    ),
    "v6e": Chip(
        hbm=32 * GIB, peak_flops=918e12, hbm_bandwidth=1638e9, link_bandwidth=90e9, matrix_unit=256, wraps=16,
        slices=_FLAT,
    ),
    "tpu7x": Chip(
        hbm=96 * GIB, peak_flops=2307e12 / 2, hbm_bandwidth=7380e9 / 2, link_bandwidth=90e9, matrix_unit=256,
        devices_per_chip=2, wraps=4, slices=_CUBES[:8],
    ),
}  # fmt: skip
"""Generation → what its devices are."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: so many chips of a generation, linked as a torus.

    Attributes:
      name: as libtpu has it, "v5p:4x4x4".
      shape: chips along each dimension.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices_per_chip

    def axis_bandwidth(self, extents: tuple[int, ...]) -> float:
        """Bytes/s that a device can send along an axis of the mesh.

        Args:
          extents: over how many chips the axis stretches along each dimension of the slice.

        Collectives over the whole slice use the links of all its dimensions at a time, others one ring: both of its
        directions where it closes, as it does over two dimensions, or over one that goes round. Devices of one chip
        share its links; what they say to each other is taken to cost as much.
        """
        sizes = zip(extents, self.shape, strict=True)
        both_ways = [extent == size and extent % self.chip.wraps == 0 for extent, size in sizes]
        if tuple(extents) == self.shape:
            links = sum(1 + both for both in both_ways)
        else:
            links = 2 if any(both_ways) or sum(extent > 1 for extent in extents) > 1 else 1
        return links * self.chip.link_bandwidth / self.chip.devices_per_chip


def known_topologies() -> str:
    """The names, a generation on each line."""
    return "\n".join(f"  {name}: {', '.join(chip.slices)}" for name, chip in CHIPS.items())


def topology(name: str) -> Topology:
    """The slice of that name.

    Raises:
      ConfigError: unknown; lists those that are known.
    """
    generation, _, size = name.partition(":")
    chip = CHIPS.get(generation)
    if chip is None or size not in chip.slices:
        raise ConfigError(f"--topology={name} is unknown: choose GENERATION:CHIPS from\n{known_topologies()}")
    return Topology(name, chip, tuple(map(int, size.split("x"))))
