"""Meshes, remat policies and microbatches by estimate: which fit, and which of these would be the fastest."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from gqe_jax.aot.topologies import Topology, topology
from gqe_jax.config import ConfigError, MeshConfig, RunConfig
from gqe_jax.parallel.rules import AXES
from gqe_jax.plan.compile import Request
from gqe_jax.plan.memory import estimate
from gqe_jax.plan.roofline import Roofline, expected_collectives, ici_seconds, likely_extents, roofline

FILL = 0.9  # of the memory: what the estimate may take, whose error is of that order
REMAT = ("none", "dots", "attention", "full")  # from the fewest products computed again to the least memory


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A variant of a request.

    Attributes:
      request: the variant.
      mesh: axis → devices.
      memory: estimated bytes of a device.
      times: estimated times of a step.
    """

    request: Request
    mesh: Mapping[str, int]
    memory: int
    times: Roofline

    @property
    def fits(self) -> bool:
        return self.memory <= FILL * topology(self.request.topology).generation.hbm

    def overrides(self, base: RunConfig) -> str:
        """Returns the arguments of the command line that make this variant of `base`."""
        config = self.request.config
        changed = {
            f"mesh.{axis}": size
            for axis, size in self.mesh.items()
            if getattr(base.mesh, axis) not in (size, -1)  # -1 becomes what is left in any case
        }
        if config.model.remat != base.model.remat:
            changed["model.remat"] = config.model.remat
        if config.train.accumulate != base.train.accumulate:
            changed["train.accumulate"] = config.train.accumulate
        if config.data.batch_size != base.data.batch_size:
            changed["data.batch_size"] = config.data.batch_size
        return " ".join(f"--config.{key}={value}" for key, value in changed.items()) or "as configured"


def candidate(request: Request, mesh: Mapping[str, int]) -> Candidate:
    """Returns a variant with its estimates."""
    where = topology(request.topology)
    sizes = request.config, mesh, request.mode, request.batch_size, request.seq_len
    expected = []
    if request.mode == "train":
        expected = expected_collectives(request.config, where, mesh, request.batch_size, request.seq_len)
    ici = ici_seconds(where, likely_extents(where, mesh), expected)
    times = roofline(request.config, where, mesh, *sizes[2:], ici)
    return Candidate(request, mesh, sum(estimate(*sizes).values()), times)


def search(request: Request) -> list[Candidate]:
    """Returns all sensible variants of a training step on its topology that should fit, the fastest first.

    The batch stays as it is. Ranked by the time if nothing overlaps.

    Raises:
      ConfigError: none of them fits.
    """
    base = request.config
    found = []
    for mesh in meshes(base, topology(request.topology), request.seq_len):
        rows = mesh["data"] * mesh["fsdp"]
        for remat, accumulate in itertools.product(REMAT, (1, 2, 4, 8, 16)):
            if request.batch_size % (accumulate * rows):
                continue
            variant = candidate(_variant(request, mesh=mesh, remat=remat, accumulate=accumulate), mesh)
            if variant.fits:
                found.append(variant)
    if not found:
        raise ConfigError(
            f"no mesh of {request.topology}, remat policy or number of microbatches makes {base.name} with "
            f"{request.batch_size} rows of {request.seq_len} tokens fit, by estimate: take a larger slice, or fewer or "
            f"shorter rows"
        )
    # Of one mesh the best alone; where two take the same time, the one that leaves more memory.
    found.sort(key=lambda variant: (variant.times.serial, variant.memory))
    best: dict[tuple[int, ...], Candidate] = {}
    for variant in found:
        best.setdefault(tuple(variant.mesh.values()), variant)
    return list(best.values())


def meshes(config: RunConfig, where: Topology, seq_len: int) -> Iterator[dict[str, int]]:
    """Meshes of all devices that split the model evenly, and rows into parts of at least 4096 tokens.

    Several slices lie along `data`: the other axes stay inside one.
    """
    model, devices = config.model, where.slice_devices
    for expert, context in itertools.product(_powers(model.attention.num_kv_heads), _powers(max(1, seq_len // 4096))):
        rest = devices // (expert * context)
        if devices % (expert * context) or model.d_ff % expert or model.vocab_size % expert or seq_len % (2 * context):
            continue
        for fsdp in _powers(rest):
            if model.d_model % (fsdp * context) == 0:
                yield dict(zip(AXES, (where.slices * rest // fsdp, fsdp, expert, context), strict=True))


def remedies(request: Request, mesh: Mapping[str, int]) -> list[Candidate]:
    """Variants that change one thing of a training step that does not fit, and should fit by estimate."""
    base = request.config
    rows = mesh["data"] * mesh["fsdp"]
    variants = []
    for remat in REMAT[REMAT.index(base.model.remat) + 1 :]:
        variants.append((_variant(request, mesh=mesh, remat=remat), mesh))
    for factor in (2, 4, 8, 16):
        accumulate = base.train.accumulate * factor
        if request.batch_size % (accumulate * rows) == 0:
            variants.append((_variant(request, mesh=mesh, accumulate=accumulate), mesh))
    others = [other for other in meshes(base, topology(request.topology), request.seq_len) if other != mesh]
    for other in others:
        if request.batch_size % (base.train.accumulate * other["data"] * other["fsdp"]) == 0:
            variants.append((_variant(request, mesh=other), other))
    smaller = request.batch_size // 2
    while smaller and smaller % (base.train.accumulate * rows) == 0:
        variants.append((_variant(request, mesh=mesh, batch_size=smaller), mesh))
        smaller //= 2
    fitting = [variant for variant in (candidate(*each) for each in variants) if variant.fits]
    kinds: dict[str, Candidate] = {}
    for variant in sorted(fitting, key=lambda variant: variant.times.serial / variant.request.batch_size):
        kinds.setdefault(_what_changed(base, variant), variant)
    return list(kinds.values())


def _what_changed(base: RunConfig, variant: Candidate) -> str:
    config = variant.request.config
    if config.model.remat != base.model.remat:
        return "remat"
    if config.train.accumulate != base.train.accumulate:
        return "accumulate"
    return "batch" if config.data.batch_size != base.data.batch_size else "mesh"


def _variant(
    request: Request,
    *,
    mesh: Mapping[str, int],
    remat: str | None = None,
    accumulate: int | None = None,
    batch_size: int | None = None,
) -> Request:
    config, rows = request.config, batch_size or request.batch_size
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(**mesh),
        model=dataclasses.replace(config.model, remat=remat or config.model.remat),
        train=dataclasses.replace(config.train, accumulate=accumulate or config.train.accumulate),
        data=dataclasses.replace(config.data, batch_size=rows),
    )
    return dataclasses.replace(request, config=config, batch_size=rows)


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, and that divide it if it is no power of two."""
    powers = [2**n for n in range(int(math.log2(largest)) + 1)]
    return [power for power in powers if largest % power == 0 or largest & (largest - 1) == 0]
