"""`gqe plan`: what is read from a compiled program, the estimates beside it, and what cannot be planned."""

import dataclasses
import importlib.util
import math

import pytest

from gqe_jax.aot.topologies import topology
from gqe_jax.attention import GQAConfig
from gqe_jax.cli import main as cli
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.config_files import load_config
from gqe_jax.flops import parameter_count
from gqe_jax.plan import compile as plan_compile
from gqe_jax.plan import report
from gqe_jax.plan.collectives import NETWORK, Collective, kernel_calls, read_collectives
from gqe_jax.plan.compile import Request, compile_plan
from gqe_jax.plan.dense_twin import dense_twin
from gqe_jax.plan.memory import estimate
from gqe_jax.plan.roofline import Roofline, ici_seconds, roofline
from gqe_jax.plan.search import remedies, search
from gqe_jax.tpu import GIB

MESH = {"data": 2, "fsdp": 4, "expert": 1, "context": 1}  # device = 4 · data + fsdp

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (w: bf16[64,32]) -> bf16[16,32] {
  %w = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %scatter = bf16[16,32]{1,0:T(8,128)(2,1)} reduce-scatter(%w), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%step.1 (s1: bf16[16,32]) -> bf16[64,32] {
  %s1 = bf16[16,32] parameter(0)
  ROOT %spread.1 = bf16[64,32] all-gather(%s1), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%step.2 (s2: bf16[16,32]) -> bf16[64,32] {
  %s2 = bf16[16,32] parameter(0)
  ROOT %spread.2 = bf16[64,32] all-gather(%s2), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%all-reduce-scatter.3 (u: f32[8,16]) -> f32[2,16] {
  %u = f32[8,16]{1,0:T(8,128)} parameter(0)
  %reduced = f32[8,16] all-reduce(%u), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %shard = s32[] partition-id()
  ROOT %own = f32[2,16] dynamic-slice(%reduced, %shard, %shard), dynamic_slice_sizes={2,16}
}

%body (state: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %state = (s32[], bf16[16,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %gather-start = (bf16[16,32], bf16[64,32]{1,0:T(8,128)}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %gather-done = bf16[64,32] all-gather-done(%gather-start)
  %attention = bf16[64,32] custom-call(%gather-done), custom_call_target="tpu_custom_call"
  %async-collective-start.5 = bf16[64,32] fusion(%x), kind=kCustom, calls=%step.1
  %fused.2 = bf16[64,32] fusion(%x), kind=kCustom, calls=%step.2
  %scatter-start = ((bf16[64,32]), bf16[16,32], s32[]) async-start(%attention), calls=%wrapped
  %scatter-done = bf16[16,32] async-done(%scatter-start)
  ROOT %next = (s32[], bf16[16,32]) tuple(%i, %scatter-done)
}

%condition (state.1: (s32[], bf16[16,32])) -> pred[] {
  %state.1 = (s32[], bf16[16,32]) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (p: (s32[], bf16[16,32]), g: f32[10]) -> (f32[10], bf16[8]) {
  %p = (s32[], bf16[16,32]) parameter(0)
  %g = f32[10]{0:T(128)} parameter(1)
  %h = bf16[8]{0} constant({...})
  %loop = (s32[], bf16[16,32]) while(%p), condition=%condition, body=%body
  %both-start = (f32[10], bf16[8]) all-reduce-start(%g, %h), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add
  %both-done = (f32[10], bf16[8]) all-reduce-done(%both-start)
  %fused = f32[2,16] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %away = (f32[10], u32[], token[]) send(%g, %passed-token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3,4}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %callback = (f32[10], u32[], token[]) send(%g, %passed-token), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_host"}
  %passed-token = token[] after-all()
  %passed = f32[10] collective-permute(%g), source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  ROOT %out = (f32[10], bf16[8]) tuple(%passed, %h)
}
"""  # noqa: E501


def test_collectives_of_a_program():
    """A loop of three trips counts three times, and once what is in two pieces: a start and a done, or two fusions."""
    gathered, summed = 64 * 32 * 2, 10 * 4 + 8 * 2
    assert {(c.kind, c.axes): (c.count, c.hidden, c.size, c.sent) for c in read_collectives(HLO, MESH)} == {
        ("all-gather", ("fsdp",)): (3, 3, 3 * gathered, 3 * gathered * 3 // 4),
        ("all-gather", ("data",)): (3, 3, 3 * 2048, 3 * 1024),
        ("reduce-scatter", ("fsdp",)): (4, 3, 3 * gathered + 512, (3 * gathered + 512) * 3 // 4),
        ("all-reduce", ("data",)): (1, 1, summed, summed),  # of two devices: half of it, there and back
        ("collective-permute", ("fsdp",)): (1, 0, 40, 40),
        ("all-reduce", NETWORK): (1, 1, 40, 60),  # between four slices
    }
    assert kernel_calls(HLO) == 3


def test_a_loop_of_unknown_length_is_an_error():
    """A count that is silently too small would make a plan too good."""
    with pytest.raises(ValueError, match="how often the loop loop of the HLO text runs is not written in it"):
        read_collectives(HLO.replace("constant(3)", "copy(%j)"), MESH)
    with pytest.raises(ValueError, match="groups of devices in an unknown notation"):
        read_collectives(HLO.replace("[2,4]<=[8]", "new[2,4]"), MESH)
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_collectives("", MESH)


@pytest.fixture
def config():
    """Two dense layers on bytes: small enough to count by hand."""
    config = load_config("smoke:kind=gqa")
    attention = GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=64)
    model = dataclasses.replace(
        config.model, vocab_size=512, d_model=256, d_ff=512, num_layers=2, context=1024, attention=attention,
        dtype="bfloat16", remat="dots",
    )  # fmt: skip
    data = dataclasses.replace(config.data, batch_size=8)
    return dataclasses.replace(config, model=model, data=data, mesh=MeshConfig(data=2, fsdp=2))


def request(config, name="v5e:2x2", mode="train"):
    return Request(
        config=config, topology=name, mode=mode, batch_size=config.data.batch_size, seq_len=config.model.context
    )


def test_roofline_by_hand(config):
    """Six FLOPs for each weight and token, four and ten for each pair of positions, at the chip's peak."""
    where = topology("v5e:2x2")
    mesh = {"data": 2, "fsdp": 2, "expert": 1, "context": 1}
    times = roofline(config, where, mesh, "train", 8, 1024, {("fsdp",): 1.0})
    tokens, peak = 8 * 1024, 4 * 197e12
    weights = 2 * (256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 512)
    products = 6 * weights * tokens + 8 * 512 * 256 * tokens  # the logits once more
    assert times.matmul == pytest.approx(products / peak)
    pairs = 8 * 1024 * 1025 // 2
    # Forward two products, backward five; D = 64 fills half of a matrix unit of 128.
    assert times.attention == pytest.approx(2 * (2 + 5) * 2 * 2 * 4 * 64 * pairs / peak)
    assert times.model_flops == pytest.approx(6 * (weights + 512 * 256) * tokens + 3 * 4 * 2 * 4 * 64 * pairs)
    assert times.overlapped == 1.0 and times.serial == pytest.approx(1.0 + times.compute + times.hbm)
    assert times.mfu(2.0) == pytest.approx(times.model_flops / (2 * peak))


def test_decoding_reads_weights_and_cache_once(config):
    """One token for each row: what HBM moves is the weights and the keys and values of all rows."""
    mesh = {"data": 1, "fsdp": 1, "expert": 1, "context": 1}
    times = roofline(config, topology("v5e:2x2"), mesh, "decode", 8, 1024, {})
    weights = 2 * (512 * 256 + 2 * (256 * 64 * 12 + 3 * 256 * 512 + 2 * 256) + 256)  # the embedding is tied
    cache = 2 * 2 * 2 * 8 * 1024 * 2 * 64
    assert times.hbm * 819e9 == pytest.approx(weights + cache, rel=0.03)  # and one token's results


@pytest.mark.parametrize(
    ("name", "extents", "links"),
    [
        ("v5e:16x16", (16, 1), 2),  # a full dimension goes round: both ways
        ("v5e:16x16", (8, 1), 1),
        ("v5e:4x4", (4, 4), 2),  # the whole slice, whose dimensions do not go round
        ("v5p:4x4x4", (4, 4, 1), 2),  # one ring, which closes
        ("v5p:4x4x4", (4, 4, 4), 6),
        ("v5p:2x2x1", (2, 1, 1), 1),
    ],
)
def test_seconds_of_collectives(name, extents, links):
    """The links that an axis of the mesh can use are those of the dimensions it stretches over."""
    where = topology(name)
    collective = Collective(kind="all-reduce", axes=("data",), count=1, hidden=0, size=10**9, sent=2 * 10**9)
    assert ici_seconds(where, {"data": extents, "fsdp": (1,) * len(extents)}, [collective]) == {
        ("data",): pytest.approx(2e9 / (links * where.generation.link_bandwidth))
    }


def test_seconds_between_slices():
    """A chip sends what is summed over the slices through its share of the network: v5e, 25 Gbit/s."""
    collective = Collective(kind="all-reduce", axes=NETWORK, count=1, hidden=0, size=10**9, sent=10**9)
    seconds = ici_seconds(topology("2 x v5e:2x2"), {"data": (1, 1)}, [collective])
    assert seconds == {NETWORK: pytest.approx(8e9 / 25e9)}


def test_several_slices_lie_along_data():
    """A search for two slices has only meshes whose other axes fit one; each sums its gradients over the network."""
    found = search(dataclasses.replace(request(load_config("gqe_8b"), "v5p:4x4x4"), topology="2 x v5p:4x4x4"))
    for variant in found:
        mesh = variant.mesh
        assert math.prod(mesh.values()) == 128 and mesh["data"] % 2 == 0 and mesh["fsdp"] * mesh["expert"] <= 64
        assert variant.times.ici[NETWORK] > 0


def test_memory_estimate_by_hand(config):
    """Sixteen bytes for each parameter of a device's share, what `dots` keeps of each token, two copies of a chunk."""
    mesh = {"data": 1, "fsdp": 2, "expert": 2, "context": 1}
    parts = estimate(config, mesh, "train", 8, 1024)
    share = parameter_count(config.model)["total"] // 4
    assert (parts["parameters"], parts["moments"], parts["gradients"]) == (4 * share, 8 * share, 4 * share)
    # The block's input, the product of W_o whole; queries, keys, values and the MLP's hidden width in half; the outputs
    # of two heads with their log-sum-exps.
    width = 2 * (256 + 256 + 64 * (2 + 1 + 1) + 2 * 256) + 2 * 64 * 2 + 4 * 2
    assert parts["saved activations"] == 2 * 4 * 1024 * width
    for mode in ("prefill", "decode"):  # of all rows at a time
        in_parts = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2))
        assert estimate(in_parts, mesh, mode, 8, 1024)["cache"] == 2 * 2 * 2 * 4 * 1024 * 64


def test_search_finds_what_fits():
    """Every variant uses all devices, divides rows and groups, and fits; the first is the fastest."""
    config = load_config("gqe_8b")
    found = search(request(config, "v5p:4x4x4"))
    assert found == sorted(found, key=lambda variant: variant.times.serial) and len(found) > 10
    for variant in found:
        mesh, settings = variant.mesh, variant.request.config
        assert math.prod(mesh.values()) == 64 and 8 % mesh["expert"] == 0
        assert config.data.batch_size % (mesh["data"] * mesh["fsdp"] * settings.train.accumulate) == 0
        assert variant.memory < 95 * GIB
        assert settings.mesh == MeshConfig(**mesh)
    text = report.ranking(request(config, "v5p:4x4x4"), found)
    assert "512 rows of 8,192 tokens" in text and "--config.model.remat=dots" in text


def test_remedies_change_one_thing():
    """The whole batch of gqe_250m at a time does not fit 16 small chips; each remedy is an override that would do."""
    config = load_config("gqe_250m")
    mesh = {"data": 16, "fsdp": 1, "expert": 1, "context": 1}
    changes = [variant.overrides(config) for variant in remedies(request(config, "v5e:4x4"), mesh)]
    assert "--config.train.accumulate=4" in changes and all(len(change.split()) == 1 for change in changes)
    assert any("data.batch_size" in change for change in changes)


def test_dense_twin():
    """It differs in its attention alone, which has as many query heads as the other has experts."""
    config = load_config("gqe_250m")
    twin = dense_twin(config)
    dense = load_config("gqa_250m").model
    assert twin.model == dense and twin.data == config.data
    with pytest.raises(ConfigError, match="gqa_250m is dense itself"):
        dense_twin(load_config("gqa_250m"))


def test_comparison_shows_the_ratio(config):
    """The second plan over the first, term by term."""
    times = Roofline(matmul=0.001, attention=0.002, hbm=0.001, ici={}, model_flops=1e12, peak_flops=1e15)
    plans = []
    for factor in (1, 2):
        plan = object.__new__(report.Plan)
        plan.request, plan.collectives = request(config), []
        plan.compiled = plan_compile.Compiled(
            mesh=MESH, extents={}, inputs={}, arguments=factor * GIB, outputs=0, temporaries=0, aliased=0, code=0,
            hlo="", lower_seconds=0, compile_seconds=0,
        )  # fmt: skip
        plan.roofline = dataclasses.replace(times, attention=factor * times.attention)
        plans.append(plan)
    lines = report.comparison(*plans).splitlines()
    assert [line.split()[-3:] for line in lines if "attention, ms" in line] == [["2.00", "4.00", "2.00"]]
    assert [line.split()[-3:] for line in lines if "peak memory" in line] == [["1.00", "2.00", "2.00"]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--topology", "v5e:3x3"], "--topology=v5e:3x3 is unknown: choose GENERATION:CHIPS from"),
        (["--topology", "v9:2x2"], "v5p: 1x1x1, 2x2x1, 2x2x2"),
        (["--topology", "v5e:2x2", "--mode", "decode", "--search"], "--search ranks training steps: drop it, or"),
        (["--topology", "v5e:2x2", "--hlo", "x", "--search"], "--hlo=x is for one program: drop it"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices=0 must lie in [1, 1024]"),
        (["--topology", "v5e:2x2", "--slices", "3", "--config.mesh.data=2"], "need 2 devices, but there are 12"),
        (["--topology", "v5e:2x2", "--batch-size", "0"], "--batch-size=0 must be at least 1: raise it"),
        (["--topology", "v5e:2x2", "--compare", "gqa", "--config.model.attention.kind=gqa"], "config"),
    ],
)
def test_errors(arguments, text, capsys):
    """Each ends with exit code 2 and says what would do, before anything is compiled."""
    assert cli.main(["plan", "--config", "smoke", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_without_libtpu(monkeypatch):
    """The message names the extra that brings it."""

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu, which compiles for TPUs, is not installed: pip install"):
        compile_plan(request(load_config("smoke", [])))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--mode decode --config.mesh.context=2 --batch-size 2", "mesh.context=2: a cache is not split along the"),
        ("--batch-size 7", "is not a multiple of the 4 devices that share a batch"),
        ("--config.mesh.expert=4", "mesh.expert=4 does not divide model.attention.num_kv_heads=2"),
    ],
)
def test_what_the_mesh_cannot_split(arguments, text, capsys):
    """The child process hands its errors on as they are: one paragraph and exit code 2."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'")
    assert cli.main(["plan", "--config", "smoke", "--topology", "v5e:2x2", *arguments.split()]) == 2
    assert text in capsys.readouterr().err


def test_the_compilers_message():
    """What was needed and what there is are read from it."""
    message = "RESOURCE_EXHAUSTED: ... required for HLO temporaries (30.34G) exceeds available HBM (15.75G)."
    found = plan_compile._out_of_memory(message)
    assert (found["needed"] / GIB, found["available"] / GIB) == (pytest.approx(30.34), pytest.approx(15.75))


def test_slices_of_one_chip(capsys):
    """The smallest machine that one can rent: the whole step is compiled for it, with nothing to communicate."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'")
    small = ["model.vocab_size=512", "model.num_layers=2", "data.batch_size=8"]
    overrides = [f"--config.{x}" for x in small]
    assert cli.main(["plan", "--config", "smoke", "--topology", "TPU v5 lite:1x1", "--mode", "decode", *overrides]) == 0
    text = capsys.readouterr().out
    assert text.startswith("smoke_gqe on v5e:1x1, ") and "fits" in text and "no collectives" in text


@pytest.mark.slow
def test_a_compiled_step():
    """Bytes of the arguments as counted from shapes, kernels for all attention, one reduction of y per half layer."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'")
    config = load_config("smoke", [
        "model.vocab_size=512", "model.num_layers=3", "model.dtype='bfloat16'", "data.batch_size=8", "mesh.fsdp=2",
        "mesh.expert=2", "mesh.data=1", "model.remat='attention'",
    ])  # fmt: skip
    plan = report.Plan(request(config), compile_plan(request(config)))
    parameters = parameter_count(config.model)["total"]
    assert plan.compiled.inputs["parameters"] == pytest.approx(parameters, rel=0.1)  # a quarter, four bytes each
    assert plan.compiled.inputs["optimizer"] == pytest.approx(2 * parameters, rel=0.1)
    assert plan.compiled.inputs["batch"] == 4 * 512 * (4 * 4 + 1)
    assert kernel_calls(plan.compiled.hlo) % 3 == 0 and kernel_calls(plan.compiled.hlo) >= 3 * 4
    found = {(c.kind, c.axes): c for c in plan.collectives}
    assert not [c for c in plan.collectives if c.kind == "all-to-all"]
    hidden = 4 * 512 * 192 * 2
    expert = found["all-reduce", ("expert",)]
    assert expert.size >= 3 * 4 * hidden  # y of attention and MLP, and the gradients of their inputs
    text = str(plan)
    assert text.startswith("smoke_gqe on v5e:2x2, fsdp 2 × expert 2\n") and "fits" in text and "MFU" in text
