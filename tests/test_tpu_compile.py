"""The kernels compile for every TPU generation, without a TPU, and their schedules do not get worse unnoticed.

Compiles run in child processes with libtpu's own environment. The schedules are compared with `tpu_schedules.json`, by
version of libtpu: another compiler makes other schedules. Renew it with `python tests/test_tpu_compile.py`.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.aot.tpu_compile import Compiled, CompileError, Job, compile_all
from gqe_jax.bench.rivals import RIVALS, Setting
from gqe_jax.kernels import attend
from gqe_jax.tpu import GENERATIONS

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'")
pytestmark = pytest.mark.slow

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


def selected_heads():
    """Forward and backward of the selected heads alone, with rotary embedding, in the proportions of `Setting`."""
    s = Setting(SEQ_LEN)
    tokens = 1, s.seq_len, s.num_groups
    q = jax.ShapeDtypeStruct((*tokens, s.num_heads // s.num_groups, s.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((*tokens, s.head_dim), jnp.bfloat16)
    o = jax.ShapeDtypeStruct((*tokens, s.top_k, s.head_dim), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((*tokens, s.top_k), jnp.int32)
    table = jax.ShapeDtypeStruct((1, s.seq_len, s.head_dim // 2), jnp.float32)

    def gradients(q, k, v, index, cos, sin, do):
        def forward(q, k, v):
            return attend(q, k, v, index, q_rope=(cos, sin), implementation="pallas_tpu")

        return jax.vjp(forward, q, k, v)[1](do)

    return gradients, (q, kv, kv, index, table, table, o)


def compile_for(targets: Iterable[str]) -> dict[tuple[str, str], Compiled | CompileError]:
    """(what, target) → "loops" (above); "selected" heads at full size; "shared", selected ones beside the shared head,
    in small blocks and without schedules: the same code takes as long once more at full size."""
    ours = {"part": "attention", "rival": dataclasses.asdict(RIVALS["tpu"][-1]), "setting": {"seq_len": 512}}
    jobs = {}
    for target in targets:
        jobs["loops", target] = Job(target, "test_tpu_compile:loops_by_prefetched_rows")
        jobs["selected", target] = Job(target, "test_tpu_compile:selected_heads")
        options = ours | {"backward": True, "target": target}
        jobs["shared", target] = Job(target, "gqe_jax.bench.rivals:make", options, schedules=False)
    return dict(zip(jobs, compile_all(list(jobs.values()), processes=2), strict=True))


@pytest.fixture(scope="module")
def compiled(request):
    """(what, target) → result, for the targets that the chosen tests ask for, compiled side by side."""
    chosen = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return compile_for(sorted({item.callspec.params["target"] for item in chosen}))


@pytest.mark.parametrize("target", GENERATIONS)
def test_executions_are_counted_exactly(target, compiled):
    """The visits read from a compiled program are those that its source says, on every generation's instructions."""
    result = compiled["loops", target]
    assert isinstance(result, Compiled), result
    (kernel,) = result.kernels
    assert max(block.visits for block in kernel.tiles) == loop_trips()


def test_a_compiler_that_dies_takes_one_function_with_it():
    """libtpu aborts its process on some inputs: the other functions' results are not lost, nor their order."""
    jobs = [Job("v5e", "os:abort"), Job("v5e", "test_tpu_compile:addition")]
    died, compiled = compile_all(jobs, processes=1)
    assert isinstance(died, CompileError)
    assert "os:abort for v5e: the compiler's process ended with exit code -6" in str(died)
    assert isinstance(compiled, Compiled) and not compiled.kernels


def addition():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return jnp.add, (x, x)


@pytest.mark.parametrize("target", GENERATIONS)
@pytest.mark.parametrize("what", ["selected", "shared"])
def test_kernels_compile(what, target, compiled):
    """Forward and backward of selected and shared heads, as real programs for the generation.

    Temporaries: what the backward pass keeps is a few arrays of the size of the queries, nothing of the size of scores.
    """
    result = compiled[what, target]
    assert isinstance(result, Compiled), result
    for kernel in ("gqe_forward", "gqe_backward"):
        assert len(re.findall(rf"{kernel}[.\w]* = .*tpu_custom_call", result.hlo)) == (1 if what == "selected" else 2)
    s = Setting(SEQ_LEN)
    queries = s.seq_len * s.num_heads * s.head_dim * 2
    assert result.temporaries < 8 * queries


def schedules(result: Compiled) -> dict[str, list[list[int]]]:
    """Kernel → [bundles, spills] of each tile."""
    kernels = {name: result.kernel(name) for name in ("gqe_forward", "gqe_backward")}
    return {name: [[tile.bundles, tile.spills] for tile in kernel.tiles] for name, kernel in kernels.items()}


@pytest.mark.parametrize("target", GENERATIONS)
def test_schedules_do_not_get_worse(target, compiled):
    """Bundles and spills of every tile stay within 5% of what they were: a slower kernel shows without a TPU."""
    result = compiled["selected", target]
    assert isinstance(result, Compiled), result
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if result.libtpu not in golden:
        pytest.skip(f"no schedules of libtpu {result.libtpu} are on record: {RENEW}")
    before, now = golden[result.libtpu][target], schedules(result)
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
    for (what, target), result in compile_for(GENERATIONS).items():
        if isinstance(result, CompileError):
            sys.exit(str(result))
        if what == "selected":
            golden.setdefault(result.libtpu, {})[target] = schedules(result)
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"wrote {GOLDEN}")
