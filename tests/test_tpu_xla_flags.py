"""The XLA flag sets of tpu_scripts/, against the libtpu that is installed. Compiling needs no TPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gqe_jax.aot.tpu_compile import child_environment

FLAGS = Path(__file__).parents[1] / "tpu_scripts" / "xla_flags"
SETS = sorted(path.stem for path in FLAGS.glob("*.flags"))
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # v4's set is v5p's; TPU7x's is empty

PROGRAM = """
import hashlib, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

def loss(weights, x):
    def layer(x, w):
        h = jax.nn.silu(jax.lax.with_sharding_constraint(x @ w[0], P("fsdp", None, "expert")))
        return x + jax.lax.with_sharding_constraint(h @ w[1], P("fsdp", None, None)), None
    return jnp.mean(jnp.square(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32)))

for topology, options in json.loads(sys.argv[1]):
    devices = np.array(topologies.get_topology_desc(topology, platform="tpu").devices).reshape(-1, 2)
    mesh = Mesh(devices, ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    up, down = (NamedSharding(mesh, P(None, *axes)) for axes in (("fsdp", "expert"), ("expert", "fsdp")))
    weights = [jax.ShapeDtypeStruct((2, 512, 2048), jnp.bfloat16, sharding=up),
               jax.ShapeDtypeStruct((2, 2048, 512), jnp.bfloat16, sharding=down)]
    x = jax.ShapeDtypeStruct((devices.size, 256, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=[up, down]).lower(weights, x)
        text = step.compile(compiler_options=options).as_text()
    print(hashlib.sha256(re.sub(r"metadata={[^}]*}", "", text).encode()).hexdigest())
"""


def flags(name: str) -> dict[str, str]:
    lines = (FLAGS / f"{name}.flags").read_text().splitlines()
    return dict(line.removeprefix("--").split("=") for line in lines if line and not line.startswith("#"))


def run_without_tpu(program: str, *arguments: str, init_args: str = "") -> subprocess.CompletedProcess:
    environment = child_environment(init_args)
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_every_flag_has_a_reason():
    """A line of comment stands above each flag; there is a set for every generation that a script can name."""
    assert SETS == ["tpu7x", "v4", "v5e", "v5p", "v6e"]
    for name in SETS:
        lines = (FLAGS / f"{name}.flags").read_text().splitlines()
        for above, line in zip(["", *lines], lines, strict=False):
            if not line.startswith("#") and line:
                assert line.startswith("--xla_") and "=" in line and above.startswith("# "), f"{name}: {line}"


def test_v4_runs_with_the_flags_of_v5p():
    assert flags("v4") == flags("v5p")


@pytest.mark.slow
@pytest.mark.compiler
def test_libtpu_knows_every_flag():
    """libtpu ends a process that starts with a flag it does not know, so a stale set would stop a whole pod."""
    load = "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', platform='tpu'); print('ok')"
    known = {flag for name in SETS for flag in flags(name).items()}
    arguments = " ".join(f"--{name}={value}" for name, value in sorted(known))
    done = run_without_tpu(load, init_args=arguments)
    assert done.stdout == "ok\n", done.stderr[-2000:]
    done = run_without_tpu(load, init_args=arguments + " --xla_tpu_no_such_flag=true")
    assert done.returncode != 0 and "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr


@pytest.mark.slow
@pytest.mark.compiler
def test_every_set_changes_the_program():
    """A flag that changes nothing is either the default already or no longer heeded: then it explains nothing."""
    jobs = [(topology, options) for name, topology in TOPOLOGIES.items() for options in ({}, flags(name))]
    done = run_without_tpu(PROGRAM, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-2000:]
    programs = done.stdout.split()
    for name, without, with_set in zip(TOPOLOGIES, programs[::2], programs[1::2], strict=True):
        assert without != with_set, f"the flags of {name} change nothing"
