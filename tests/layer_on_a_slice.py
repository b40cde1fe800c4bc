"""What `test_parallel` compiles in a child process for a slice of eight TPUs: one attention layer over `expert`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from gqe_jax.aot.topologies import topology
from gqe_jax.attention import GQAttention, GQEAttention
from gqe_jax.config import MeshConfig
from gqe_jax.parallel.mesh import make_mesh
from gqe_jax.parallel.rules import spec_of, state_shardings
from gqe_jax.plan.collectives import read_collectives

B, S, D_MODEL, G, M, K, D = 1, 256, 512, 8, 4, 2, 128


def make_layer(kind):
    # Compiles quickly; collectives stand around the kernels, not in them.
    options = {"dtype": jnp.bfloat16, "implementation": "reference", "rngs": nnx.Rngs(0)}
    if kind == "gqe":
        return GQEAttention(D_MODEL, G * M, G, K, D, **options)
    return GQAttention(D_MODEL, G * M, G, D, **options)


def collectives(kind, backward):
    """[kind, axes, bytes] of the collectives in one layer, forward or forward and backward."""
    devices = topology("v5e:2x4").devices()
    mesh = make_mesh(MeshConfig(data=1, expert=8), devices)
    layer = nnx.eval_shape(lambda: make_layer(kind))
    graph, state = nnx.split(layer)
    state = nnx.to_pure_dict(state)
    shardings = state_shardings(mesh, state, layer)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    tokens = NamedSharding(mesh, spec_of(("batch", "sequence", None)))
    x = jax.ShapeDtypeStruct((B, S, D_MODEL), jnp.bfloat16, sharding=tokens)

    def forward(state, x):
        return nnx.merge(graph, state)(x)[0]

    def both(state, x, dy):
        y, vjp = jax.vjp(forward, state, x)
        return y, vjp(dy)

    with jax.set_mesh(mesh):
        if backward:
            lowered = jax.jit(both, out_shardings=(tokens, (shardings, tokens))).lower(state, x, x)
        else:
            lowered = jax.jit(forward, out_shardings=tokens).lower(state, x)
        hlo = lowered.compile().as_text()
    return [(found.kind, found.axes, found.size) for found in read_collectives(hlo, dict(mesh.shape))]
