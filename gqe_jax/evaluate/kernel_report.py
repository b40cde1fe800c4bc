"""`gqe inspect kernels`: which implementation of attention a configuration's layers take on each platform, and why."""

from __future__ import annotations

import jax

from gqe_jax.config import ConfigError, ModelConfig, RunConfig
from gqe_jax.kernels.choose import Call, choose, obstacle, target_platform

PLATFORMS = ("cpu", "gpu", "tpu")


def layer_calls(
    model: ModelConfig, *, batch: int, q_len: int, cached: bool, partitioned: bool = False
) -> dict[str, Call]:
    """Returns what a layer of the model asks of `attend`, by name.

    Args:
      model: the model's configuration.
      batch, q_len: B, S of its input.
      cached: the tokens continue a cache as long as the model's context; otherwise they are rows of training data,
        whose documents are told apart by segment ids.
      partitioned: XLA splits the computation over several devices.
    """
    return model.attention.attend_calls(
        model.dtype,
        batch=batch,
        q_len=q_len,
        kv_len=model.context if cached else q_len,
        cached=cached,
        partitioned=partitioned,
    )


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
    """Returns what training takes on the devices of this process, in one line.

    Raises:
      ConfigError: the configuration names an implementation that cannot run on them.
    """
    platform = target_platform()
    calls = layer_calls(model, batch=batch, q_len=q_len, cached=False, partitioned=jax.device_count() > 1)
    choices = grouped(model, platform, calls)
    for name, why in choices:
        if name == "-":
            raise ConfigError(
                f"model.attention.implementation={model.attention.implementation!r} cannot run: "
                f"{why.partition(', but ')[2]}: set it to None, which takes the fastest that can"
            )
    return "; ".join(f"{' and '.join(kinds)} by {name} ({why})" for (name, why), kinds in choices.items())


def report(config: RunConfig) -> str:
    """Returns a line for each phase, kind of head and platform."""
    model = config.model
    rows = config.data.batch_size // config.train.accumulate
    phases = {
        f"training, {rows} rows of {model.context} tokens": {"batch": rows, "q_len": model.context, "cached": False},
        f"prefill, {model.context} tokens": {"batch": 1, "q_len": model.context, "cached": True},
        f"decode, 1 token against {model.context}": {"batch": 1, "q_len": 1, "cached": True},
    }
    lines = [f"{config.name}: attention {model.attention.kind}: {model.attention.summary}, {model.dtype}"]
    for phase, shape in phases.items():
        lines += ["", phase]
        for platform in PLATFORMS:
            for (implementation, why), kinds in grouped(model, platform, layer_calls(model, **shape)).items():
                lines.append(f"  {platform}  {implementation:<18}{' and '.join(kinds)}: {why}")
    return "\n".join(lines)
