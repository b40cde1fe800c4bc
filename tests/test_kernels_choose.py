"""Which implementation `attend` takes: by the platform that is compiled for and by the call, and said once."""

import importlib
import logging

import jax
import jax.numpy as jnp
import pytest
import tiny

from gqe_jax.attention import GQEConfig
from gqe_jax.cli import main as cli
from gqe_jax.config import ModelConfig, RunConfig
from gqe_jax.evaluate.kernel_report import layer_calls, report, training_line
from gqe_jax.kernels import attend
from gqe_jax.kernels.choose import Call, announce, check, choose, is_partitioned, target_platform

attend_module = importlib.import_module("gqe_jax.kernels.attend")
TRAIN = Call(
    batch=2, q_len=256, kv_len=256, num_runs=2, num_kv_heads=2, num_experts=2, num_slots=1, head_dim=128,
    value_dim=128, dtype="bfloat16",
)  # fmt: skip


def call(**changes):
    if "head_dim" in changes:
        changes = {"value_dim": changes["head_dim"], **changes}
    return Call(**(vars(TRAIN) | changes))


DECODE = call(q_len=1, kv_length=True, aligned=False)


def test_every_platform_has_its_kernels():
    """NVIDIA's GPUs take cuDNN's attention where it applies, TPUs the decode kernel for a token against a cache, CPUs
    and unknown platforms XLA; and everything that is chosen can be asked for by name."""
    assert choose("cpu", TRAIN).name == choose("rocm", TRAIN).name == choose("quantum", TRAIN).name == "xla"
    assert choose("gpu", TRAIN).name == "cudnn"
    assert choose("tpu", DECODE).name == "pallas_tpu_decode"
    assert choose("tpu", TRAIN).name == choose("tpu", call(dtype="float32", segments=True)).name == "pallas_tpu"
    for platform in ("cpu", "gpu", "tpu"):
        for one in (TRAIN, DECODE, call(dtype="float32"), call(head_dim=80), call(segments=True)):
            choice = choose(platform, one)
            assert check(choice.name, platform, one).name == choice.name
            assert choice.name in attend_module.IMPLEMENTATIONS and choice.why


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "cudnn takes bfloat16 and float16, not float32"),
        ({"head_dim": 20}, "cudnn needs a head_dim that is a multiple of 8 and at most 256, not 20"),
        ({"head_dim": 264}, "at most 256, not 264"),
        ({"head_dim": 192}, "cudnn takes head_dim=192 on GPUs of compute capability 9.0 or later only"),
        ({"softcap": True}, "cudnn has no soft cap"),
        ({"segments": True}, "JAX's call of cudnn cannot express segment ids"),
        ({"return_lse": True}, "JAX's call of cudnn rounds the log-sum-exp"),
        ({"kv_length": True}, "cudnn's masks know neither offsets nor a partly filled cache"),
        ({"aligned": False}, "cudnn's masks know neither offsets"),
        ({"kv_len": 300}, "cudnn's masks know neither offsets"),
        ({"causal": False, "window": 7}, "cudnn has a sliding window in causal attention only"),
    ],
)
def test_gpus_fall_back_to_xla_and_say_why(changes, reason, caplog):
    """Where cuDNN's attention does not apply, the reason is in the choice, in a warning of the log, and in the error of
    whoever asked for it by name."""
    choice = choose("gpu", call(**changes))
    assert choice.name == "xla" and choice.is_fallback and reason in choice.why
    announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="gqe_jax"):
        announce("gpu", call(**changes), choice)
        announce("gpu", call(**changes), choice)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and reason in record.getMessage() and "'xla'" in record.getMessage()
    with pytest.raises(ValueError) as error:
        check("cudnn", "gpu", call(**changes))
    assert reason in str(error.value) and "implementation=None would take 'xla' here" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_length": False}, "pallas_tpu_decode reads a cache: it needs kv_length"),
        ({"q_len": 33}, "pallas_tpu_decode takes few new tokens: S · R · K = 66 exceeds 64"),
        (
            {"num_runs": 9, "num_kv_heads": 9, "head_dim": 128, "value_dim": 128},
            "pallas_tpu_decode takes a power of two of rows for a token, or up to 7 times one, not 9",
        ),
        ({"segments": True}, "pallas_tpu_decode has no segment ids"),
        ({"dtype": "float16"}, "pallas_tpu_decode takes float32 and bfloat16, not float16"),
    ],
)
def test_the_decode_kernel_says_what_it_cannot_compute(changes, reason):
    """By name it raises; unnamed, something else is taken, and the reason is part of the choice."""
    changed = Call(**(vars(DECODE) | changes))
    with pytest.raises(ValueError) as error:
        check("pallas_tpu_decode", "tpu", changed)
    assert reason in str(error.value)
    choice = choose("tpu", changed)
    assert choice.name != "pallas_tpu_decode" and reason in choice.why


def arrays(length=8):
    x = jnp.ones((1, length, 2, 1, 8))
    return x, x[:, :, :, 0], x[:, :, :, 0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float16"}, "pallas_tpu takes float32 and bfloat16, not float16"),
        ({"head_dim": 320}, "pallas_tpu needs an even head_dim of at most 256, not 320"),
        ({"partitioned": True}, "XLA cannot split a Pallas kernel over devices: call it inside jax.shard_map"),
    ],
)
def test_tpus_fall_back_to_xla_and_say_why(changes, reason):
    """A Pallas kernel is one device's: where XLA would have to split it, it cannot be taken."""
    choice = choose("tpu", call(**changes))
    assert choice.name == "xla" and choice.is_fallback and reason in choice.why
    with pytest.raises(ValueError) as error:
        check("pallas_tpu", "tpu", call(**changes))
    assert reason in str(error.value)


