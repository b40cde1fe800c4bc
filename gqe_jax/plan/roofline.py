"""How long a step takes at least: its arithmetic, its traffic with HBM and its collectives, each at the chip's peak.

What is assumed:

- Matrix products run at the peak; those of attention over the head dimension leave the rest of a wider matrix unit
  idle. The backward pass takes twice the forward's products, attention's 2.5 times (scores are computed again); what
  remat computes again is counted. Norms, rotary embedding, softmax and the optimizer's arithmetic are not.
- HBM: weights are read by each pass, a layer's results written once and read once, the optimizer's state read and
  written once a step.
- ICI: one ring through the devices of an axis, of all links if the axis covers the whole slice
  (`topologies.Topology.axis_bandwidth`); collectives one after another. What devices pass on to their neighbours
  goes one way round, over one link.
- Several slices: gradients are summed within each slice first, then over the slices, at the network's bandwidth.

If everything overlaps, a step takes as long as the longest of the three; if nothing does, as long as their sum.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from gqe_jax.aot.topologies import Topology
from gqe_jax.config import ModelConfig, RunConfig
from gqe_jax.flops import ForwardFlops, decode_flops, forward_flops, parameter_count
from gqe_jax.plan import Mode
from gqe_jax.plan.collectives import NETWORK, Collective
from gqe_jax.plan.memory import activation_width, compute_bytes, gathered_keys, tokens_per_device
from gqe_jax.rounding import ceil_div


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of one step on one device.

    Attributes:
      matmul, attention: of the products with weights, and of queries, keys and values.
      hbm: of reading and writing.
      ici: axes of the mesh → of their collectives.
      model_flops: that the model asks for, of all devices: numerator of MFU.
      peak_flops: of all devices, per second.
    """

    matmul: float
    attention: float
    hbm: float
    ici: Mapping[tuple[str, ...], float]
    model_flops: float
    peak_flops: float

    @property
    def compute(self) -> float:
        return self.matmul + self.attention

    @property
    def overlapped(self) -> float:
        """Seconds of a step if arithmetic, HBM and ICI all work at the same time."""
        return max(self.compute, self.hbm, sum(self.ici.values()))

    @property
    def serial(self) -> float:
        """Seconds of a step if arithmetic, HBM and ICI work one after the other."""
        return self.compute + self.hbm + sum(self.ici.values())

    def mfu(self, seconds: float) -> float:
        return self.model_flops / (seconds * self.peak_flops)


def roofline(
    config: RunConfig,
    topology: Topology,
    mesh: Mapping[str, int],
    mode: Mode,
    batch_size: int,
    seq_len: int,
    ici: Mapping[tuple[str, ...], float],
) -> Roofline:
    """Returns the terms of a step; `ici` are the seconds of its collectives (`ici_seconds`)."""
    model, chip = config.model, topology.generation
    flops = step_flops(model, mode, batch_size, seq_len)
    attention = flops.attention + flops.shared_head
    products = flops.total - attention
    if mode == "train":
        remat = model.remat
        again = flops.logits  # a chunk's logits are always computed again
        if remat in ("attention", "full"):
            again += flops.projections + flops.router + flops.mlp * 2 // 3  # the last product of a layer is not needed
        products, scores = 3 * products + again, (4.5 if remat == "full" else 3.5) * attention
        if mesh["context"] > 1 and not gathered_keys(config, mesh, batch_size, seq_len):
            scores += attention  # a ring's backward pass computes it once more
    else:
        scores = attention
    devices, peak_flops = topology.num_devices, chip.peak_flops["bfloat16"]
    width = max(1.0, chip.matrix_unit_width / model.attention.head_dim)
    return Roofline(
        matmul=products / devices / peak_flops,
        attention=scores * width / devices / peak_flops,
        hbm=hbm_bytes(config, mesh, mode, batch_size, seq_len) / chip.hbm_bandwidth,
        ici=ici,
        model_flops=(3 if mode == "train" else 1) * flops.total,
        peak_flops=devices * peak_flops,
    )


