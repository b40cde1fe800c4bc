"""A model spread over devices: the same numbers as on one, no more communication than named, the work shared evenly."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import layer_on_a_slice
import numpy as np
import on_meshes
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gqe_jax.aot.child import Child
from gqe_jax.attention import GQAConfig, GQEConfig, GQEMLAConfig, MLAConfig
from gqe_jax.config import ConfigError, MeshConfig, ModelConfig
from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.tpu.blocks import forward_blocks
from gqe_jax.kernels.tpu.schedule import is_bounded, make_schedule, row_bounds
from gqe_jax.models.transformer import abstract_model
from gqe_jax.parallel.mesh import check_batch, check_model, make_mesh, parse_mesh
from gqe_jax.parallel.rules import placed_variables, spec_of
from gqe_jax.parallel.zigzag import natural, zigzag
from gqe_jax.tpu import GENERATIONS


def run_on_eight_devices(function):
    """What a function of `on_meshes` prints as JSON, in a child process with eight CPU devices."""
    path = [str(pathlib.Path(on_meshes.__file__).parent), *filter(None, sys.path)]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",  # compiles faster
        "PYTHONPATH": os.pathsep.join(path),
    }
    command = [sys.executable, "-c", f"import on_meshes; on_meshes.{function}()"]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def differences():
    """How training on each mesh of `on_meshes` differs from one device."""
    return run_on_eight_devices("main")


@pytest.mark.slow
@pytest.mark.parametrize("case", on_meshes.CASES)
def test_every_mesh_gives_the_numbers_of_one_device(differences, case):
    """Devices only share out the work, whatever the axis: loss, every parameter's gradient, and five training steps
    with their noise (drawn for all devices at a time) agree to rounding. No token of the first batch has a tie close
    enough for rounding to decide it."""
    result = differences[case]
    assert differences["near_ties"] == 0
    assert result["losses"][0] <= 1e-5 and result["gradient"] <= 1e-5
    assert max(result["losses"]) <= 1e-4 and result["moved"] <= 1e-3


@pytest.mark.slow
def test_generation_over_expert(differences):
    """The cache is split by groups, and the shared head's scores are summed over devices; latents lie on each device:
    the same logits, prefilled and decoded token by token."""
    assert differences["generation"] <= 1e-5


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_zigzag_gives_every_device_the_same_causal_work(n):
    """Positions i see i + 1 keys; and `natural` undoes it."""
    positions = np.arange(4 * n)[None]
    dealt = zigzag(positions, n)
    work = (dealt + 1).reshape(n, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1
    np.testing.assert_array_equal(natural(dealt, n), positions)
    np.testing.assert_array_equal(natural(jnp.asarray(dealt), n), positions)


def test_zigzag_needs_two_chunks_for_each_device():
    with pytest.raises(ValueError, match="an axis of 12 tokens cannot be cut into 8 equal chunks, two for each device"):
        zigzag(np.zeros((1, 12)), 4)


def executed_pairs(q_len, kv_len, offset, num_slots):
    """(query, key) pairs whose scores the TPU kernel computes per slot, for a causal mask: whole units of keys for
    every block of queries, and on the diagonal of a plain causal call its parts."""
    mask = Mask(
        q_offset=jnp.full(1, offset, jnp.int32), kv_offset=jnp.zeros(1, jnp.int32), aligned=q_len == kv_len
    )
    blocks = forward_blocks("v5p", num_slots, q_len, kv_len, bounded=is_bounded(mask, q_len, kv_len))
    schedule = make_schedule(mask, q_len, kv_len, blocks.block_q, blocks.block_kv, blocks.unit)
    if schedule.folded:
        parts = blocks.block_q // blocks.diagonal_part
        below = sum(i * blocks.block_q**2 for i in range(schedule.num_q_blocks))
        return below + schedule.num_q_blocks * parts * (parts + 1) // 2 * blocks.diagonal_part**2
    first, _, _, end = np.asarray(row_bounds(mask, schedule))
    return int(((end - first) * blocks.unit * blocks.block_q).sum())


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [8192, 32768])
def test_attention_is_shared_out_evenly(devices, length):
    """gqe_8b: N = 32, G = 8, k = 2. The busiest device computes (k·G + 1) / n of a dense model's N heads, within 3%:
    routed slots lie with their groups, the shared head's queries in zigzag."""
    groups, slots, heads = 8, 2, 32
    routed = groups // devices * slots * executed_pairs(length, length, 0, slots)
    piece = length // (2 * devices)
    if devices == 1:
        shared = [executed_pairs(length, length, 0, 1)]
    else:
        shared = [
            sum(executed_pairs(piece, length, chunk * piece, 1) for chunk in (place, 2 * devices - 1 - place))
            for place in range(devices)
        ]
    dense = heads * executed_pairs(length, length, 0, 4)
    assert routed + max(shared) <= 1.03 * (slots * groups + 1) / heads / devices * dense


