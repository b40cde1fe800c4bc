"""Compiles functions for TPUs in a child process, since libtpu reads its settings as JAX starts.

  for name, compiled in compile_for_tpus([("v5e", "test_module:factory", {...}), ...]): ...
"""

import importlib
import json
import subprocess
import sys

from gqe_jax.aot.tpu_compile import child_environment

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compile_for_tpus(jobs):
    """(target, "module:factory", keyword arguments) each → {"temporaries": bytes, "hlo": text} each.

    The factory returns a function, its arguments as ShapeDtypeStructs, and the indices of those that are donated.
    """
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(jobs), env=child_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-6000:]
    return json.loads(child.stdout.splitlines()[-1])


def main():
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    results = []
    for target, factory, options in json.load(sys.stdin):
        module, name = factory.split(":")
        function, args, donated = getattr(importlib.import_module(module), name)(**options)
        device = topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu").devices[0]
        mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec())
        args = jax.tree.map(lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args)
        with jax.set_mesh(mesh):
            compiled = jax.jit(function, donate_argnums=donated).lower(*args).compile()
        results.append({"temporaries": compiled.memory_analysis().temp_size_in_bytes, "hlo": compiled.as_text()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
