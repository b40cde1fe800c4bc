"""`gqe inspect kernels`: which implementation of attention a configuration's layers take on each platform, and why."""

from __future__ import annotations

import argparse

import jax

from gqe_jax.config import GQEConfig, ModelConfig, RunConfig
from gqe_jax.config_files import load_config
from gqe_jax.kernels.choose import Call, choose, obstacle, target_platform

PLATFORMS = ("cpu", "gpu", "tpu")


def layer_calls(
    model: ModelConfig, *, batch: int, q_len: int, cached: bool, partitioned: bool = False
) -> dict[str, Call]:
    """What a layer of the model asks of `attend`, by name.

    Args:
      model: the model's configuration.
      batch, q_len: B, S of its input.
      cached: the tokens continue a cache as long as the model's context; otherwise they are rows of training data,
        whose documents are told apart by segment ids.
      partitioned: XLA splits the computation over several devices.
    """
    attention = model.attention
    _, heads = attention.query_heads
    experts = heads // attention.num_kv_heads
    options = {
        "batch": batch,
        "q_len": q_len,
        "kv_len": model.context if cached else q_len,
        "head_dim": attention.head_dim,
        "value_dim": attention.head_dim,
        "dtype": model.dtype,
        "window": attention.window,
        "softcap": attention.softcap is not None,
        "segments": not cached,
        "kv_length": cached,
        "aligned": not cached,
        "partitioned": partitioned,
    }
    groups = {"num_groups": attention.num_kv_heads, "num_kv_heads": attention.num_kv_heads, "num_experts": experts}
    if not isinstance(attention, GQEConfig):
        return {"all heads": Call(num_slots=experts, **groups, **options)}
    calls = {"routed heads": Call(num_slots=attention.top_k, **groups, **options)}
    if attention.variant == "gqe":
        calls["shared head"] = Call(num_groups=1, num_kv_heads=1, num_experts=1, num_slots=1, **options)
    return calls


def chosen(model: ModelConfig, platform: str, call: Call) -> tuple[str, str]:
    """(implementation, why) of one call; where the configuration names one that cannot run there, ("-", why not)."""
    name = model.attention.implementation
    if name is None:
        choice = choose(platform, call)
        return choice.name, choice.why
    reason = obstacle(name, platform, call)
    if reason is not None:
        return "-", f"the configuration names {name!r}, but {reason}"
    return name, "named by the configuration"


def grouped(model: ModelConfig, platform: str, calls: dict[str, Call]) -> dict[tuple[str, str], list[str]]:
    """(implementation, why) → the names of the calls that take it."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for kind, call in calls.items():
        kinds.setdefault(chosen(model, platform, call), []).append(kind)
    return kinds


def training_line(model: ModelConfig, *, batch: int, q_len: int) -> str:
    """What training takes on the devices of this process, in one line."""
    platform = target_platform()
    calls = layer_calls(model, batch=batch, q_len=q_len, cached=False, partitioned=jax.device_count() > 1)
    choices = grouped(model, platform, calls)
    return "; ".join(f"{' and '.join(kinds)} by {name} ({why})" for (name, why), kinds in choices.items())


def report(config: RunConfig) -> str:
    """A line for each phase, kind of head and platform."""
    model = config.model
    rows = config.data.batch_size // config.train.accumulate
    phases = {
        f"training, {rows} rows of {model.context} tokens": {"batch": rows, "q_len": model.context, "cached": False},
        f"prefill, {model.context} tokens": {"batch": 1, "q_len": model.context, "cached": True},
        f"decode, 1 token against {model.context}": {"batch": 1, "q_len": 1, "cached": True},
    }
    attention = model.attention
    name, heads = attention.query_heads
    lines = [
        f"{config.name}: attention {attention.kind}, {name}={heads}, num_kv_heads={attention.num_kv_heads}, "
        f"head_dim={attention.head_dim}, {model.dtype}"
    ]
    for phase, shape in phases.items():
        lines += ["", phase]
        for platform in PLATFORMS:
            for (implementation, why), kinds in grouped(model, platform, layer_calls(model, **shape)).items():
                lines.append(f"  {platform}  {implementation:<18}{' and '.join(kinds)}: {why}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gqe inspect kernels`."""
    parser.add_argument(
        "--config",
        default="gqe_250m",
        metavar="FILE[:ARG]",
        help="configuration whose layers are looked at, as in gqe train (default: gqe_250m)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report. Raises ConfigError for a configuration that cannot be used."""
    print(report(load_config(args.config, args.overrides)))
    return 0