@pytest.mark.parametrize("name", ["cudnn", "pallas_tpu", "pallas_tpu_decode"])
def test_asking_by_name_for_another_platform_s_kernel_raises(name):
    """Nothing is interpreted or replaced silently: the message says what the computation is for and what would run."""
    needs = "an NVIDIA GPU" if name == "cudnn" else "a TPU"
    with pytest.raises(ValueError) as error:
        attend(*arrays(), kv_length=jnp.array([8]), implementation=name)
    message = str(error.value)
    assert f"{name!r} cannot run: {name} needs {needs}, and this computation is for a CPU" in message
    assert message.endswith("implementation=None would take 'xla' here")


def test_the_choice_is_logged_once_per_shape(caplog):
    """One line for each distinct call, at INFO where nothing is amiss, also over many traces and eager calls."""
    announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="gqe_jax"):
        for _ in range(2):
            attend(*arrays(8))
            jax.jit(lambda *args: attend(*args))(*arrays(8))
        assert len(caplog.records) == 1
        attend(*arrays(9))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "attention on cpu takes 'xla': the fastest on a CPU; q [B=1, S=8, G=2, M=1, D=8]" in caplog.messages[0]


class Device:
    def __init__(self, platform, device_kind):
        self.platform, self.device_kind = platform, device_kind


@pytest.mark.parametrize(
    ("device", "platform"),
    [
        (Device("tpu", "TPU v5 lite"), "tpu"),
        (Device("gpu", "NVIDIA H100 80GB HBM3"), "gpu"),
        (Device("gpu", "AMD Instinct MI300X"), "rocm"),
        (Device("cpu", "cpu"), "cpu"),
    ],
)
def test_under_a_trace_the_mesh_decides(device, platform):
    """The devices of `jax.set_mesh` are those that a jitted function is lowered for, whatever this host has: here an
    abstract mesh of each kind. Concrete arrays are computed where they are."""
    abstract = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=None, platform=device.platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=abstract)
    seen = []

    def function(x):
        seen.append(target_platform(x))
        return x

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(function, jnp.ones(3))
        assert seen == [platform]
        assert target_platform(jnp.ones(3)) == "cpu"


def test_several_devices_of_a_mesh_count_outside_shard_map():
    """Within `jax.shard_map` each device runs its own kernel."""
    mesh = jax.sharding.AbstractMesh((4, 1), ("data", "expert"), (jax.sharding.AxisType.Auto,) * 2)
    seen = []

    def function(x):
        seen.append(is_partitioned())
        return x

    assert not is_partitioned()
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(function, jnp.ones(4))
        mapped = jax.shard_map(function, in_specs=jax.P("data"), out_specs=jax.P("data"))
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert seen == [True, False]


def test_without_a_mesh_the_default_device_decides():
    """`jax.default_device`, given as a device or as the name of a platform, and else the default backend."""
    assert target_platform() == jax.default_backend() == "cpu"
    for device in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(device):
            assert target_platform() == "cpu"


def test_the_form_for_cpus_is_not_compiled_for_a_tpu():
    """On CPUs `xla` has an exponential of its own, made of bits; traced on this CPU for a TPU it must not: that is the
    form for CPUs, whose products are in float32."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)

    def traced():
        return str(jax.make_jaxpr(lambda *qkv: attend(*qkv, implementation="xla"))(*arrays(32)))

    assert "bitcast_convert_type" in traced()
    with jax.sharding.use_abstract_mesh(mesh):
        assert "bitcast_convert_type" not in traced()


def test_inspect_kernels_says_which_and_why(capsys):
    """For a configuration's training, prefill and decode, on every platform, with the reasons."""
    assert cli.main(["inspect", "kernels", "--config", "gqe_250m:head_dim=128"]) == 0
    text = capsys.readouterr().out
    for phase in ("training, 512 rows of 2048 tokens", "prefill, 2048 tokens", "decode, 1 token against 2048"):
        assert phase in text
    assert "tpu  pallas_tpu_decode" in text and "cannot express segment ids" in text
    assert cli.main(["inspect", "kernels", "--config.model.attention.implementation=cudnn"]) == 0
    text = capsys.readouterr().out
    assert "the configuration names 'cudnn', but cudnn needs an NVIDIA GPU, and this computation is for a CPU" in text


def test_the_report_asks_what_the_layers_ask(monkeypatch):
    """The calls that `gqe inspect kernels` describes are those that a model's layers make: routed heads and shared
    head, in training and in decode, recorded where `attend` chooses."""


    asked = []

    def record(platform, call):
        asked.append(call)
        return choose(platform, call)

    monkeypatch.setattr(attend_module, "choose", record)
    layer = tiny.gqe(2, 2, 1)
    x = jnp.asarray(tiny.inputs(2, 12))
    jax.eval_shape(lambda: layer(x, segment_ids=jnp.ones((2, 12), int)))
    jax.eval_shape(lambda: layer(x[:, :1], cache=layer.init_cache(2, 24)))
    attention = GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=tiny.HEAD_DIM)
    model = ModelConfig(d_model=tiny.D_MODEL, context=24, dtype="float32", attention=attention)
    described = layer_calls(model, batch=2, q_len=12, cached=False) | {
        f"{kind}, decode": call for kind, call in layer_calls(model, batch=2, q_len=1, cached=True).items()
    }
    assert asked == list(described.values())


def test_training_says_its_choice_in_one_line():
    """With the reason; heads that take the same are named together."""
    config = RunConfig(model=ModelConfig(attention=GQEConfig(num_query_experts=16, num_kv_heads=8)))
    line = training_line(config.model, batch=4, q_len=64)
    assert line == "routed heads and shared head by xla (the fastest on a CPU)"
    assert "\n" not in line and report(config).count("cpu  xla") == 3
