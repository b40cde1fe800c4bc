"""Chooses the implementation of `attend` that computes a call, by platform and shape, and logs each choice once."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax

from gqe_jax.kernels import cudnn
from gqe_jax.kernels.tpu import decode, pallas_tpu

logger = logging.getLogger("gqe_jax")

PREFERENCE: dict[str, tuple[str, ...]] = {
    "tpu": ("pallas_tpu_decode", "pallas_tpu", "xla"),
    "gpu": ("cudnn", "xla"),
    "cpu": ("xla",),
}
"""Platform → implementations, the fastest first; the first that can compute a call does. Other platforms take "xla"."""

NAMES = {"cpu": "a CPU", "gpu": "an NVIDIA GPU", "rocm": "an AMD GPU", "tpu": "a TPU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Describes a call of `attend` without its data: all that decides which implementation computes it.

    Attributes:
      batch, q_len, kv_len, num_runs, num_experts, num_slots, head_dim: B, S, T, R (query runs), M, K, D.
      value_dim, num_kv_heads: Dv and G.
      kv_head: whether the caller says which KV head each query run reads; otherwise R = G and run r reads head r.
      dtype: name of the dtype of q, k and v.
      causal, window: as in `attend`.
      softcap: whether there is a soft cap.
      segments: whether there are segment ids.
      kv_length: whether there is a kv_length: K and V are then a cache.
      aligned: whether query 0 and key 0 are known, when tracing, to have the same position.
      return_lse: whether the log-sum-exp is asked for.
      partitioned: whether XLA splits the computation over several devices.
      block_sizes: whether the caller gives block sizes of the TPU kernels.
    """

    batch: int
    q_len: int
    kv_len: int
    num_runs: int
    num_experts: int
    num_slots: int
    head_dim: int
    value_dim: int
    num_kv_heads: int
    dtype: str
    kv_head: bool = False
    causal: bool = True
    window: int | None = None
    softcap: bool = False
    segments: bool = False
    kv_length: bool = False
    aligned: bool = True
    return_lse: bool = False
    partitioned: bool = False
    block_sizes: bool = False

    def __str__(self) -> str:
        flags = ("softcap", "segments", "kv_length", "return_lse", "partitioned", "block_sizes")
        options = [f"kv_head of R={self.num_runs} query runs"] if self.kv_head else []
        options += [f"window={self.window}"] if self.window else []
        options += [name for name in flags if getattr(self, name)]
        return (
            f"q [B={self.batch}, S={self.q_len}, G={self.num_kv_heads}, M={self.num_experts}, D={self.head_dim}], "
            + (f"Dv={self.value_dim}, " if self.value_dim != self.head_dim else "")
            + f"K={self.num_slots}, T={self.kv_len}, {self.dtype}, {'' if self.causal else 'not '}causal"
            + "".join(f", {option}" for option in options)
        )


def is_partitioned() -> bool:
    """Tells whether XLA splits what is being traced over several devices of `jax.set_mesh` (not in `jax.shard_map`)."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(size > 1 for axis_type, size in sizes if axis_type != jax.sharding.AxisType.Manual)


REQUIREMENTS: dict[str, tuple[str, Callable[[Call], str | None]]] = {
    "cudnn": ("gpu", cudnn.obstacle),
    "pallas_tpu": ("tpu", pallas_tpu.obstacle),
    "pallas_tpu_decode": ("tpu", decode.obstacle),
}
"""Implementation → the platform it needs, and a function that says why it cannot compute a call there, if it cannot."""


def platform_lacking(name: str | None, platform: str) -> str | None:
    """Names the platform that an implementation needs, if it is another one than `platform`; else None."""
    needed = REQUIREMENTS[name][0] if name in REQUIREMENTS else platform
    return None if needed == platform else NAMES[needed]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Names the implementation that was chosen and says why.

    `is_fallback` is True where none of the platform's own implementations can compute the call.
    """

    name: str
    why: str
    is_fallback: bool = False


def target_platform(array: jax.Array | None = None) -> str:
    """Returns the platform that a computation is lowered for: "cpu", "gpu" (NVIDIA), "rocm" (AMD) or "tpu".

    Outside a trace this is the platform of `array`. Under a trace it is that of the devices of `jax.set_mesh`, else of
    `jax.default_device`, else of the default backend. So a mesh of TPU devices compiles TPU kernels also on a host
    that has none.
    """
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        device = next(iter(array.devices()))
    else:
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
    if device.platform == "gpu" and "NVIDIA" not in device.device_kind.upper():
        return "rocm"
    return device.platform


def obstacle(name: str, platform: str, call: Call) -> str | None:
    """Says why the implementation `name` cannot compute a call on a platform; None where it can."""
    if (lacking := platform_lacking(name, platform)) is not None:
        return f"{name} needs {lacking}, and this computation is for {NAMES.get(platform, platform)}"
    if call.block_sizes and name != "pallas_tpu":
        return f"{name} takes no block_sizes, which are those of pallas_tpu"
    return REQUIREMENTS[name][1](call) if name in REQUIREMENTS else None


def choose(platform: str, call: Call) -> Choice:
    """Chooses the implementation for a call where the caller names none: the platform's fastest that can compute it.

    Args:
      platform: "cpu", "gpu" (NVIDIA), "rocm", "tpu", or any other, where "xla" is taken.
      call: its shapes and options.

    Raises:
      ValueError: block sizes are given, and pallas_tpu, which takes them, cannot compute the call.
    """
    names = PREFERENCE.get(platform, ("xla",))
    obstacles = [obstacle(name, platform, call) for name in names]
    if None not in obstacles:
        reason = obstacle("pallas_tpu", platform, call)
        raise ValueError(f"block_sizes are given, and {reason} (call: {call}): {_what_would_run(platform, call)}")
    name = names[obstacles.index(None)]
    refused = obstacles[: names.index(name)]
    if refused and name == names[-1]:
        return Choice(name, "; ".join(refused), is_fallback=True)
    return Choice(name, f"the fastest on {NAMES.get(platform, platform)}" + "".join(f"; {why}" for why in refused))


def check(name: str, platform: str, call: Call) -> Choice:
    """Chooses the implementation that the caller named.

    Raises:
      ValueError: it cannot compute the call; the message says why, and which one would.
    """
    reason = obstacle(name, platform, call)
    if reason is not None:
        raise ValueError(
            f"implementation={name!r} cannot run: {reason} (call: {call}); {_what_would_run(platform, call)}"
        )
    return Choice(name, "asked for by name")


def _what_would_run(platform: str, call: Call) -> str:
    instead = choose(platform, dataclasses.replace(call, block_sizes=False)).name
    return f"{'without them ' if call.block_sizes else ''}implementation=None would take {instead!r} here"


@functools.cache  # once per platform, call and choice
def announce(platform: str, call: Call, choice: Choice) -> None:
    """Logs the choice in one line of the log "gqe_jax", as a warning where it is a fallback."""
    level = logging.WARNING if choice.is_fallback else logging.INFO
    logger.log(level, "attention on %s takes %r: %s; %s", platform, choice.name, choice.why, call)
