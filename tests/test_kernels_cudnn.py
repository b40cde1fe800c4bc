"""Attention by cuDNN, on a CPU: everything up to the call, the call's lowering for a GPU; the call itself needs one."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import attention, relative_error

from gqe_jax.kernels import attend

attend_module = importlib.import_module("gqe_jax.kernels.attend")


def inputs(dtype="bfloat16", batch=2, length=24, num_groups=2, num_experts=3, num_slots=2, head_dim=16):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    order = np.argsort(rng.random((batch, length, num_groups, num_experts)), axis=-1)
    kv = batch, length, num_groups, head_dim
    q, do = normal(*kv[:3], num_experts, head_dim), normal(*kv[:3], num_slots, head_dim)
    return q, normal(*kv), normal(*kv), jnp.asarray(order[..., :num_slots], jnp.int32), do


@pytest.fixture
def on_gpu(monkeypatch):
    """`attend` chooses as on an NVIDIA GPU."""
    monkeypatch.setattr(attend_module, "target_platform", lambda array: "gpu")


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({}, {}),
        ({}, {"causal": False}),
        ({}, {"window": 5}),
        ({}, {"scale": 0.7}),
        ({}, {"q_offset": 3, "kv_offset": 3}),
        ({"num_slots": 1, "num_groups": 1}, {}),
    ],
    ids=str,
)
def test_the_arguments_of_the_call_mean_what_attend_means(on_gpu, monkeypatch, shapes, options):
    """JAX's call has an XLA form that takes the same arguments: with it in cuDNN's place, outputs and gradients are
    those of float64 attention. So heads are in the right order, the window has the right edge, the mask the right
    corner."""
    call = jax.nn.dot_product_attention
    asked = []

    def in_place_of_cudnn(*args, implementation, **kwargs):
        asked.append(implementation)
        return call(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_place_of_cudnn)
    q, k, v, expert_index, do = inputs(**shapes)
    o, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, expert_index, **options), q, k, v)
    assert asked == ["cudnn"]
    expected = attention(q, k, v, np.asarray(expert_index), do=do, **options)
    for name, actual in zip(("o", "dq", "dk", "dv"), (o, *vjp(do)), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert relative_error(actual, expected[name]) <= 1e-2, name


def test_it_lowers_to_cudnn_s_kernels_forward_and_backward(on_gpu, monkeypatch):
    """For a CUDA target, without a GPU: the program holds cuDNN's forward and its backward, on G · K query heads and G
    KV heads, and no S × S array."""
    stablehlo = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)  # of a host that has cuDNN
    q, k, v, expert_index, do = inputs(length=256, head_dim=64)

    def function(q, k, v, do):
        o, vjp = jax.vjp(functools.partial(attend, expert_index=expert_index), q, k, v)
        return o, *vjp(do)

    text = jax.jit(function).trace(q, k, v, do).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert '"CAUSAL"' in text.replace("\\22", '"') and "tensor<2x256x4x64xbf16>" in text
    assert "256x256" not in text


def test_layers_without_an_obstacle_use_it(on_gpu, monkeypatch):
    """A shared head is grouped-query attention with one KV head, and goes the same way."""
    heads = []

    def record(q, k, v, **kwargs):
        heads.append((q.shape[2], k.shape[2], kwargs["implementation"]))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    q, k, v, expert_index, _ = inputs()
    attend(q, k, v, expert_index, q_shared=q[:, :, 0, 0])
    assert heads == [(4, 2, "cudnn"), (1, 1, "cudnn")]
