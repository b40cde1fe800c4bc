"""The table of TPU generations."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.tpu import GENERATIONS, UnknownGeneration, find_generation

CASES = [(name, kind) for name, generation in GENERATIONS.items() for kind in generation.device_kinds]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_facts_agree_with_those_of_jax(name, kind):
    """JAX's own table of chips has the same cores: peak (rounded there), VMEM, number and width of matrix units."""
    generation = GENERATIONS[name]
    cores = 2 if generation.megacore else 1
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        core = pltpu.get_tpu_info()
    assert find_generation(kind) is generation and find_generation(str(core.chip_version)) is generation
    assert generation.vmem == core.vmem_capacity_bytes > generation.kernel_vmem
    assert (generation.matrix_units, generation.matrix_unit_width) == (core.num_mxus, core.mxu_column_size)
    assert generation.peak_flops["bfloat16"] == pytest.approx(cores * core.bf16_ops_per_second, rel=0.01)


def test_each_spelling_means_one_generation():
    """In capitals or not; no generation takes another's."""
    for generation in GENERATIONS.values():
        for spelling in (generation.name, *generation.spellings, *generation.device_kinds):
            assert find_generation(spelling) is find_generation(spelling.upper()) is generation
    assert find_generation("v5litepod") is GENERATIONS["v5e"] and find_generation("7x") is GENERATIONS["tpu7x"]


def test_an_unknown_generation_is_refused():
    """The message has every name, and how else each may be written."""
    with pytest.raises(UnknownGeneration, match=r"'TPU v9' is unknown: use one of v4 \(also TPU v4\); v5e \(also"):
        find_generation("TPU v9")
