"""The kernels compile for every TPU generation, without a TPU, and their schedules do not get worse unnoticed.

Compiles run in child processes with libtpu's own environment. The schedules are compared with `tpu_schedules.json`, by
version of libtpu: another compiler makes other schedules. Renew it with `python tests/test_tpu_compile.py`.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.aot.tpu_compile import Compiled, CompileError, Job, compile_all
from gqe_jax.bench.rivals import RIVALS, Setting

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'")
pytestmark = [pytest.mark.slow, pytest.mark.compiler]

TARGETS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
SEQ_LEN = 8192
GOLDEN = pathlib.Path(__file__).with_name("tpu_schedules.json")
RENEW = "python tests/test_tpu_compile.py"


def loops_by_prefetched_rows():
    """A kernel of 3 × 8 × 6 steps: some prepare, some run a loop of 3 or 5 matmuls as data and division decide."""

    def kernel(first, end, x, o, total):
        i, j = pl.program_id(1), pl.program_id(2)

        @pl.when(j == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when((j >= first[i]) & (j < end[i]))
        def _():
            def add(_, carry):
                total[...] += jnp.dot(x[...], total[...].astype(x.dtype), preferred_element_type=jnp.float32)
                return carry

            jax.lax.fori_loop(0, jnp.where((7 * i + j) // 5 % 3 == 1, 3, 5), add, 0)

        @pl.when(j == pl.num_programs(2) - 1)
        def _():
            o[...] = total[...]

    def function(x):
        first = jnp.arange(8, dtype=jnp.int32) // 2
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(3, 8, 6),
                in_specs=[pl.BlockSpec((256, 256), lambda h, i, j, *_: (i, 0))],
                out_specs=pl.BlockSpec((256, 256), lambda h, i, j, *_: (8 * h + i, 0)),
                scratch_shapes=[pltpu.VMEM((256, 256), jnp.float32)],
            ),
            out_shape=jax.ShapeDtypeStruct((24 * 256, 256), jnp.float32),
            name="loops",
        )(first, first + 2, x)

    return function, (jax.ShapeDtypeStruct((8 * 256, 256), jnp.bfloat16),)


def loop_trips():
    """How often that loop's body runs, by the kernel's text."""
    _, i, j = np.indices((3, 8, 6))
    inside = (j >= i // 2) & (j < i // 2 + 2)
    return int(np.where((7 * i + j) // 5 % 3 == 1, 3, 5)[inside].sum())


@functools.cache
def compiled(what: str) -> dict[str, Compiled | CompileError]:
    """Target → "loops" (above) or "gqe" (forward and backward), compiled in two child processes."""
    ours = dataclasses.asdict(RIVALS["tpu"][-1])
    options = {"part": "attention", "rival": ours, "setting": {"seq_len": SEQ_LEN}, "backward": True}
    jobs = {
        "loops": [Job(target, "test_tpu_compile:loops_by_prefetched_rows") for target in TARGETS],
        "gqe": [Job(target, "gqe_jax.bench.rivals:make", options | {"target": target}) for target in TARGETS],
    }
    return dict(zip(TARGETS, compile_all(jobs[what], processes=2), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_executions_are_counted_exactly(target):
    """The visits read from a compiled program are those that its source says, on every generation's instructions."""
    result = compiled("loops")[target]
    assert isinstance(result, Compiled), result
    (kernel,) = result.kernels
    assert max(block.visits for block in kernel.tiles) == loop_trips()


def test_a_compiler_that_dies_takes_one_function_with_it():
    """libtpu aborts its process on some inputs: the other functions' results are not lost, nor their order."""
    died, compiled = compile_all([Job("v5e", "os:abort"), Job("v5e", "test_tpu_compile:addition")], processes=1)
    assert isinstance(died, CompileError) and "os:abort for v5e: the compiler's process ended with exit code -6" in str(
        died
    )
    assert isinstance(compiled, Compiled) and not compiled.kernels


def addition():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return jnp.add, (x, x)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target):
    """Forward and backward of selected and shared heads, as real programs for the generation.

    Temporaries: what the backward pass keeps is a few arrays of the size of the queries, nothing of the size of scores.
    """
    result = compiled("gqe")[target]
    assert isinstance(result, Compiled), result
    names = [kernel.name for kernel in result.kernels]
    assert any("gqe_forward" in name for name in names) and any("gqe_backward" in name for name in names), names
    s = Setting(SEQ_LEN)
    queries = s.seq_len * s.num_heads * s.head_dim * 2
    assert result.temporaries < 8 * queries


def schedules(result: Compiled) -> dict[str, list[list[int]]]:
    """Kernel → [bundles, spills] of each tile."""
    return {kernel.name: [[tile.bundles, tile.spills] for tile in kernel.tiles] for kernel in result.kernels}


@pytest.mark.parametrize("target", TARGETS)
def test_schedules_do_not_get_worse(target):
    """Bundles and spills of every tile stay within 5% of what they were: a slower kernel shows without a TPU."""
    result = compiled("gqe")[target]
    assert isinstance(result, Compiled), result
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if result.libtpu not in golden:
        pytest.skip(f"no schedules of libtpu {result.libtpu} are on record: {RENEW}")
    before, now = golden[result.libtpu][target], schedules(result)
    assert now.keys() == before.keys(), f"other kernels than on record; if that is meant: {RENEW}"
    for name in now:
        np.testing.assert_allclose(
            now[name],
            before[name],
            rtol=0.05,
            atol=20,
            err_msg=f"{target}, {name}: [bundles, spills] of its tiles changed; if that is meant: {RENEW}",
        )


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for target, result in compiled("gqe").items():
        if isinstance(result, CompileError):
            sys.exit(str(result))
        golden.setdefault(result.libtpu, {})[target] = schedules(result)
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"wrote {GOLDEN}")
