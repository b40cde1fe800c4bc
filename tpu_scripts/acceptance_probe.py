"""The part of the acceptance list that one program on all hosts shows; each process writes OUT/<process index>.json.

`acceptance.py` runs it.
"""

import argparse
import dataclasses
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gqe_jax.config import RunConfig
from gqe_jax.config_files import load_config
from gqe_jax.data.reading.pipeline import train_batches
from gqe_jax.data.reading.prepared import PreparedData, open_data
from gqe_jax.kernels import attend
from gqe_jax.parallel.mesh import local_rows, make_mesh, shard_batch
from gqe_jax.train.step import Step

STEPS = (0, 1, 5)  # whose batches are compared
LOSSES = 3  # training steps whose losses are compared
KERNEL_TOLERANCE = 0.02  # of the largest value: two bfloat16 roundings, and sums in another order


def devices() -> dict[str, Any]:
    """All hosts must have the same software, or they compile different programs and hang."""
    names = ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint", "grain")
    software = {"python": platform.python_version()} | {name: _version(name) for name in names}
    mine = np.frombuffer(json.dumps(software).encode().ljust(1024), np.uint8)
    everyone = multihost_utils.process_allgather(mine)
    return {
        "name": "devices",
        "why": "hosts with different software compile different programs, and hang",
        "passed": bool((everyone == mine).all())
        and jax.local_device_count() * jax.process_count() == jax.device_count(),
        "measured": software
        | {"processes": jax.process_count(), "devices": jax.device_count(), "kind": jax.devices()[0].device_kind},
    }


def host_batches(data: PreparedData, config: RunConfig) -> dict[str, Any]:
    """The rows that each host reads against the global batch as one process reads it; together they are all of it."""
    common = {"batch_size": config.data.batch_size, "seed": config.data.seed}
    mine = local_rows(make_mesh(config.mesh), config.data.batch_size)
    is_read = np.zeros(config.data.batch_size, bool)
    is_read[mine] = True
    rows = int(multihost_utils.process_allgather(is_read).reshape(-1, len(is_read)).any(0).sum())
    wrong = []
    for step in STEPS:
        same = np.array_equal(_tokens(data, step, mine, **common), _tokens(data, step, None, **common)[mine])
        if not multihost_utils.process_allgather(np.array(same)).all() or rows < config.data.batch_size:
            wrong.append(step)
    return {
        "name": "host_batches",
        "why": "a row that no host reads is never learned, and hosts that read other rows train on garbage",
        "passed": not wrong,
        "measured": {
            "steps": list(STEPS),
            "wrong": wrong,
            "rows": rows * len(STEPS),
            "rows_per_host": len(mine),
        },
    }


def _tokens(data: PreparedData, step: int, rows: list[int] | None, **common: int) -> np.ndarray:
    with train_batches(data, start_step=step, rows=rows, **common) as batches:
        return next(batches)["tokens"]


def equal_losses(data: PreparedData, config: RunConfig) -> dict[str, Any]:
    """The loss of each step as each host holds it."""
    mesh = make_mesh(config.mesh)
    rows = train_batches(
        data,
        batch_size=config.data.batch_size,
        seed=config.data.seed,
        rows=local_rows(mesh, config.data.batch_size),
    )
    step = Step(config, mesh)
    losses = []
    with jax.set_mesh(mesh), rows:
        state = step.initial_state()
        for batch in (next(rows) for _ in range(LOSSES)):
            state, metrics = step.train(state, shard_batch(mesh, batch))
            losses.append(float(metrics["loss"].addressable_data(0)))
    everyone = multihost_utils.process_allgather(np.array(losses, np.float32))
    everyone = everyone.reshape(jax.process_count(), LOSSES)
    return {
        "name": "equal_losses",
        "why": "hosts whose losses differ have parameters that differ: they train apart",
        "passed": bool(np.isfinite(everyone).all() and (everyone == everyone[0]).all()),
        "measured": {"losses": losses, "hosts": len(everyone)},
    }


def kernel() -> dict[str, Any]:
    """Attention's kernel against the reference, forward and gradients, on one device of each host."""
    on_tpu = jax.default_backend() == "tpu"
    implementation = "pallas_tpu" if on_tpu else "xla"
    length, groups, experts, slots, dim = (2048, 4, 4, 2, 128) if on_tpu else (96, 2, 2, 1, 16)
    rng = np.random.default_rng(jax.process_index())

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16 if on_tpu else jnp.float32)

    q, k, v = draw(2, length, groups, experts, dim), draw(2, length, groups, dim), draw(2, length, groups, dim)
    weight = draw(2, length, groups, slots, dim)
    index = jnp.asarray(np.argsort(rng.random((2, length, groups, experts)), axis=-1)[..., :slots], jnp.int32)
    segments = jnp.asarray(np.cumsum(rng.random((2, length)) < 4 / length, axis=1) + 1, jnp.int32)

    def run(name, options):
        def loss(q, k, v):
            o = attend(q, k, v, index, implementation=name, **options)
            return jnp.sum((o * weight).astype(jnp.float32)), o

        (_, o), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return dict(zip(("o", "dq", "dk", "dv"), (o, *grads), strict=True))

    errors = {}
    for case, options in {
        "causal": {},
        "window": {"window": length // 3},
        "segments": {"q_segment_ids": segments, "kv_segment_ids": segments},
    }.items():
        expected, found = run("reference", options), run(implementation, options)
        for name, x in expected.items():
            x, y = (np.asarray(array, np.float32) for array in (x, found[name]))
            errors[f"{case} {name}"] = float(np.abs(x - y).max() / np.abs(x).max())
    worst = multihost_utils.process_allgather(np.array(max(errors.values()), np.float32))
    return {
        "name": "kernel",
        "why": "a kernel that is wrong on this device trains, and trains badly",
        "passed": bool((worst <= KERNEL_TOLERANCE).all()),
        "measured": {"implementation": implementation, "tolerance": KERNEL_TOLERANCE, "relative_error": errors},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args, rest = parser.parse_known_args()
    if (
        args.distributed or args.coordinator
    ):  # before anything asks JAX for devices; --distributed: all from the platform
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id, initialization_timeout=1800)
    config = load_config(args.config, [arg.removeprefix("--config.") for arg in rest if arg.startswith("--config.")])
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=max(config.data.batch_size, jax.device_count()))
    )
    data = open_data(config.data, config.model)
    record = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "batch_size": config.data.batch_size,
        "items": [devices(), host_batches(data, config), equal_losses(data, config), kernel()],
    }
    Path(args.out, f"{jax.process_index()}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