def test_parameters_have_one_place():
    """Every parameter of both kinds of model, with all options on, has a rule; groups, hidden width and vocabulary lie
    on `expert`, and every matrix is spread over `fsdp`."""
    options = {"num_kv_heads": 2, "head_dim": 8, "bias": True}
    for attention in (
        GQEConfig(num_query_experts=4, qk_norm=True, **options),
        GQAConfig(num_query_heads=4, qk_norm=True, **options),
        MLAConfig(num_query_heads=4, latent_dim=4, rope_dim=2, latent_norm=True, **options),
        GQEMLAConfig(num_query_experts=4, latent_dim=4, rope_dim=2, **options),
    ):
        model = ModelConfig(d_model=16, num_layers=2, d_ff=32, attention=attention, tie_embeddings=False)
        for name, placed in placed_variables(abstract_model(model)).items():
            axes, ndim = placed.axes, placed.variable.get_value().ndim
            assert len(axes) == ndim
            matrix = ndim - name.startswith("layers") > 1 and not name.endswith("bias")
            assert ("embed" in axes) == matrix, name
    assert spec_of((None, "embed", "group", None)) == P(None, ("fsdp", "context"), "expert", None)


def test_a_parameter_is_placed_by_what_its_own_module_says():
    """No name of a parameter decides where it lies: one that is called as the MLP's lies as its module says, and one
    that says nothing is refused by its path."""

    class Gated(nnx.Module):
        def __init__(self):
            self.gate_proj = nnx.Param(jnp.ones((2, 4)))
            self.placement = (("gate_proj", (None, "group")),)

    gated = Gated()
    assert placed_variables(gated)["gate_proj"].axes == (None, "group")
    gated.up_proj = nnx.Param(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"nobody says where the Param up_proj lies on a mesh: give its module an"):
        placed_variables(gated)


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=1, expert=3), "need 3 devices, but there are 1: make the product of the sizes 1, or set one"),
        (
            MeshConfig(expert=2),
            r"mesh.data=-1, .* need a multiple of 2 devices, but there are 1: make the product of the others a divisor",
        ),
    ],
)
def test_a_mesh_that_is_not_the_devices(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_mesh_that_a_search_proposes_can_be_made(generation):
    """Of one, two and four slices, with devices as libtpu describes them: JAX's default arrangement refuses most meshes
    of several slices, and gives a chip's two devices to `data`."""
    pytest.importorskip("libtpu", reason="describing TPUs needs libtpu: pip install 'jax[tpu]'")
    with Child() as child:
        counts = {child.call("every_mesh:proposed", generation=generation, slices=slices) for slices in (1, 2, 4)}
    assert len(counts) == 1 and counts.pop() > 100


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 0}, "mesh.data=0 is no number of devices: set mesh.data to at least 1, or to -1"),
        ({"expert": -1}, "mesh.data and mesh.expert are -1: only one axis can take what is left"),
    ],
)
def test_sizes_that_no_mesh_has(sizes, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**sizes)


def test_a_mesh_from_the_command_line():
    assert parse_mesh("fsdp=2,expert=4") == MeshConfig(data=1, fsdp=2, expert=4)
    for text in ("experts=4", "data", "data=two", ""):
        with pytest.raises(ConfigError, match=f"--mesh {text}: '{text}' is no AXIS=DEVICES: the axes are data, fs"):
            parse_mesh(text)


def abstract_mesh(**sizes):
    """Sizes stand for devices that this machine has not got; only they are read."""
    shape = {"data": 1, "fsdp": 1, "expert": 1, "context": 1} | sizes
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))


