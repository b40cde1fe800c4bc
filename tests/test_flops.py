"""FLOP and parameter counts against numbers worked out by hand."""

import itertools

import jax
import pytest
from flax import nnx

from gqe_jax import flops
from gqe_jax.attention import GQAConfig, GQEConfig, RouterConfig
from gqe_jax.config import ModelConfig
from gqe_jax.models.transformer import Transformer

SIZE = {"vocab_size": 10, "d_model": 8, "num_layers": 2, "d_ff": 12}

PAPER = ModelConfig(attention=GQEConfig(num_query_experts=16, num_kv_heads=8))


def gqe(**attention) -> ModelConfig:
    """G = 2, M = 2, k = 1, D = 8 / 4 = 2."""
    return ModelConfig(**SIZE, attention=GQEConfig(num_query_experts=4, num_kv_heads=2, **attention))


def gqa(**attention) -> ModelConfig:
    return ModelConfig(**SIZE, attention=GQAConfig(num_query_heads=4, num_kv_heads=2, **attention))


# ---------------------------------------------------------------- parameters


def test_parameters_of_a_small_gqe_model():
    assert flops.parameter_count(gqe()) == {
        "embedding": 10 * 8,
        # q [8,2,2,2] = 64, k and v [8,2,2] = 32 each, shared query [8,2] = 16, W_o [2,1,2,8] = 32 and [2,2,8] = 32
        "attention": 2 * (64 + 32 + 32 + 16 + 32 + 32),
        "mlp": 2 * (3 * 8 * 12),
        "norm": 2 * (8 + 8) + 8,
        "router": 2 * (8 * 2 * 2),
        "total": 80 + 416 + 576 + 40 + 64,
    }


def test_parameters_of_the_paper_size():
    """24 layers of d = 1024, N = 16, G = 8, D = 64, byte vocabulary; per layer:

    q 1024·16·64 = 1,048,576; k and v 2·1024·8·64 = 1,048,576; shared query 65,536; W_o 10 slots·64·1024 = 655,360;
    sum 2,818,048. Router 16,384. MLP 3·1024·2816 = 8,650,752. Norms 2,048.
    """
    counts = flops.parameter_count(PAPER)
    assert counts["attention"] == 24 * 2_818_048
    assert counts["total"] == 24 * (2_818_048 + 16_384 + 8_650_752 + 2_048) + 1_024 + 259 * 1_024 == 275_959_808


@pytest.mark.parametrize(
    ("model", "part", "count"),
    [
        (gqe(variant="hard_concat"), "attention", 2 * (64 + 32 + 32 + 32)),  # no shared query, no extra slots
        (gqe(variant="weighted_concat", top_k=2), "attention", 2 * (64 + 32 + 32 + 64)),
        (gqe(top_k=2), "attention", 2 * (64 + 32 + 32 + 16 + 64 + 32)),
        (gqe(bias=True), "attention", 2 * (208 + 8 + 4 + 4 + 2 + 8)),  # q, k, v, shared query, o
        (gqe(qk_norm=True), "norm", 40 + 2 * (2 + 2)),
        (gqe(router=RouterConfig(kind="fixed")), "router", 0),
        (gqa(), "attention", 2 * (64 + 32 + 32 + 64)),
        (gqa(bias=True), "attention", 2 * (192 + 8 + 4 + 4 + 8)),
        (gqa(head_dim=6), "attention", 2 * (8 * 4 * 6 * 2 + 8 * 2 * 6 * 2)),  # 4 heads of 6 are not d = 8
        (gqa(), "router", 0),
        (ModelConfig(**SIZE, tie_embeddings=False, attention=gqa().attention), "embedding", 2 * 10 * 8),
    ],
)
def test_parameters_by_option(model, part, count):
    counts = flops.parameter_count(model)
    assert counts[part] == count
    assert counts["total"] == sum(value for name, value in counts.items() if name != "total")


@pytest.mark.parametrize(
    "model",
    [
        *(gqe(variant=v, qk_norm=n, bias=n) for v in ("gqe", "hard_concat", "weighted_concat") for n in (True, False)),
        gqe(top_k=2, router=RouterConfig(kind="random")),
        gqa(qk_norm=True, bias=True),
        ModelConfig(**SIZE, tie_embeddings=False, attention=gqa(head_dim=6).attention),
    ],
)
def test_parameters_are_those_of_the_model(model):
    """The formulas against the arrays that the model makes: whichever changes, the other has to follow."""
    params = nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0))), nnx.Param)
    assert flops.parameter_count(model)["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------- FLOPs


def test_flops_of_a_small_gqe_model():
    """4 tokens score 4 + 3 + 2 + 1 = 10 pairs; a pair costs 2·D for q·k and 2·D for p·v = 8 a head; 2 layers."""
    active = flops.forward_flops(gqe(), 4)
    assert active == flops.ForwardFlops(
        projections=2 * (4 * 2 * 208),  # 208 weights of q, k, v, shared query, W_o
        router=2 * (4 * 2 * 32),
        attention=2 * (2 * 1 * 8 * 10),  # G·k = 2 heads
        shared_head=2 * (8 * 10),
        mlp=2 * (4 * 2 * 288),
        logits=4 * 2 * 80,
    )
    assert active.total == 3328 + 512 + 320 + 160 + 4608 + 640 == 9568
    assert flops.flops_per_token(gqe(), 4, backward=False) == 9568 / 4
    assert flops.flops_per_token(gqe(), 4) == 3 * 9568 / 4
    assert flops.flops_per_step(gqe(), batch_size=5, sequence=4) == 3 * 5 * 9568


def test_dense_equivalent_is_the_gqa_model():
    """All N experts attending, one output slot each, no router and no shared head: dense GQA with N query heads."""
    dense = flops.forward_flops(gqe(), 4, "dense_equivalent")
    assert dense == flops.forward_flops(gqa(), 4) == flops.forward_flops(gqa(), 4, "dense_equivalent")
    assert dense == flops.ForwardFlops(
        projections=2 * (4 * 2 * 192), router=0, attention=2 * (4 * 8 * 10), shared_head=0, mlp=4608, logits=640
    )


def test_attention_of_the_paper_size_is_nine_sixteenths():
    """k·G + 1 = 9 heads attend of N = 16: the paper's bound of 16/9 on the speed-up."""
    active = flops.forward_flops(PAPER, 2048)
    dense = flops.forward_flops(PAPER, 2048, "dense_equivalent")
    assert (active.attention + active.shared_head) * 16 == dense.attention * 9


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 6, 100])
def test_scored_pairs(window):
    """Counted one by one from the definition of a causal window."""
    for sequence in (1, 2, 5, 6):
        pairs = itertools.product(range(sequence), repeat=2)
        expected = sum(0 <= query - key < (window or sequence) for query, key in pairs)
        assert flops.scored_pairs(sequence, window) == expected


# ---------------------------------------------------------------- MFU


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),  # 2307 a chip of two devices
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_peaks_by_device_kind(kind, teraflops):
    assert flops.peak_flops(kind) == teraflops * 1e12


def test_mfu():
    """Half of what 4 v5e do in 2 seconds is 0.5; where the peak is not known there is no MFU to report."""
    assert flops.mfu(0.5 * 2 * 4 * 197e12, 2.0, 4, "TPU v5 lite") == pytest.approx(0.5)
    assert flops.mfu(1e12, 1.0, 1, "cpu") is None
