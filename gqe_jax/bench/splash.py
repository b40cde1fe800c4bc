"""JAX's splash attention at the block sizes at which it needs fewest cycles: the rival on TPUs, at its best.

`python -m gqe_jax.bench.splash` searches the block sizes anew (about ten minutes a generation) and prints the table.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from gqe_jax.aot.tpu_compile import CompileError, Job, compile_all
from gqe_jax.kernels import prepare_queries
from gqe_jax.tpu import GENERATIONS

Blocks = tuple[int, int, int]
"""Block of queries, block of keys in memory, block of keys computed with at a time."""

BLOCKS: dict[tuple[str, int, str], tuple[Blocks, Blocks]] = {
    ("v5e", 64, "forward"): ((1024, 1024, 256), (2048, 2048, 256)),
    ("v5e", 64, "backward"): ((2048, 2048, 512), (1024, 4096, 256)),
    ("v5e", 128, "forward"): ((2048, 2048, 256), (2048, 2048, 256)),
    ("v5e", 128, "backward"): ((2048, 2048, 512), (1024, 4096, 512)),
    ("v5e", 256, "forward"): ((1024, 1024, 512), (1024, 1024, 512)),
    ("v6e", 64, "forward"): ((2048, 2048, 1024), (2048, 2048, 1024)),
    ("v6e", 64, "backward"): ((2048, 2048, 256), (2048, 4096, 256)),
    ("v6e", 128, "forward"): ((2048, 2048, 1024), (2048, 2048, 1024)),
    ("v6e", 128, "backward"): ((2048, 2048, 512), (2048, 2048, 512)),
    ("v6e", 256, "forward"): ((2048, 2048, 1024), (2048, 2048, 1024)),
    ("v6e", 256, "backward"): ((2048, 2048, 1024), (1024, 4096, 256)),
    ("tpu7x", 128, "forward"): ((2048, 2048, 1024), (2048, 2048, 1024)),
}
"""(target, D, pass) → the best for S = 8192 and for S = 65536, with libtpu 0.0.42.1."""

OTHERWISE: tuple[Blocks, Blocks] = ((1024, 1024, 512), (1024, 1024, 512))


def splash_blocks(target: str, head_dim: int, seq_len: int) -> tuple[Blocks, Blocks]:
    """(forward, backward) blocks; where none were searched, some that are good everywhere."""
    long = seq_len > 16384
    return tuple(BLOCKS.get((target, head_dim, x), OTHERWISE)[long] for x in ("forward", "backward"))


class _CausalMask(splash_attention_mask.CausalMask):
    """Masks as JAX's causal mask, but compares no pairs of positions on the host for full or empty blocks."""

    def __getitem__(self, index):
        rows, columns = (range(n)[part] for n, part in zip(self.shape, index, strict=True))
        if columns[-1] <= rows[0] or columns[0] > rows[-1]:
            return np.broadcast_to(columns[-1] <= rows[0], (len(rows), len(columns)))
        return super().__getitem__(index)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, blocks: tuple[Blocks, Blocks]) -> jax.Array:
    """Causal attention of q [N, S, D], already times its scale, to k and v [G, S, D]; the fused backward kernel."""
    num_heads, seq_len, _ = q.shape
    mask = splash_attention_mask.MultiHeadMask([_CausalMask((seq_len, seq_len))] * num_heads)
    forward, backward = ([min(size, seq_len) for size in sizes] for sizes in blocks)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=forward[0],
        block_kv=forward[1],
        block_kv_compute=forward[2],
        block_q_dkv=backward[0],
        block_kv_dkv=backward[1],
        block_kv_dkv_compute=backward[2],
        use_fused_bwd_kernel=True,
    )
    kernel = splash_attention_kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return kernel(q, k, v)


def implementation(blocks: tuple[Blocks, Blocks]):
    """Returns an implementation of `attend` by splash, for causal attention of one sequence; log-sum-exp is not
    returned."""

    def attend_by_splash(q, k, v, expert_index, mask, *, kv_head, q_rope, q_norm, softcap, scale):
        del mask, kv_head, softcap
        q = prepare_queries(q, expert_index, q_norm, q_rope)
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        _, seq_len, groups, slots, head_dim = q.shape
        heads_first = q[0].transpose(1, 2, 0, 3).reshape(groups * slots, seq_len, head_dim)
        o = splash(heads_first, *(x[0].transpose(1, 0, 2) for x in (k, v)), blocks=blocks)
        return o.reshape(1, groups, slots, seq_len, head_dim).transpose(0, 3, 1, 2, 4), None

    return attend_by_splash


# ---- search


def candidate(backward: bool, seq_len: int, head_dim: int, sizes: Blocks):
    """Splash of 16 heads in 8 groups with these blocks: see `Job.factory`."""
    blocks = (OTHERWISE[0], sizes) if backward else (sizes, OTHERWISE[0])
    function = functools.partial(splash, blocks=tuple(map(tuple, blocks)))
    q, kv = (jax.ShapeDtypeStruct((heads, seq_len, head_dim), jnp.bfloat16) for heads in (16, 8))
    if not backward:
        return function, (q, kv, kv)
    return (lambda q, k, v, do: jax.vjp(function, q, k, v)[1](do)), (q, kv, kv, q)


def search(target: str, head_dim: int, seq_len: int, backward: bool) -> Blocks:
    """Returns the block sizes with fewest cycles, XLA's share for sums of partial results included.

    Raises:
      CompileError: none compiles.
    """
    sizes = itertools.product((512, 1024, 2048), (512, 1024, 2048, 4096), (256, 512, 1024))
    sizes = [(q, kv, compute) for q, kv, compute in sizes if compute <= kv <= 2 * max(q, 1024 << backward)]
    options = {"backward": backward, "seq_len": seq_len, "head_dim": head_dim}
    jobs = [Job(target, "gqe_jax.bench.splash:candidate", options | {"sizes": x}) for x in sizes]
    results = zip(sizes, compile_all(jobs), strict=True)
    cycles = {x: result.total for x, result in results if not isinstance(result, CompileError)}
    if not cycles:
        raise CompileError(f"splash compiles for {target} at D = {head_dim}, S = {seq_len} with none of {sizes}")
    return min(cycles, key=cycles.get)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", nargs="+", default=list(GENERATIONS))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    args = parser.parse_args()
    for target, head_dim, part in itertools.product(args.target, args.head_dim, ("forward", "backward")):
        best = tuple(search(target, head_dim, seq_len, part == "backward") for seq_len in (8192, 65536))
        print(f"    {(target, head_dim, part)}: {best},", flush=True)


if __name__ == "__main__":
    _main()