def test_a_model_that_does_not_divide():
    """All problems at once, each with the sizes that work."""
    attention = GQEConfig(num_query_experts=12, num_kv_heads=6, head_dim=8)
    model = ModelConfig(vocab_size=259, d_model=30, d_ff=64, attention=attention)
    with pytest.raises(ConfigError) as error:
        check_model(abstract_mesh(expert=4, fsdp=4), model)
    for text in (
        "mesh.expert=4 does not divide model.attention.num_kv_heads=6, whose groups it shares out: set it to one of 1, "
        "2, 3, 6",
        "mesh.expert=4 does not divide model.vocab_size=259: the next that fits is 260",
        "mesh.fsdp=4 × mesh.context=1, over which parameters are spread, do not divide model.d_model=30: choose ",
    ):
        assert text in str(error.value)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match=r"data.batch_size=6 .* is not a multiple of the 4 devices that share"):
        check_batch(abstract_mesh(data=2, fsdp=2), 6, 32)
    with pytest.raises(ConfigError, match=r"rows of 36 tokens do not divide into the 2 × mesh.context=8 pieces"):
        check_batch(abstract_mesh(context=4), 1, 36)


@pytest.fixture(scope="module")
def layer_alone():
    """What a layer without a model says and computes under meshes of eight devices."""
    return run_on_eight_devices("layer_alone")


def test_a_layer_in_zigzag_order_computes_what_one_device_does(layer_alone):
    """As the README has it, over `context`: tokens dealt out by `zigzag`, results put back by `natural`."""
    assert layer_alone["context"] <= 1e-5


def test_checkify_of_a_layer_under_a_mesh_can_be_traced(layer_alone):
    """JAX carries no checkify error through `shard_map` under `set_mesh`: there the layer makes no checks."""
    assert layer_alone["checkify"] == [None, None]


def test_a_layer_names_what_a_mesh_cannot_do(layer_alone):
    """The layer on its own, under a mesh: groups, chunks, caches, widths."""
    groups, rows, chunks, cache, width = layer_alone["errors"]
    assert "num_kv_heads=2 groups cannot be shared out over the 8 devices" in groups and "work are 1, 2" in groups
    assert "B=3 rows cannot be shared out over the 8 devices on `data` and `fsdp`" in rows
    assert "S=12 tokens do not divide into the 16 chunks" in chunks
    assert "a cache is not split along the sequence" in cache
    assert "the mesh's fsdp=8 devices do not divide 60, the size of axis 0 of the parameter" in width
    assert "kernel (60, 4, 8), which lies along them: choose divisors of 60, or make it a multiple of 8" in width


@pytest.fixture(scope="module")
def layer_collectives():
    """(kind of layer, with backward) → collectives of the layer over 8 TPUs, as [kind, axes, bytes]."""
    pytest.importorskip("libtpu", reason="not made for this Python")
    keys = [(kind, backward) for kind in ("gqe", "gqa") for backward in (False, True)]
    with Child() as child:
        return {key: child.call("layer_on_a_slice:collectives", kind=key[0], backward=key[1]) for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_over_expert_communicates_what_it_must(layer_collectives, backward):
    """In the program compiled for a TPU slice. Dense attention with its heads over devices (tensor parallelism) reduces
    y and, backward, dx: B·S·d each. GQE adds the mean of K and V, 2·B·T·D, the normaliser of ō, B·S, and the gradients
    of both; and the gradients of the parameters that every device holds, 3·d·D. Nothing else: routing and selection
    stay on the device, no queries, probabilities or outputs of heads are gathered or exchanged."""
    tokens = layer_on_a_slice.B * layer_on_a_slice.S
    d, dim = layer_on_a_slice.D_MODEL, layer_on_a_slice.D
    passes = 2 if backward else 1
    dense = passes * 2 * tokens * d
    extra = passes * (2 * 2 * tokens * dim + 4 * tokens) + (4 * 3 * d * dim if backward else 0)
    for kind, size in (("gqa", dense), ("gqe", dense + extra)):
        found = layer_collectives[kind, backward]
        assert {(name, tuple(axes)) for name, axes, _ in found} == {("all-reduce", ("expert",))}
        assert sum(bytes_ for _, _, bytes_ in found) == size
