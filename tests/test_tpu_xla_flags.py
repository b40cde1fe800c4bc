"""The XLA flag sets of tpu_scripts/, against the libtpu that is installed. Compiling needs no TPU."""

import hashlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gqe_jax.aot import topologies
from gqe_jax.aot.child import Child, CompileError

FLAGS = Path(__file__).parents[1] / "tpu_scripts" / "xla_flags"
SETS = sorted(path.stem for path in FLAGS.glob("*.flags"))
COMPILED_FOR = {"v5e": "v5e:2x2"}  # the other sets are empty


def step(topology: str, options: dict[str, str]) -> str:
    """A hash of the program of a sharded MLP's gradient, compiled for that slice."""

    def loss(weights, x):
        def layer(x, w):
            h = jax.nn.silu(jax.lax.with_sharding_constraint(x @ w[0], P("fsdp", None, "expert")))
            return x + jax.lax.with_sharding_constraint(h @ w[1], P("fsdp", None, None)), None

        return jnp.mean(jnp.square(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32)))

    devices = np.array(topologies.topology(topology).devices()).reshape(-1, 2)
    mesh = Mesh(devices, ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
    up, down = (NamedSharding(mesh, P(None, *axes)) for axes in (("fsdp", "expert"), ("expert", "fsdp")))
    weights = [
        jax.ShapeDtypeStruct((2, 512, 2048), jnp.bfloat16, sharding=up),
        jax.ShapeDtypeStruct((2, 2048, 512), jnp.bfloat16, sharding=down),
    ]
    x = jax.ShapeDtypeStruct((devices.size, 256, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss), out_shardings=[up, down]).lower(weights, x)
        text = lowered.compile(compiler_options=options).as_text()
    return hashlib.sha256(re.sub(r"metadata={[^}]*}", "", text).encode()).hexdigest()


def load() -> None:
    """Starts libtpu."""
    topologies.topology("v5e:2x2").devices()


def flags(name: str) -> dict[str, str]:
    lines = (FLAGS / f"{name}.flags").read_text().splitlines()
    return dict(line.removeprefix("--").split("=") for line in lines if line and not line.startswith("#"))


def test_every_flag_has_a_reason():
    """A line of comment stands above each flag; there is a set for every generation that a script can name."""
    assert SETS == ["tpu7x", "v4", "v5e", "v5p", "v6e"]
    for name in SETS:
        lines = (FLAGS / f"{name}.flags").read_text().splitlines()
        for above, line in zip(["", *lines], lines, strict=False):
            if not line.startswith("#") and line:
                assert line.startswith("--xla_") and "=" in line and above.startswith("# "), f"{name}: {line}"


def test_collectives_are_fused_on_v5e_alone():
    """Elsewhere libtpu 0.0.50 refuses it: "might lead to ... incorrect results, hang"; older ones compile it."""
    assert {name for name in SETS if any("async_collective_fusion" in flag for flag in flags(name))} == {"v5e"}


@pytest.mark.slow
def test_libtpu_knows_every_flag():
    """libtpu ends a process that starts with a flag it does not know, so a stale set would stop a whole pod."""
    known = {flag for name in SETS for flag in flags(name).items()}
    arguments = " ".join(f"--{name}={value}" for name, value in sorted(known))
    with Child(arguments) as child:
        child.call("test_tpu_xla_flags:load")
    with Child(arguments + " --xla_tpu_no_such_flag=true") as child:
        with pytest.raises(CompileError, match="Unknown command line flag 'xla_tpu_no_such_flag'"):
            child.call("test_tpu_xla_flags:load")


@pytest.mark.slow
def test_every_set_changes_the_program():
    """A flag that changes nothing is either the default already or no longer heeded: then it explains nothing. What is
    not refused here was compiled."""
    with Child() as child:
        for name, topology in COMPILED_FOR.items():
            programs = {child.call("test_tpu_xla_flags:step", topology=topology, options=x) for x in ({}, flags(name))}
            assert len(programs) == 2, f"the flags of {name} change nothing"
