"""Block sizes of the TPU kernels: given ones are taken as they are, or refused with a message that has the numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax import BlockSizes, attend
from gqe_jax.aot.tpu_compile import Compiled, Job, compile_all
from gqe_jax.kernels.choose import Call, check, choose
from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.tpu import pallas_tpu as pallas_tpu_module
from gqe_jax.kernels.tpu.blocks import forward_blocks
from gqe_jax.kernels.tpu.pallas_tpu import pallas_tpu
from gqe_jax.kernels.tpu.plan import KernelPlan, MaskKind
from gqe_jax.kernels.tpu.vmem import backward_bytes, forward_bytes
from gqe_jax.tpu import GENERATIONS, find_generation

NEAR_LIMIT = {"block_kv": 90112}
"""Of keys and values alone: just within the 100 MiB of v5e and v6e."""


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_q": 100}, "block_sizes: block_q=100 must be a multiple of 128, the lanes of a register"),
        ({"backward_piece_kv": 64}, "block_sizes: backward_piece_kv=64 must be a multiple of 128"),
        ({"tile": 0}, "block_sizes: tile=0 must be a positive int, or None for the tuned size"),
        ({"backward_chunk_q": 1.5}, "block_sizes: backward_chunk_q=1.5 must be a positive int"),
        ({"row_part": 64}, "block_sizes: row_part=64 must be a multiple of 128"),
        ({"block_q": 256, "block_kv": 384}, "block_sizes: block_q=256 must divide block_kv=384"),
        ({"tile": 512, "block_kv": 768}, "block_sizes: tile=512 must divide block_kv=768"),
        ({"unit": 256, "tile": 384}, "block_sizes: unit=256 must divide tile=384"),
        ({"diagonal_part": 256, "block_q": 384}, "block_sizes: diagonal_part=256 must divide block_q=384"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BlockSizes(**sizes)


def test_a_given_size_must_fit_the_tuned_ones():
    """Nothing that was given is rounded: the message says which other size stands in its way, and that it was tuned."""
    message = "block_q=1024 must divide block_kv=1536 (block_q is the tuned size: give it too)"
    with pytest.raises(ValueError, match=re.escape(message)):
        forward_blocks("v5e", 1, 8192, 8192, BlockSizes(block_kv=1536))
    message = "row_part=384 must divide the rows of a block: K=2 times block_q=512 (block_q is the tuned size"
    with pytest.raises(ValueError, match=re.escape(message)):
        forward_blocks("v5e", 2, 8192, 8192, BlockSizes(row_part=384))


def test_given_sizes_are_taken_and_cut_to_the_lengths():
    sizes = {"block_q": 512, "block_kv": 3072, "tile": 1536, "unit": 256, "diagonal_part": 128, "row_part": 128}
    given = BlockSizes(**sizes, ones_row=True)
    assert vars(forward_blocks("v5e", 1, 8192, 8192, given)) == sizes | {"ones_row": True}
    short = forward_blocks("v5e", 1, 300, 300, given)
    assert (short.block_q, short.block_kv, short.tile) == (384, 384, 384)


CALL = Call(batch=1, q_len=256, kv_len=256, num_runs=2, num_experts=2, num_slots=1, head_dim=128, value_dim=128,
            num_kv_heads=2, dtype="bfloat16",
            block_sizes=True)  # fmt: skip


def test_implementations_without_blocks_refuse_them():
    """Sizes that would be ignored are an error, by name and unnamed, that says what would run without them."""
    assert choose("tpu", CALL).name == check("pallas_tpu", "tpu", CALL).name == "pallas_tpu"
    with pytest.raises(
        ValueError, match=r"xla takes no block_sizes, which are those of pallas_tpu .*without them impl"
    ):
        check("xla", "tpu", CALL)
    q, k = jnp.ones((1, 8, 2, 1, 128)), jnp.ones((1, 8, 2, 128))
    message = r"block_sizes are given, and pallas_tpu needs a TPU, and this computation is for a CPU .*would take 'xla'"
    with pytest.raises(ValueError, match=message):
        attend(q, k, k, block_sizes=BlockSizes(block_q=128))


def trace(sizes, *, length=8192, backward=False):
    """Traces a call with v5e's blocks, computing nothing."""
    q, k = (jax.ShapeDtypeStruct((1, length, 8, *experts, 128), jnp.bfloat16) for experts in ((2,), ()))
    index = jax.ShapeDtypeStruct((1, length, 8, 1), jnp.int32)

    def call(q, k, index):
        zeros = jnp.zeros(1, jnp.int32)
        mask = Mask(q_offset=zeros, kv_offset=zeros, aligned=True)
        options = {"q_rope": None, "q_norm": None, "softcap": None, "scale": 1.0, "interpret": True}
        attention = functools.partial(pallas_tpu, block_sizes=BlockSizes(**sizes), **options)
        o, vjp = jax.vjp(lambda q, k: attention(q, k, k, index, mask)[0], q, k)
        return vjp(o) if backward else o

    jax.eval_shape(call, q, k, index)


