"""TPU generations: the one table of their names, their hardware and what their compiler and our kernels need to know.

Peaks, HBM and its bandwidth: the pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x" of cloud.google.com/tpu/docs, per
chip. Bandwidth of a link, each way: "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter 2; the Cloud
pages state the sum over a chip's links, both ways (v5e 400 GB/s, v5p 1200, v6e 800, TPU7x 1200), a little more. The
data centre's network: the page "TPU7x" gives 50 Gb/s a chip for v5p and 100 for v6e and TPU7x, the page "v5e" 6.4 Tb/s
for a pod of 256 chips; v4's is not published, and v5p's is taken. Matrix units and delay slots: compiled programs;
`aot/bundles.py` refuses a program whose branches have other slots.
"""

import dataclasses
from collections.abc import Mapping

GIB, MIB = 1 << 30, 1 << 20

LANES, SUBLANES = 128, 8
"""A vector register's columns and rows of 32 bits, on every generation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedBlocks:
    """Block sizes of the attention kernels with the best schedules, for bfloat16 and D = 128; tokens but for the flag.

    Attributes:
      rows: of queries in the forward kernel's memory: K times `block_q`.
      block_kv, tile, diagonal_part, ones_row: as in `kernels.tpu.blocks.BlockSizes`.
      backward_block, backward_piece: queries and keys of a block and of a piece of the backward kernel.
    """

    rows: int
    block_kv: int
    tile: int
    diagonal_part: int
    ones_row: bool
    backward_block: int
    backward_piece: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """A generation, by what JAX counts as one device: a chip, or one of its two cores where `devices_per_chip` is 2.

    Attributes:
      name: as libtpu's topologies have it.
      spellings: what else it is called.
      device_kinds: `jax.Device.device_kind` of its devices.
      peak_flops: dtype → dense FLOP/s of a device.
      hbm: bytes of the chip's memory that belong to a device; programs get a little less (the compiler says how much).
      hbm_bandwidth: bytes/s of a device.
      vmem: bytes of a core's vector memory; kernel_vmem: what of it a kernel may take.
      matrix_units: of a core; matrix_unit_width: rows and columns of one, a product over fewer leaves the rest idle;
        matrix_unit_rows: left-hand rows that one takes in a cycle.
      link_bandwidth: bytes/s of one link between neighbouring chips, each way; a chip has two links for each dimension
        of its slices.
      network_bandwidth: bytes/s that a chip can send to other slices, over the data centre's network.
      devices_per_chip: 2 where JAX sees a chip's two cores apart.
      megacore: whether a device is two cores that share a kernel's work.
      wraps: chips along a dimension of a slice from which on, in multiples of it, the last is linked to the first.
      slices: shapes of the slices, in chips, the smallest first.
      delay_slots: bundles behind a branch that execute whether it is taken or not.
      blocks: of the attention kernels.
    """

    name: str
    spellings: tuple[str, ...]
    device_kinds: tuple[str, ...]
    peak_flops: Mapping[str, float]
    hbm: int
    hbm_bandwidth: float
    vmem: int
    kernel_vmem: int
    matrix_units: int
    matrix_unit_width: int
    matrix_unit_rows: int
    link_bandwidth: float
    network_bandwidth: float
    devices_per_chip: int = 1
    megacore: bool = False
    wraps: int
    slices: tuple[str, ...]
    delay_slots: int
    blocks: TunedBlocks


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_BLOCKS_OF_128 = TunedBlocks(
    rows=1024, block_kv=16384, tile=1024, diagonal_part=128, ones_row=False, backward_block=1024, backward_piece=512
)
_BLOCKS_OF_256 = TunedBlocks(
    rows=2048, block_kv=16384, tile=2048, diagonal_part=256, ones_row=True, backward_block=1024, backward_piece=512
)

GENERATIONS: Mapping[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4", spellings=(), device_kinds=("TPU v4",),
            peak_flops={"bfloat16": 275e12, "int8": 275e12}, hbm=32 * GIB, hbm_bandwidth=1228e9,
            vmem=16 * MIB, kernel_vmem=14 * MIB, matrix_units=4, matrix_unit_width=128, matrix_unit_rows=1,
            link_bandwidth=45e9, network_bandwidth=6.25e9,
            megacore=True, wraps=4, slices=_CUBES, delay_slots=1,
            blocks=TunedBlocks(
                rows=512, block_kv=2048, tile=512, diagonal_part=128, ones_row=False, backward_block=512,
                backward_piece=512,
            ),
        ),
        Generation(
            name="v5e", spellings=("v5litepod", "v5 lite"), device_kinds=("TPU v5 lite", "TPU v5e"),
            peak_flops={"bfloat16": 197e12, "int8": 394e12}, hbm=16 * GIB, hbm_bandwidth=819e9,
            vmem=128 * MIB, kernel_vmem=100 * MIB, matrix_units=4, matrix_unit_width=128, matrix_unit_rows=1,
            link_bandwidth=45e9, network_bandwidth=3.125e9,
            wraps=16, slices=_FLAT, delay_slots=4, blocks=_BLOCKS_OF_128,
        ),
        Generation(
            name="v5p", spellings=("v5",), device_kinds=("TPU v5", "TPU v5p"),
            peak_flops={"bfloat16": 459e12, "int8": 918e12}, hbm=95 * GIB, hbm_bandwidth=2765e9,
            vmem=64 * MIB, kernel_vmem=60 * MIB, matrix_units=4, matrix_unit_width=128, matrix_unit_rows=1,
            link_bandwidth=90e9, network_bandwidth=6.25e9,
            megacore=True, wraps=4, slices=_CUBES, delay_slots=4, blocks=_BLOCKS_OF_128,
        ),
        Generation(
            name="v6e", spellings=("v6 lite", "trillium"), device_kinds=("TPU v6 lite", "TPU v6e"),
            peak_flops={"bfloat16": 918e12, "int8": 1836e12}, hbm=32 * GIB, hbm_bandwidth=1638e9,
            vmem=128 * MIB, kernel_vmem=100 * MIB, matrix_units=2, matrix_unit_width=256, matrix_unit_rows=2,
            link_bandwidth=90e9, network_bandwidth=12.5e9,
            wraps=16, slices=_FLAT, delay_slots=4, blocks=_BLOCKS_OF_256,
        ),
        Generation(
            name="tpu7x", spellings=("7x", "v7x", "ironwood"), device_kinds=("TPU7x",),
            peak_flops={"bfloat16": 2307e12 / 2, "float8_e4m3fn": 4614e12 / 2}, hbm=96 * GIB, hbm_bandwidth=7380e9 / 2,
            vmem=64 * MIB, kernel_vmem=60 * MIB, matrix_units=2, matrix_unit_width=256, matrix_unit_rows=2,
            link_bandwidth=90e9, network_bandwidth=12.5e9,
            devices_per_chip=2, wraps=4, slices=_CUBES[:9], delay_slots=6, blocks=_BLOCKS_OF_256,
        ),
    )
}  # fmt: skip
"""Name → generation."""


class UnknownGeneration(ValueError):
    """A TPU that has no row in `GENERATIONS`."""


def find_generation(name: str) -> Generation:
    """Returns the generation that `name` means: its name, another spelling, or a `device_kind` of JAX; case does not
    matter.

    Raises:
      UnknownGeneration: there is none; the message lists all names.
    """
    for generation in GENERATIONS.values():
        if name.lower() in map(str.lower, (generation.name, *generation.spellings, *generation.device_kinds)):
            return generation
    known = "; ".join(
        f"{x.name} (also {', '.join((*x.spellings, *x.device_kinds))})" for x in GENERATIONS.values()
    )
    raise UnknownGeneration(f"TPU generation {name!r} is unknown: use one of {known}")
