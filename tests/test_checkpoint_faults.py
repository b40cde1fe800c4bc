"""Checkpoints survive kills, failing disks and changes of the mesh: with real processes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.runs.checkpoint import Checkpoints


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


CHILD = """
import sys
import numpy as np, jax, jax.numpy as jnp
from gqe_jax.runs.checkpoint import Checkpoints

def make_params(step):
    rng = np.random.default_rng(step)
    return {f"w{i}": jnp.asarray(rng.standard_normal((512, 512)), jnp.float32) for i in range(8)}

def items(step, params):
    return dict(params=params, opt_state=params, train={"step": jnp.asarray(step)}, data={"seed": 0, "step": step},
                config={}, tokenizer={"t": b"x"})

def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

directory = sys.argv[1]
"""


def start_child(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", CHILD + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=Path(__file__).parents[1],
    )


def finish(child: subprocess.Popen) -> tuple[str, str]:
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return out, err


SAVE_FOREVER = """
with Checkpoints(directory, keep=2) as checkpoints:
    start = checkpoints.latest() or 0
    if start:
        params = checkpoints.restore(start, params=abstract(make_params(start)))["params"]
        assert all((params[name] == x).all() for name, x in make_params(start).items())
    for step in range(start + 1, start + 10_000):
        params = make_params(step)
        checkpoints.save(step, **items(step, params))
        print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_the_newest_checkpoints_whole(tmp_path):
    """kill -9 in the middle of a save (its temporary directory is there) and at random moments around one.

    A step appears by one rename after its files and their record are written, so whatever is listed must be whole; only
    the oldest may be half-deleted. The child itself checks what it resumes from.
    """
    rng = random.Random(0)
    seen = []
    for moment in ("middle", "middle", "random", "random"):
        child = start_child(SAVE_FOREVER, tmp_path)
        try:
            first = int(child.stdout.readline())
            assert first == (seen[-1] if seen else 0) + 1
            for _ in range(2):  # let at least one more save complete
                child.stdout.readline()
            if moment == "middle":
                deadline = time.monotonic() + 60
                while not list(tmp_path.glob("*.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp")):
                    assert time.monotonic() < deadline and child.poll() is None
            else:
                time.sleep(rng.uniform(0, 0.3))
        finally:
            child.kill()
            child.communicate()
        assert child.returncode == -signal.SIGKILL
        checkpoints = Checkpoints(tmp_path)
        for step in checkpoints.steps()[-2:]:
            checkpoints.verify(step)
        seen.append(checkpoints.latest())
        assert seen[-1] >= first + 1
        # An independent statement of what the child saved.
        w0 = np.random.default_rng(seen[-1]).standard_normal((512, 512)).astype(np.float32)
        shapes = {f"w{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(8)}
        restored = checkpoints.restore(seen[-1], params=abstract(shapes))["params"]
        np.testing.assert_array_equal(restored["w0"], w0)


FILL_THE_DISK = """
import resource
checkpoints = Checkpoints(directory)
checkpoints.save(1, **items(1, make_params(1)), wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for second_chance in (lambda: checkpoints.save(3, **items(3, make_params(3))), checkpoints.wait, checkpoints.close):
    try:
        assert checkpoints.save(2, **items(2, make_params(2)))
        second_chance()
    except OSError as error:
        print(type(error).__name__, error)
    assert checkpoints.steps() == [1]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.verify(1)
with Checkpoints(directory) as checkpoints:
    checkpoints.save(4, **items(4, make_params(4)))
print(Checkpoints(directory).steps())
"""


def test_failed_write_surfaces_and_spares_the_last_checkpoint(tmp_path):
    """A file that may not grow (as on a full disk or a quota) fails a save that has already returned.

    The error must come out of whatever is called next, save, wait or close, and name directory, cause and what is left;
    once there is room, saving works again.
    """
    out, _ = finish(start_child(FILL_THE_DISK, tmp_path))
    *errors, steps = out.splitlines()
    expected = (
        f"CheckpointFailed could not save the checkpoint of step 2 in {tmp_path}: File too large; the checkpoint of "
        f"step 1 is complete, and the same command goes on from it. Free disk space or make the directory writable "
        f"first"
    )
    assert errors == [expected] * 3
    assert steps == "[1, 4]"


MESHES = """
import absl.logging
absl.logging.set_verbosity(absl.logging.INFO)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
layouts = {"rows": P("fsdp", "expert"), "columns": P(None, ("expert", "fsdp"))}
shardings = {name: NamedSharding(mesh, layout) for name, layout in layouts.items()}
with Checkpoints(directory) as checkpoints:
    if sys.argv[2] == "save":
        checkpoints.save(1, **items(1, jax.device_put(make_params(1), shardings["rows"])))
    else:
        for sharding in shardings.values():
            params = checkpoints.restore(1, params=abstract(make_params(1), sharding))["params"]
            assert all((params[name] == x).all() for name, x in make_params(1).items())
            assert all(x.sharding == sharding for x in params.values())
"""


def test_restore_on_another_mesh(tmp_path):
    """8 devices to 1, 1 to 8, across layouts: a checkpoint holds arrays, not their placement. And Orbax is quiet."""
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    _, noise = finish(start_child(MESHES, tmp_path / "eight", "save", **eight))
    params = {f"w{i}": jax.ShapeDtypeStruct((512, 512), jnp.float32) for i in range(8)}
    restored = Checkpoints(tmp_path / "eight").restore(1, params=abstract(params))["params"]
    rng = np.random.default_rng(1)
    for i in range(8):
        np.testing.assert_array_equal(restored[f"w{i}"], rng.standard_normal((512, 512)).astype(np.float32))

    with Checkpoints(tmp_path / "one") as checkpoints:
        rest = {"opt_state": restored, "train": restored, "data": {}, "config": {}, "tokenizer": {}}
        checkpoints.save(1, params=restored, **rest)
    with contextlib.ExitStack() as stack:
        children = [start_child(MESHES, tmp_path / name, "restore", **eight) for name in ("one", "eight")]
        for child in children:
            stack.callback(child.kill)
        noise += "".join(finish(child)[1] for child in children)
    assert "orbax" not in noise.lower() and "Sharding" not in noise, noise