@pytest.mark.parametrize(
    ("sizes", "length", "kernel"),
    [
        ({"block_q": 4096, "block_kv": 8192, "tile": 8192}, 8192, "forward"),
        ({"block_kv": 1 << 17}, 1 << 17, "forward"),
        ({"backward_chunk_q": 128}, 1 << 18, "backward"),
        ({"backward_block_q": 8192, "backward_block_kv": 8192, "backward_piece_kv": 8192}, 8192, "backward"),
    ],
)
def test_blocks_that_exceed_vmem(sizes, length, kernel):
    """The message has the sizes, the bytes needed and there, and what would fit; what it says fits."""
    with pytest.raises(ValueError) as error:
        trace(sizes, length=length, backward=kernel == "backward")
    message = str(error.value)
    assert message.startswith("block_sizes: ") and f"bytes of VMEM in the {kernel} kernel (K=1, M=2, D=128" in message
    assert all(f"{name}={size}" in message for name, size in sizes.items() if "piece" not in name)
    need, limit = (
        int(x.replace(",", "")) for x in re.search(r"need ([\d,]+) bytes.* ([\d,]+) are there", message).groups()
    )
    assert limit == 100 * 2**20 < need and "are there on v5e" in message
    advice = re.search(r"on v5e: (.*) fits", message).group(1).split(" or ")
    for name, size in (x.split("=") for x in advice):
        trace(sizes | {name: int(size)}, length=length, backward=kernel == "backward")


def test_tuned_blocks_shrink_until_they_fit():
    """Many experts, wide heads, float32: whoever gives no sizes gets some that fit, on the smallest TPU too."""
    for generation in GENERATIONS:
        for sizes in ({"num_experts": 16, "num_slots": 8}, {"head_dim": 256, "norm_dim": 256, "dtype": np.dtype("f4")}):
            plan = make_plan(generation, **sizes)
            assert forward_bytes(plan, plan.blocks) <= plan.vmem_limit_bytes
            blocks = plan.backward_blocks
            fixed, each = backward_bytes(plan, blocks.block_q, blocks.block_kv, blocks.piece_q, blocks.piece_kv)
            assert fixed + blocks.chunk_q * each <= plan.vmem_limit_bytes


def make_plan(generation="v5e", length=65536, sizes=None, **changes):
    """Of a causal call with a rotary embedding, G = 8."""
    counts = {"batch": 1, "num_groups": 8, "num_experts": 2, "num_slots": 1, "head_dim": 128, "norm_dim": 128}
    options = {
        "groups_per_block": 1,
        "rope_batch": 1,
        "norm_eps": 0.0,
        "scale": 1.0,
        "softcap": None,
        "interpret": False,
    }
    mask = MaskKind(causal=True, window=None, aligned=True, has_length=False, has_segments=False)
    fields = counts | options | {"dtype": jnp.dtype(jnp.bfloat16), "q_len": length, "kv_len": length} | changes
    return KernelPlan(**fields, mask=mask, generation=generation, block_sizes=BlockSizes(**(sizes or {})))


