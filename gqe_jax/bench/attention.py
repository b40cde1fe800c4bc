"""`gqe bench attention`: `attend` and whole layers beside their rivals.

On a TPU or GPU against dense attention, timed (`gqe_jax.bench.timed`); with --target the same for a TPU that is not
there, from compiled programs (`gqe_jax.bench.static`). On a CPU against PyTorch, and against what rates predict.

Every comparison on the CPU is of functions that take turns in one process, and is given as the median over the rounds
of the ratio within a round: a machine that is busy with other things then slows both sides alike.
"""

import csv
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.attention import GQAttention, GQEAttention
from gqe_jax.config import ConfigError
from gqe_jax.convert import layer_to_torch
from gqe_jax.kernels import attend
from gqe_jax.tpu import GENERATIONS

HEAD_DIM = 64
# The paper's main setting.
D_MODEL, NUM_HEADS, NUM_GROUPS, TOP_K, ROPE_THETA = 1024, 16, 8, 1, 10_000.0


def run(
    *,
    target: str | None,
    seq_lens: Sequence[int] | None,
    head_dim: int | None,
    heads: Sequence[int] | None,
    repeats: int,
    csv_file: str | None,
    plot_file: str | None,
) -> None:
    """Prints the tables.

    Args:
      target: TPU to compile for, one of `gqe_jax.tpu.GENERATIONS`; None: the devices that are here.
      seq_lens: lengths of the rows; None: those of the platform.
      head_dim: on a TPU or GPU, 128 unless given.
      heads: numbers of query heads, on a CPU.
      repeats: rounds per comparison.
      csv_file: written with every row of the tables, if given.
      plot_file: drawn with the speed-up against the context's length, if given; not on a CPU.

    Raises:
      ConfigError: a length, head count or number of rounds below 1, an unknown target, options that the platform has
        no use for, or a package that is missing.
    """
    for flag, values in (("--seq-len", seq_lens), ("--heads", heads), ("--repeats", [repeats])):
        if values and min(values) < 1:
            raise ConfigError(f"{flag}={min(values)} must be at least 1")
    if target is not None and target not in GENERATIONS:
        raise ConfigError(f"--target {target} is unknown: use one of {', '.join(GENERATIONS)}")
    platform = "tpu" if target else jax.default_backend()
    if platform != "cpu":
        if heads:
            raise ConfigError(f"--heads is for CPUs: on a {platform.upper()} it is 16 query heads in 8 groups")
        _run_on_accelerator(platform, target, seq_lens, head_dim or 128, repeats, csv_file, plot_file)
        return
    for flag, value in (("--plot", plot_file), ("--head-dim", head_dim)):
        if value:
            raise ConfigError(f"{flag} is for TPUs and GPUs: name a TPU with --target ({', '.join(GENERATIONS)})")
    _run_on_cpu(seq_lens or (4096, 8192), heads or (8, 16), repeats, csv_file)


def _run_on_accelerator(
    platform: str,
    target: str | None,
    seq_lens: Sequence[int] | None,
    head_dim: int,
    repeats: int,
    csv_file: str | None,
    plot_file: str | None,
) -> None:
    from gqe_jax.bench import static, table, timed
    from gqe_jax.bench.rivals import RIVALS, Setting

    if target:
        result = static.measure(target, tuple(seq_lens or static.SEQ_LENS), head_dim)
        cells, device, how = result.cells, target, "static"
        print(static.report(result))
    else:
        cells = timed.measure(platform, tuple(seq_lens or timed.SEQ_LENS), head_dim, repeats)
        device, how = jax.devices()[0].device_kind, "timed"
        print(timed.report(platform, cells, head_dim))
    if csv_file:
        table.write_csv(csv_file, cells, {"device": device, "how": how, "head_dim": head_dim})
    if plot_file:
        s = Setting(0, head_dim)
        bound = s.attending_heads("gqa") / s.attending_heads("gqe")
        table.plot(plot_file, cells, RIVALS[platform], bound, f"GQE on {device} ({how}), D = {head_dim}")


def _run_on_cpu(seq_lens: Sequence[int], heads: Sequence[int], repeats: int, csv_file: str | None) -> None:
    torch = _import_torch()
    torch.manual_seed(0)
    print(
        f"{jax.default_backend()}, jax {jax.__version__}, torch {torch.__version__} "
        f"on {torch.get_num_threads()} threads; float32, causal, batch 1, head_dim {HEAD_DIM}; "
        f"medians of {repeats} rounds\n"
    )
    rows = [*_attention_rows(torch, seq_lens, heads, repeats), *_layer_rows(torch, max(seq_lens), repeats)]
    if csv_file:
        with open(csv_file, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["what", "seq_len", "heads", "ours_ms", "other_ms", "ratio"])
            writer.writeheader()
            writer.writerows(rows)


