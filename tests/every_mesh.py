"""Meshes of devices that are not here, made in a child process of `gqe_jax.aot.child`."""

import math

from gqe_jax.aot.topologies import Topology
from gqe_jax.config import MeshConfig
from gqe_jax.config_files import load_config
from gqe_jax.parallel.mesh import make_mesh
from gqe_jax.plan.search import meshes
from gqe_jax.tpu import GENERATIONS

LARGEST = 256  # devices of a slice: larger ones have the same dimensions, only longer


def proposed(generation: str, slices: int) -> int:
    """Makes every mesh that a search proposes for the generation's slices; returns how many.

    In each, every slice lies whole in one block of `data`, and where a chip has two devices they are neighbours on the
    innermost axis that can take them.
    """
    config = load_config("gqe_8b")
    made = set()
    for shape in GENERATIONS[generation].slices:
        where = Topology(GENERATIONS[generation], tuple(map(int, shape.split("x"))), slices)
        if where.slice_devices > LARGEST:
            continue
        devices = where.devices()
        for sizes in meshes(config, where, 65536):
            grid = make_mesh(MeshConfig(**sizes), devices).devices
            assert grid.shape == tuple(sizes.values()) and len(set(grid.flat)) == len(devices) == where.num_devices
            for index, block in enumerate(grid.reshape(slices, -1)):
                assert {getattr(device, "slice_index", 0) for device in block} == {index}
            if where.generation.devices_per_chip == 2:
                within = (grid.shape[0] // slices, *grid.shape[1:])
                axis = max(place for place, size in enumerate(within) if size % 2 == 0)
                pairs = grid.reshape(*grid.shape[:axis], -1, 2, math.prod(grid.shape[axis + 1 :]))
                for first, second in zip(pairs.take(0, axis + 1).flat, pairs.take(1, axis + 1).flat, strict=True):
                    assert first.coords == second.coords and first.core_on_chip != second.core_on_chip
            made.add((shape, *sizes.values()))
    return len(made)
