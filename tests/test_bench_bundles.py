"""How kernels are counted: dumps of bundles are taken apart, and the scalar unit's instructions executed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.aot import bundles
from gqe_jax.aot.scalar_unit import count_visits, words
from gqe_jax.aot.traced_kernels import kernel_calls

# In libtpu's format: for each i < 4 a loop of rows[i] trips with a matmul, left out where rows[i] == 0; v4 has one
# delay slot behind each branch.
DUMP = """
= control target key end

     0   :  { %s9_s0 = inlined_call_operand.hbm [shape: s32[4], index: 0, kind: input, shape index: {}]  ;;\
  %s8_s9 = inlined_call_operand.hbm [shape: bf16[64,128], index: 1, kind: input, shape index: {}] }
   0x1   :  { %s20_s1 = smov [#allocation3] /* materialized constant */  ;;  %s7_s2 = sshll.u32 %s9_s0, 4 }
   0x2   :  { %10 = dma.hbm_to_smem /*hbm=*/%s7_s2, /*size_in_granules=*/1, /*smem=*/%s20_s1, \
/*dst_syncflagno=*/[#allocation2] }
   0x3   :  { %s30_s5 = smov 0 /* copy for cssa */ }
   0x4 LB: > { %s31_s5 = sphi %s30_s5, %s40_s5 /* phi copy */  ;;  %v1_v1 = vld [vmem:[%s8_s9] sm:$0xff] }
   0x5   : > { %99 = sst [smem:[#allocation7_spill]] %s31_s5  ;;  %s32_s6 = sld [smem:[#allocation3 + %s31_s5]] }
   0x6   : > {}
   0x7   : > { %p33_p0 = scmp.le.s32.totalorder %s32_s6, 0 }
   0x8   : > { %34 = sbr.rel (%p33_p0) target bundleno = 16 (0x10), region = 9 }
   0x9   : > { %s35_s7 = smov (!%p33_p0), 0 }
   0xa LB: >> { %s36_s7 = sphi %s35_s7, %s37_s7  ;;  %50 = vmatmul.bf16.gmra.mxu0 %v1_v1 /* vmatmul twice? no */ }
   0xb   : >> { %s37_s7 = sadd.s32 1, %s36_s7  ;;  %60 = vst [vmem:[#allocation461_spill] sm:$0xff] \
/*vst_source=*/%v1_v1 }
   0xc   : >> { %p38_p1 = scmp.ge.s32.totalorder %s37_s7, %s32_s6  ;;  %v2_v2 = vsel /*vm=*/%vm1_vm0, %v1_v1, 0.0 }
   0xd   : >> {}
   0xe   : >> { %39 = sbr.rel (!%p38_p1) target bundleno = 10 (0xa), region = 8 }
   0xf   : >> {} /* End region 8 */
  0x10 PF: > { %s41_s8 = sld [smem:[#allocation7_spill]] }
  0x11   : > { %s40_s5 = sadd.s32 1, %s41_s8 }
  0x12   : > { %p42_p2 = scmp.ge.s32.totalorder %s40_s5, 4 }
  0x13   : > { %43 = sbr.rel (!%p42_p2) target bundleno = 4 (0x4), region = 3 }
  0x14   : > {}
  0x15   :  { %44 = vsyncpa [#allocation6], 1 }
"""


@pytest.mark.parametrize("rows", [[3, 0, 2, 5], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_visits_follow_the_prefetched_data(rows):
    """Every block's visits are those of the program written out: the loop runs rows[i] times, and not at all for 0."""
    blocks = count_visits(bundles.parse(DUMP, "v4"), {0: np.array(rows, np.int32)})
    assert {block.address: block.visits for block in blocks} == {
        "0": 1,
        "0x4": 4,
        "0xa": sum(rows),
        "0x10": 4,
        "0x15": 1,
    }


def test_costs_of_a_block():
    """The loop: 6 bundles of which 2 are empty, one of them a delay slot, which costs a cycle whatever it holds.

    16 rows of bfloat16 on four units of a row a cycle are 4 cycles. The first empty bundle is a wait, no instruction.
    """
    loop = next(block for block in bundles.parse(DUMP, "v4").blocks if block.address == "0xa")
    assert (loop.bundles, loop.scheduled, loop.mxu_cycles, loop.spills, loop.selects) == (5, 6, 4, 1, 1)
    assert loop.bound == 5


@pytest.mark.parametrize(("kind", "place"), [("kRem", 0), ("kQuot", 0), ("kDivAndRem", 0), ("kDivAndRem", 1)])
def test_division(kind, place):
    """A division leaves its remainder, its quotient, or the quotient and then the remainder; here of rows[i] by 3."""
    rows = [7, 5, 2, 9]
    pops = "".join(f"  ;;  %s{7 + n}{n}_s6 = spop.drf %31" for n in range(place + 1))
    load = "%s32_s6 = sld [smem:[#allocation3 + %s31_s5]]"
    division = f"{load.replace('s32', 's33')}  ;;  %31 = sdivrem.u32 %s33_s6, 3 /* {kind} */"
    dump = DUMP.replace(load, division + pops.replace(f"%s{7 + place}{place}_s6", "%s32_s6"))
    blocks = count_visits(bundles.parse(dump, "v4"), {0: np.array(rows, np.int32)})
    trips = [row % 3 if kind == "kRem" or place == 1 else row // 3 for row in rows]
    assert next(block.visits for block in blocks if block.address == "0xa") == sum(trips)


def test_operands_of_one_element():
    """An array of one element comes as its value, in no memory: here the trips of every loop."""
    dump = DUMP.replace("operand.hbm [shape: s32[4]", "operand.<no memory space> [shape: s32[1]")
    dump = dump.replace("%s32_s6 = sld [smem:[#allocation3 + %s31_s5]]", "%s32_s6 = smov %s9_s0")
    blocks = count_visits(bundles.parse(dump, "v4"), {0: np.array([6], np.int32)})
    assert next(block.visits for block in blocks if block.address == "0xa") == 4 * 6


def test_operands_that_decide_branches_are_asked_for():
    with pytest.raises(ValueError, match="the values of operand 0, which decides branches, are not given"):
        count_visits(bundles.parse(DUMP, "v4"), {})


def test_branches_on_vector_data_are_refused():
    """A number of trips that comes out of a vector register cannot be known without data: no count may be made up."""
    dump = DUMP.replace("%s32_s6 = sld [smem:[#allocation3 + %s31_s5]]", "%s32_s6 = spop %v1_v1")
    with pytest.raises(ValueError, match="a branch depends on spop"):
        count_visits(bundles.parse(dump, "v4"), {0: np.ones(4, np.int32)})


def test_delay_slots_are_checked():
    """Another generation's slots would move instructions to the other side of a branch: that is noticed."""
    with pytest.raises(ValueError, match="v5e has 4 delay slots"):
        bundles.parse(DUMP, "v5e")


def test_packed_scalars():
    """Element [h, i, j] of 8 bits: tile (h, i // 8, j // 128), word (i % 8 // 4) · 128 + j % 128, byte i % 4."""
    values = np.random.default_rng(0).integers(-128, 128, (2, 11, 130)).astype(np.int8)
    memory = np.array(words(values, "s8[2,11,130]"), np.int32)
    h, i, j = np.indices(values.shape)
    tile = (h * 2 + i // 8) * 2 + j // 128
    word = memory[tile * 256 + i % 8 // 4 * 128 + j % 128]
    np.testing.assert_array_equal((word >> 8 * (i % 4)).astype(np.int8), values)


def test_rows_of_scalars():
    """Element [i, j] of 32 bits lies in tile (i // 8, j // 128), at (i % 8) · 128 + j % 128; one axis lies as it is."""
    values = np.random.default_rng(0).integers(-(2**31), 2**31, (9, 200)).astype(np.int32)
    memory = np.array(words(values, "s32[9,200]"))
    i, j = np.indices(values.shape)
    np.testing.assert_array_equal(memory[(i // 8 * 2 + j // 128) * 1024 + i % 8 * 128 + j % 128], values)
    assert words(values[0], "s32[200]") == values[0].tolist()


def test_unknown_places_of_scalars_are_refused():
    with pytest.raises(ValueError, match=r"where s16\[4\] lies in scalar memory is not known"):
        words(np.zeros(4, np.int16), "s16[4]")


@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_in_a_scan(reverse):
    """A kernel in a scan runs once for each trip, with that trip's scalar: a constant of the scan, 10, times what is
    carried on, the sum of the rows before, plus the trip's own row. What depends on arguments is not evaluated."""

    def kernel(scalar, x, o):
        o[...] = x[...] + scalar[0]

    def function(x):
        constant = jnp.full(1, 10)

        def trip(carry, row):
            total, x = carry
            grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=())
            x = pl.pallas_call(kernel, grid_spec=grid, out_shape=x, name="add")(constant * total + row, x)
            return (total + row, x), None

        return jax.lax.scan(trip, (jnp.zeros(1, jnp.int32), x), jnp.arange(1, 5)[:, None], reverse=reverse)[0][1]

    x = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    (call,) = kernel_calls(jax.make_jaxpr(function)(x))
    rows = [4, 3, 2, 1] if reverse else [1, 2, 3, 4]
    assert call.name == "add" and call.shapes == ("s32[1]", "s32[8,128]")
    assert [int(scalars[0][0]) for scalars in call.scalars] == [10 * sum(rows[:n]) + rows[n] for n in range(4)]