def _import_torch():
    try:
        import torch
    except ImportError as error:
        raise ConfigError("gqe bench attention compares with PyTorch: pip install 'gqe_jax[bench]'") from error
    return torch


# ---- timing


def _take_turns(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each function, called in turn; one round before that compiles and warms up."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in seconds.items()}


def _row(what, seq_len, heads, ours, other) -> dict[str, object]:
    """Formats one row of the table; a ratio above 1 means that ours is faster."""
    return {
        "what": what,
        "seq_len": seq_len,
        "heads": heads,
        "ours_ms": round(1e3 * statistics.median(ours), 1),
        "other_ms": round(1e3 * statistics.median(other), 1),
        "ratio": round(statistics.median(other / ours), 3),
    }


# ---- attention alone


def _attention_rows(torch, seq_lens, heads, repeats) -> list[dict[str, object]]:
    print("attention alone: attend (xla) against torch scaled_dot_product_attention; ratio = torch's time / ours")
    print(f"{'':18}{'S':>6}{'heads':>7}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}")
    rows = []
    for seq_len in seq_lens:
        for count in heads:
            for what, functions in _attention_rivals(torch, seq_len, count).items():
                seconds = _take_turns(functions, repeats)
                row = _row(what, seq_len, count, seconds["ours"], seconds["torch"])
                rows.append(row)
                print(f"{what:18}{seq_len:6}{count:7}{row['ours_ms']:10}{row['other_ms']:10}{row['ratio']:8.2f}")
    return rows


def _attention_rivals(torch, seq_len, heads):
    """Each head has its own K and V: PyTorch's are contiguous [B, H, S, D], as after repeating KV heads beforehand."""
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    q, k, v, do = (torch.randn(1, heads, seq_len, HEAD_DIM) for _ in range(4))
    q_grad, k_grad, v_grad = (x.clone().requires_grad_() for x in (q, k, v))

    def torch_forward_backward():
        return torch.autograd.grad(sdpa(q_grad, k_grad, v_grad), (q_grad, k_grad, v_grad), do)

    ours = functools.partial(attend, implementation="xla")
    q_ours, k_ours, v_ours, do_ours = (jnp.asarray(x.transpose(1, 2).contiguous().numpy()) for x in (q, k, v, do))
    q_ours, do_ours = q_ours[:, :, :, None], do_ours[:, :, :, None]
    forward = jax.jit(ours)
    forward_backward = jax.jit(lambda q, k, v, do: jax.vjp(ours, q, k, v)[1](do))
    return {
        "forward": {"ours": lambda: forward(q_ours, k_ours, v_ours), "torch": lambda: sdpa(q, k, v)},
        "forward+backward": {
            "ours": lambda: forward_backward(q_ours, k_ours, v_ours, do_ours),
            "torch": torch_forward_backward,
        },
    }


# ---- whole layers


def _layer_rows(torch, seq_len, repeats) -> list[dict[str, object]]:
    rngs = nnx.Rngs(0)
    gqe = GQEAttention(D_MODEL, NUM_HEADS, NUM_GROUPS, TOP_K, HEAD_DIM, rope_theta=ROPE_THETA, rngs=rngs)
    gqa = GQAttention(D_MODEL, NUM_HEADS, NUM_GROUPS, HEAD_DIM, rope_theta=ROPE_THETA, rngs=rngs)
    torch_gqe = _torch_gqe_layer(torch, {name: torch.tensor(w) for name, w in layer_to_torch(gqe).items()})
    x = np.random.default_rng(0).normal(size=(1, seq_len, D_MODEL)).astype(np.float32)
    x_ours, x_torch = jnp.asarray(x), torch.from_numpy(x)
    kv = jnp.zeros((1, seq_len, NUM_GROUPS, HEAD_DIM))
    q = jnp.zeros((1, seq_len, NUM_GROUPS, NUM_HEADS // NUM_GROUPS, HEAD_DIM))
    weight = jnp.zeros((D_MODEL, D_MODEL))
    gqe_forward, gqa_forward = _jitted(gqe), _jitted(gqa)
    dense_attention, matmul = jax.jit(functools.partial(attend, implementation="xla")), jax.jit(jnp.dot)

    difference = np.abs(np.asarray(gqe_forward(x_ours)) - torch_gqe(x_torch).numpy()).max()
    if not difference < 1e-3:
        raise FloatingPointError(f"our GQE layer and PyTorch's differ by {difference:.2g}: their times mean nothing")

    seconds = _take_turns(
        {
            "gqe": lambda: gqe_forward(x_ours),
            "gqa": lambda: gqa_forward(x_ours),
            "torch gqe": lambda: torch_gqe(x_torch),
            "attention": lambda: dense_attention(q, kv, kv),
            "matmul": lambda: matmul(x_ours[0], weight),
        },
        repeats,
    )
    per_attention_head = seconds["attention"] / NUM_HEADS
    per_column = seconds["matmul"] / D_MODEL
    predicted_gqa = per_attention_head * NUM_HEADS + per_column * _gqa_columns()
    predicted_gqe = per_attention_head * (TOP_K * NUM_GROUPS + 1) + per_column * _gqe_columns()
    predicted = statistics.median(predicted_gqa / predicted_gqe)

    against_gqa = _row("layer gqe vs gqa", seq_len, NUM_HEADS, seconds["gqe"], seconds["gqa"])
    against_torch = _row("layer gqe vs torch", seq_len, NUM_HEADS, seconds["gqe"], seconds["torch gqe"])
    prediction = _row("predicted", seq_len, NUM_HEADS, predicted_gqe, predicted_gqa)
    share = statistics.median((seconds["gqa"] / seconds["gqe"]) / (predicted_gqa / predicted_gqe))
    print(
        f"\nwhole layers, forward, S = {seq_len}, d = {D_MODEL}, {NUM_HEADS} query heads, {NUM_GROUPS} groups, "
        f"k = {TOP_K}\n"
        f"  our GQE {against_gqa['ours_ms']} ms, our GQA {against_gqa['other_ms']} ms: GQA / GQE = "
        f"{against_gqa['ratio']:.2f}; the matmul and attention rates predict {predicted:.2f} (share {share:.2f})\n"
        f"  the same GQE layer in PyTorch {against_torch['other_ms']} ms: ours takes "
        f"{statistics.median(seconds['gqe'] / seconds['torch gqe']):.2f} of its time"
    )
    return [against_gqa, prediction, against_torch]


def _jitted(layer):
    graph, state = nnx.split(layer)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0])
    return functools.partial(forward, state)


def _gqa_columns() -> int:
    """Width of all projections together: q, k, v, and o, whose matmul is as large read from its input's side."""
    return (2 * NUM_HEADS + 2 * NUM_GROUPS) * HEAD_DIM


def _gqe_columns() -> int:
    """q of all experts, the shared query, k, v, the router, and o over the slots."""
    slots = TOP_K * NUM_GROUPS + 2
    return (NUM_HEADS + 1 + 2 * NUM_GROUPS + slots) * HEAD_DIM + NUM_HEADS


def _torch_gqe_layer(torch, weights):
    """Returns the GQE layer (variant "gqe") as one would write it in PyTorch: gather the selected experts' queries,
    SDPA.

    weights are those of `layer_to_torch`. Inference only; the rotary tables are made beforehand.
    """
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    linear = torch.nn.functional.linear
    experts = NUM_HEADS // NUM_GROUPS

    @functools.cache
    def rotary_tables(seq_len):
        frequency = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = torch.arange(seq_len)[:, None] * frequency
        return angle.cos(), angle.sin()

    def rotate(x):  # [B, H, S, D]
        cos, sin = rotary_tables(x.shape[2])
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    @torch.no_grad()
    def layer(x):
        batch, seq_len, _ = x.shape
        q = linear(x, weights["q_proj.weight"]).view(batch, seq_len, NUM_GROUPS, experts, HEAD_DIM)
        k = linear(x, weights["k_proj.weight"]).view(batch, seq_len, NUM_GROUPS, HEAD_DIM).transpose(1, 2)
        v = linear(x, weights["v_proj.weight"]).view(batch, seq_len, NUM_GROUPS, HEAD_DIM).transpose(1, 2)
        k = rotate(k)
        logits = linear(x, weights["router.weight"]).view(batch, seq_len, NUM_GROUPS, experts)
        probs, index = logits.softmax(dim=-1).topk(TOP_K, dim=-1)
        # [B, S, G, k, D] → heads in slot order [B, G·k, S, D]
        selected = q.gather(3, index[..., None].expand(-1, -1, -1, -1, HEAD_DIM)).flatten(2, 3).transpose(1, 2)
        o = sdpa(rotate(selected), k.repeat_interleave(TOP_K, dim=1), v.repeat_interleave(TOP_K, dim=1))
        o = o.transpose(1, 2)
        weight = (probs / probs.sum(dim=(2, 3), keepdim=True).clamp_min(1e-9)).flatten(2, 3)
        mixed = (o * weight[..., None]).sum(dim=2, keepdim=True)
        q_shared = rotate(linear(x, weights["q_shared.weight"])[:, None])
        shared = sdpa(q_shared, k.mean(dim=1, keepdim=True), v.mean(dim=1, keepdim=True)).transpose(1, 2)
        return linear(torch.cat([o, mixed, shared], dim=2).flatten(2), weights["o_proj.weight"])

    return layer