def step_flops(model: ModelConfig, mode: Mode, batch_size: int, seq_len: int, kind: str = "active") -> ForwardFlops:
    """FLOPs of the forward pass of a step, by part: of whole rows, of prompts with the logits of their last tokens, or
    of one token behind `seq_len` - 1 others in each row."""
    if mode == "decode":
        one = decode_flops(model, seq_len, kind)
    else:
        one = forward_flops(model, seq_len, kind)
        if mode == "prefill":
            one = dataclasses.replace(one, logits=one.logits // seq_len)
    return ForwardFlops(*(batch_size * part for part in dataclasses.astuple(one)))


def hbm_bytes(config: RunConfig, mesh: Mapping[str, int], mode: Mode, batch_size: int, seq_len: int) -> int:
    """Bytes that a device reads from and writes to its memory in a step."""
    model, expert = config.model, mesh["expert"]
    item = compute_bytes(model)
    parameters = parameter_count(model)["total"] // expert
    if mode != "train":
        rows = ceil_div(batch_size, mesh["data"] * mesh["fsdp"])
        cache = item * model.num_layers * rows * seq_len * model.attention.cached_numbers(expert)
        tokens = rows * (1 if mode == "decode" else seq_len)
        return item * parameters + cache + 2 * model.num_layers * tokens * activation_width(model, "none", expert)
    rows, tokens = tokens_per_device(mesh, batch_size // config.train.accumulate, seq_len)
    again = model.remat in ("attention", "full")
    results = model.num_layers * rows * tokens * activation_width(model, "none", expert)
    passes = 2 + again  # forward, again, backward
    logits = 4 * rows * tokens * model.vocab_size // expert
    a_microbatch = item * parameters * passes + 2 * results * (passes + 1) + 6 * logits
    shard = parameters // (mesh["fsdp"] * mesh["context"])
    a_microbatch += 8 * shard if config.train.accumulate == 1 else 16 * shard  # gradients
    return config.train.accumulate * a_microbatch + 28 * shard  # parameters, two moments, both ways; gradients once


def ici_seconds(
    topology: Topology, extents: Mapping[str, Sequence[int]], collectives: Sequence[Collective]
) -> dict[tuple[str, ...], float]:
    """Axes → seconds of the collectives over them."""
    seconds: dict[tuple[str, ...], float] = {}
    for collective in collectives:
        if collective.axes == NETWORK:
            bandwidth = topology.network_bandwidth
        else:
            axes = collective.axes or tuple(extents)
            stretch = tuple(math.prod(sizes) for sizes in zip(*(extents[axis] for axis in axes), strict=True))
            bandwidth = topology.axis_bandwidth(tuple(map(min, stretch, topology.shape)))
            if collective.kind == "collective-permute":
                bandwidth = min(bandwidth, topology.generation.link_bandwidth / topology.generation.devices_per_chip)
        seconds[collective.axes] = seconds.get(collective.axes, 0.0) + collective.sent / bandwidth
    return seconds


def expected_collectives(
    config: RunConfig, topology: Topology, mesh: Mapping[str, int], batch_size: int, seq_len: int
) -> list[Collective]:
    """Returns the large collectives of a training step, from the configuration alone; a compiled step's are read from
    it."""
    model, parts = config.model, config.train.accumulate
    expert, context = mesh["expert"], mesh["context"]
    item = compute_bytes(model)
    parameters = parameter_count(model)["total"] // expert
    rows, tokens = tokens_per_device(mesh, batch_size // config.train.accumulate, seq_len)
    again = model.remat in ("attention", "full")
    hidden = item * rows * tokens * model.d_model
    keys = item * rows * seq_len * model.attention.attended_numbers(expert)
    passes = 2 + again

    within = mesh | {"data": mesh["data"] // topology.slices, NETWORK[0]: topology.slices}

    def ring(kind, axes, count, size, rounds):
        devices = math.prod(within[axis] for axis in axes)
        return Collective(
            kind=kind, axes=axes, count=count, hidden=0, size=count * size,
            sent=round(rounds * count * size * (devices - 1) / devices),
        )  # fmt: skip

    found = []
    split = tuple(axis for axis in ("fsdp", "context") if mesh[axis] > 1)
    pieces = mesh["fsdp"] * context
    if split:
        whole = pieces == topology.slice_devices  # over all dimensions of a torus XLA makes all-reduces of these
        found.append(ring("all-gather", split, 2 * parts, item * parameters, 1 + whole))
        found.append(ring("reduce-scatter", split, parts, item * parameters, 1 + whole))
    for axes in (("data",), NETWORK):
        if within[axes[0]] > 1:
            found.append(ring("all-reduce", axes, parts, (item if split else 4) * parameters // pieces, 2))
    if expert > 1:
        found.append(ring("all-reduce", ("expert",), parts * model.num_layers * 2 * passes, hidden, 2))
    layers = parts * model.num_layers
    if context > 1 and gathered_keys(config, mesh, batch_size, seq_len):  # their gradients are scattered
        found.append(ring("all-gather", ("context",), layers * (passes + 1), keys, 1))
    elif context > 1:  # backward they go round once more, with their gradients, twice as wide
        found.append(ring("collective-permute", ("context",), layers * (passes + 2), keys, 1))
    return found


def likely_extents(topology: Topology, mesh: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Axis → chips along each dimension of the slice, the innermost axis placed first, without asking JAX."""
    free, cores = list(topology.shape), topology.generation.devices_per_chip
    extents = {}
    for axis in reversed(list(mesh)):
        left = mesh[axis] // (topology.slices if axis == "data" else 1)
        if cores > 1 and left % cores == 0:  # the devices of a chip go to the innermost axis (`parallel.mesh`)
            left, cores = left // cores, 1
        spans = [1] * len(free)
        for place in sorted(range(len(free)), key=lambda place: (free[place] != left, -free[place])):
            spans[place] = math.gcd(left, free[place])
            left //= spans[place]
            free[place] //= spans[place]
        extents[axis] = tuple(spans)
    return extents