def call_with(sizes, experts, slots, dtype, backward):
    """See `tpu_targets`: long enough that XLA keeps no operand in VMEM by itself."""
    shapes = (1, 65536, 8, experts, 128), (1, 65536, 8, 128), (1, 65536, 8, slots), (1, 65536, 64)
    q, k, index, angles = map(jax.ShapeDtypeStruct, shapes, (dtype, dtype, "int32", "float32"))

    def call(q, k, v, index, cos, sin):
        def attention(q, k, v):
            blocks = BlockSizes(**sizes)
            return attend(q, k, v, index, q_rope=(cos, sin), implementation="pallas_tpu", block_sizes=blocks)

        o, vjp = jax.vjp(attention, q, k, v)
        return vjp(o) if backward else o

    return call, (q, k, k, index, angles, angles)


@pytest.mark.slow
def test_estimates_agree_with_the_compiler():
    """What libtpu says that each kernel takes is at most the estimate, and not far below it: near the limit too, where
    an estimate that is too low would be a compiler's error in place of ours."""
    pytest.importorskip("libtpu")
    cases = [
        ("v5e", {}, 2, 1, "bfloat16", False),
        ("v6e", {}, 2, 1, "bfloat16", False),
        ("v5e", NEAR_LIMIT, 2, 1, "bfloat16", False),
        ("v6e", NEAR_LIMIT | {"block_q": 1024}, 2, 1, "bfloat16", False),
        ("v5e", {"block_q": 512, "tile": 2048}, 4, 2, "bfloat16", False),
        ("v5e", {"block_q": 512}, 2, 1, "float32", False),
        ("v5e", {}, 2, 1, "bfloat16", True),
        ("v4", {}, 16, 8, "bfloat16", True),
    ]
    names = ("sizes", "experts", "slots", "dtype", "backward")
    jobs = [
        Job(target, "test_kernels_tpu_blocks:call_with", dict(zip(names, case, strict=True)), schedules=False)
        for target, *case in cases
    ]
    for (target, sizes, experts, slots, dtype, backward), result in zip(cases, compile_all(jobs), strict=True):
        assert isinstance(result, Compiled), result
        kernels = [line for line in result.hlo.splitlines() if "tpu_custom_call" in line]
        size = re.compile(r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)"')
        used = [int(size.search(kernel).group(1)) for kernel in kernels]
        plan = make_plan(target, sizes=sizes, num_experts=experts, num_slots=slots, dtype=jnp.dtype(dtype))
        estimates = [(forward_bytes(plan, plan.blocks), 1.1)]
        if backward:
            blocks = plan.backward_blocks
            fixed, each = backward_bytes(plan, blocks.block_q, blocks.block_kv, blocks.piece_q, blocks.piece_kv)
            estimates.append((fixed + blocks.chunk_q * each, 1.35))
        assert len(used) == len(estimates)
        for (estimate, margin), taken in zip(sorted(estimates), sorted(used), strict=True):
            assert taken <= estimate <= margin * taken, (target, sizes, dtype, taken, estimate)
            assert estimate <= plan.vmem_limit_bytes


def test_what_no_tpu_kernel_should_compute_is_left_to_xla(monkeypatch):
    """71 heads in one group are straight code for minutes of compiling, and 8 of 64 experts exceed v4's memory only."""
    call = dataclasses.replace(CALL, num_runs=1, num_kv_heads=1, block_sizes=False)
    choice = choose("tpu", dataclasses.replace(call, num_experts=71, num_slots=71, head_dim=64, value_dim=64))
    assert choice.name == "xla" and "at most 32 heads of a KV group at one time, not 71" in choice.why
    for generation, name in (("v4", "xla"), ("v5e", "pallas_tpu")):
        monkeypatch.setattr(pallas_tpu_module, "tpu_generation", lambda generation=generation: generation)
        choice = choose("tpu", dataclasses.replace(call, num_experts=64, num_slots=8))
        assert choice.name == name and (name != "xla" or "bytes of VMEM" in choice.why)
    monkeypatch.setattr(pallas_tpu_module, "tpu_generation", lambda: find_generation("v9").name)
    choice = choose("tpu", call)
    assert choice.name == "xla" and "TPU generation 'v9' is unknown" in choice.why
