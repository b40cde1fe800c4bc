"""The configuration: complete round trips, rules with their messages, and what every config file describes."""

import importlib
import json

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from gqe_jax import flops
from gqe_jax.attention import GQEConfig, RouterConfig
from gqe_jax.config import IMPLEMENTATIONS, ConfigError, OptimizerConfig, RopeScaling
from gqe_jax.config_dict import build, defaults, to_dict
from gqe_jax.config_files import load_config, shipped_configs
from gqe_jax.train.step import Step

attend_module = importlib.import_module("gqe_jax.kernels.attend")  # `attend` is also the function's name


def documented(path):
    """The config alone, and with its laptop-sized switch where the file speaks of one."""
    return [path.stem] + [f"{path.stem}:laptop"] * (f"{path.stem}:laptop" in path.read_text())


SHIPPED = [spec for path in shipped_configs().values() for spec in documented(path)]


@pytest.mark.parametrize("spec", SHIPPED)
def test_round_trip(spec):
    """A checkpoint holds the configuration as JSON; what is built from that must be the configuration."""
    config = load_config(spec)
    assert build(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GQEConfig(num_query_experts=4, num_kv_heads=2, variant="gqee"), "variant='gqee' is unknown: use"),
        (lambda: RouterConfig(kind="topk"), "kind='topk' is unknown: use one of 'learned', 'fixed', 'random'"),
        (lambda: RopeScaling(kind="ntk", factor=2.0), "kind='ntk' is unknown: use one of 'none', 'linear'"),
        (lambda: OptimizerConfig(clip="zlip"), "clip='zlip' is unknown: use one of 'zclip', 'norm', 'none'"),
        (lambda: OptimizerConfig(eps=0.0), "eps=0.0 must be positive: set eps to a value above 0"),
    ],
)
def test_made_in_python_they_are_checked_as_well(make, text):
    """The layers' users never see a config file: a misspelt option must not silently mean another one."""
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize("spec", SHIPPED)
def test_every_config_lowers(spec):
    """Initialisation and a training step have shapes that fit, without an array being made; the parameters are as many
    as the analytic count says."""
    config = load_config(spec)
    step = Step(config)
    state = jax.eval_shape(step.init)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert parameters == flops.parameter_count(config.model)["total"]

    shape = (config.data.batch_size, config.model.context)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["mask"] = jax.ShapeDtypeStruct(shape, jnp.bool)
    after, metrics = jax.eval_shape(step.train, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


RULES = [
    ({"model.attention.top_k": 3, "model.attention.num_query_experts": 16, "model.attention.num_kv_heads": 8},
     "in config.model.attention: top_k=3 exceeds experts_per_group=2 (num_query_experts=16 / num_kv_heads=8): lower "
     "top_k or raise num_query_experts"),
    ({"model.attention.top_k": 0}, "in config.model.attention: top_k=0 must be positive: set top_k to at least 1"),
    ({"model.attention.num_kv_heads": 3},
     "in config.model.attention: num_query_experts=16 is not a multiple of num_kv_heads=3: every KV group needs the "
     "same number of query heads; change either"),
    ({"model.attention.num_kv_heads": 0}, "num_kv_heads=0 must be positive"),
    ({"model.attention.head_dim": 7},
     "in config.model.attention: head_dim=7 is odd, but rotary embedding (rope_theta=10000.0) turns pairs of "
     "dimensions: make head_dim even, or set rope_theta=None"),
    ({"model.d_model": 48}, "head_dim=3 is odd"),
    ({"model.d_model": 100}, "head_dim=None means d_model / num_query_experts, but 100 / 16 is no integer"),
    ({"model.attention.rope_theta": None, "model.attention.rope_scaling.kind": "yarn"}, "has nothing to scale"),
    ({"model.attention.variant": "gqa"},
     "in config.model.attention: variant='gqa' is unknown: use one of 'gqe', 'hard_concat', 'weighted_concat'"),
    ({"model.attention.kind": "mha"}, "model.attention.kind='mha' is unknown: use one of 'gqe', 'gqa'"),
    ({"model.attention.implementation": "cuda"}, "implementation='cuda' is unknown"),
    ({"model.attention.router.kind": "fixed", "model.attention.router.jitter": 0.1}, "has nothing to learn"),
    ({"model.num_layers": 0}, "in config.model: num_layers=0 must be positive: set num_layers to at least 1"),
    ({"data.batch_size": 6, "train.accumulate": 4},
     "data.batch_size=6 is not a multiple of train.accumulate=4: every microbatch needs the same number of rows; "
     "change either"),
    ({"train.steps": 150},
     "optimizer.warmup_steps=100 + decay_steps=100 exceed train.steps=150: shorten warm-up or decay, or train longer"),
    ({"train.steps": 0}, "in config.train: steps=0 must be positive: set steps to at least 1"),
    ({"train.seed": -1}, "train.seed=-1 must lie in [0, 2**32): choose another seed"),
    ({"data.seed": 2**32}, "data.seed=4294967296 must lie in [0, 2**32): choose another seed"),
    ({"optimizer.b2": 1.0}, "b2=1.0 must lie in [0, 1)"),
    ({"optimizer.learning_rate": float("nan")},
     "optimizer.learning_rate=nan must be a finite number: correct the value"),
    ({"optimizer.warmup_steps": -1}, "optimizer.warmup_steps=-1 must not be negative: set it to 0 or more"),
    ({"model.attention.window": 0},
     "window=0 must be positive: set window to at least 1, or to None for all tokens before"),
    ({"model.attention.head_dim": 0}, "head_dim to at least 1, or to None for d_model / query heads"),
    ({"model.attention.rope_theta": -5.0},
     "rope_theta=-5.0 must be positive: set rope_theta to a value above 0, or to None for no rotary embedding"),
    ({"model.attention.softcap": -1.0},
     "softcap=-1.0 must be positive: set softcap to a value above 0, or to None for no cap"),
    ({"mesh.fsdp": 0},
     "mesh.fsdp=0 is no number of devices: set mesh.fsdp to at least 1, or to -1 for what the other axes leave"),
    ({"optimizer.min_learning_rate": 1.0}, "min_learning_rate=1.0 exceeds learning_rate=0.0005: lower the floor"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", RULES, ids=[message.partition(":")[0][:40] for _, message in RULES])
def test_rules(changes, message):
    """Field, value, rule and remedy."""
    config = defaults(num_query_experts=16, num_kv_heads=8)
    for name, value in changes.items():
        with config.ignore_type():
            config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError) as error:
        build(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_keys_and_types():
    """Unknown keys come with the nearest name; types are those of the fields, but an integer will do as a float."""
    for mapping, message in [
        ({"modle": {}}, "unknown config key 'modle': did you mean 'model'?"),
        ({"train": {"step": 3}}, "unknown config key 'train.step': did you mean 'steps'?"),
        ({"model": {"attention": {"kind": "gqa", "num_query_heads": 4, "num_kv_heads": 2, "top_k": 1}}},
         "unknown config key 'model.attention.top_k' for attention.kind='gqa'"),
        ({"model": {"attention": {"kind": "gqe", "num_kv_heads": 2}}},
         "config key 'model.attention.num_query_experts' is missing: set it"),
        ({"train": {"steps": "3"}}, "train.steps='3' has type str, but must be int: correct the value"),
        ({"train": {"steps": 3.0}}, "train.steps=3.0 has type float, but must be int"),
        ({"train": {"steps": True}}, "train.steps=True has type bool, but must be int"),
        ({"train": {"wandb": 1}}, "train.wandb=1 has type int, but must be bool"),
        ({"model": 3}, "model=3 must be a group of keys"),
        ({"model": {"attention": 3}}, "model.attention=3 must be a group of keys"),
        ({"model": {"attention": {"kind": ["gqe"]}}}, "model.attention.kind=['gqe'] is unknown"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as error:
            build(mapping)
        assert message in str(error.value)
    assert build({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate == 1.0


def test_implementations_are_those_of_attend():
    """The configuration is imported by the kernels, so it names them itself."""
    assert set(IMPLEMENTATIONS) == set(attend_module.IMPLEMENTATIONS)


def test_defaults_are_the_default_run():
    """A file that changes nothing gives the defaults of `RunConfig`."""
    assert build(defaults(num_query_experts=16, num_kv_heads=8)) == build({})
    assert isinstance(defaults(kind="gqa", num_query_heads=4, num_kv_heads=2), ml_collections.ConfigDict)
