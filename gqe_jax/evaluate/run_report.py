"""`gqe inspect run`: what a run is and how it went, from its directory alone, as text and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gqe_jax.config import ConfigError, ModelConfig, RunConfig
from gqe_jax.flops import parameter_count
from gqe_jax.runs.record import RunRecord

BAR = 40  # characters of all bars of a line
HEIGHT, WIDTH = 12, 64  # of the loss curve, in characters
MOST_STEPS = 5  # of a table over time
HEAT_MAP_LABELS = 24  # as many numbers have room below the picture


def report(run: RunRecord) -> str:
    """Returns the run in text: configuration, parameters, last metrics, loss curve, load of experts or of KV heads."""
    parts = [_configuration(run.config), _parameters(run.config.model)]
    if run.last(""):
        parts += [_last_metrics(run), "loss, nats per token\n" + plot_text(*run.series("loss"))]
    else:
        parts.append("no step was logged yet")
    load = run.load()
    if load is not None:
        parts.append(_expert_load(load, run.last("").get("entropy")))
    if run.heads():
        parts.append(_heads_over_time(run.heads()))
    return "\n\n".join(parts)


def _configuration(config: RunConfig) -> str:
    model, train = config.model, config.train
    rows = {
        "run": config.name,
        "model": f"{model.num_layers} layers, d_model {model.d_model}, d_ff {model.d_ff}, "
        f"vocabulary {model.vocab_size}, context {model.context}, {model.dtype}",
        "attention": f"{model.attention.kind}: {model.attention.summary}",
        "data": f"{config.data.path or config.data.mixture or 'default corpus'}, batch {config.data.batch_size} rows = "
        f"{config.data.batch_size * model.context:,} tokens",
        "optimizer": f"{config.optimizer.schedule}, peak {config.optimizer.learning_rate:g}, "
        f"clip {config.optimizer.clip}",
        "training": f"{train.steps} steps, seed {train.seed}",
    }
    return _table(rows)


def _parameters(model: ModelConfig) -> str:
    counts = parameter_count(model)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count and name != "total")
    return _table({"parameters": f"{counts['total']:,} ({parts})"})


def _last_metrics(run: RunRecord) -> str:
    rows = {}
    for title, line in (("last step", run.last("")), ("last evaluation", run.last("eval/"))):
        shown = [f"{name.removeprefix('eval/')} {value:,.6g}" for name, value in line.items() if _is_number(value)]
        if line:
            rows[title] = ", ".join(shown)
    return _table(rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(rows: dict[str, str]) -> str:
    width = max(15, *map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def plot_text(x: np.ndarray, y: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Returns a curve of characters: each column is the mean of the points that fall into it, empty where there are
    none.

    Args:
      x: ascending.
      y: the same number of values.
      width, height: of the plotting area, in characters.
    """
    if not len(x):
        return "(no finite values)"
    span = max(x[-1] - x[0], 1)
    columns = np.minimum((x - x[0]) * width // span, width - 1)
    means = {column: y[columns == column].mean() for column in np.unique(columns)}
    low, high = min(means.values()), max(means.values())
    step = (high - low) / (height - 1) or 1.0
    grid = [[" "] * width for _ in range(height)]
    for column, value in means.items():
        grid[round((high - value) / step)][column] = "*"
    lines = []
    for row, cells in enumerate(grid):
        labelled = row in (0, height // 2, height - 1) if high > low else row == 0
        label = f"{high - row * step:9.4f}" if labelled else ""
        lines.append(f"{label:>9} |{''.join(cells)}".rstrip())
    first, last = str(x[0]), str(x[-1])
    return "\n".join([*lines, " " * 10 + "+" + "-" * width, " " * 11 + first + last.rjust(width - len(first))])


def _expert_load(load: np.ndarray, entropy: Sequence[float] | None) -> str:
    """Returns one block per layer: balance and entropy, then each group's shares with bars."""
    layers, groups, experts = load.shape
    bar = BAR // experts  # none where many experts share the line
    balance = load.max(-1) / np.maximum(load.mean(-1), 1e-9)
    title = f"expert load at the last logged step: {layers} layers, {groups} groups, {experts} experts per group"
    lines = [title, "share of tokens per expert; max/mean: 1 is perfect balance"]
    entropies = np.atleast_1d(np.asarray(entropy, np.float64)) if entropy is not None else np.full(layers, np.nan)
    for layer in range(layers):
        head = f"layer {layer}: max/mean {balance[layer].max():.2f}"
        if np.isfinite(entropies[layer]):
            head += f", entropy {entropies[layer]:.3f} of {math.log(experts):.3f} nats"
        lines.append(head)
        for group in range(groups):
            shares = load[layer, group]
            bars = "  ".join(f"{share:6.1%} {'#' * round(share * bar):<{bar}}" for share in shares)
            lines.append(f"  group {group:<2} {bars}".rstrip())
    return "\n".join(lines)


def _heads_over_time(logged: Sequence[tuple[int, np.ndarray]]) -> str:
    """Returns a row for each layer, a column for each of some steps, first and last among them: query heads on each KV
    head."""
    places = np.linspace(0, len(logged) - 1, MOST_STEPS).astype(int)
    chosen = [logged[place] for place in np.unique(places)]
    rows = [["", *(f"step {step}" for step, _ in chosen)]]
    for layer in range(len(chosen[0][1])):
        counts = (" ".join(f"{count:g}" for count in heads[layer]) for _, heads in chosen)
        rows.append([f"layer {layer}", *counts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["query heads on each KV head", *lines])


def write_png(run: RunRecord, path: str | Path) -> None:
    """Loss curve, and for GQE a heat map of the experts' load (layers down, experts across), as a PNG file.

    Raises:
      ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--png={str(path)!r} needs matplotlib, which is not installed ({error}): pip install 'gqe_jax[viz]', or "
            "leave --png out"
        ) from error
    load = run.load()
    figure = Figure(figsize=(12 if load is not None else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 if load is None else 2, squeeze=False)[0]
    for name, style in (("loss", "-"), ("eval/loss", "o-")):
        steps, values = run.series(name)
        if len(steps):
            axes[0].plot(steps, values, style, label={"loss": "training", "eval/loss": "held out"}[name])
    axes[0].set(title=f"{run.config.name}: loss", xlabel="step", ylabel="nats per token")
    if axes[0].lines:
        axes[0].legend()
    if load is not None:
        layers, groups, experts = load.shape
        image = axes[1].imshow(load.reshape(layers, -1), aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        for group in range(1, groups):
            axes[1].axvline(group * experts - 0.5, color="white", linewidth=1)
        axes[1].set(title="share of tokens per expert", ylabel="layer")
        axes[1].yaxis.get_major_locator().set_params(integer=True)
        _label_experts(axes[1].xaxis, groups, experts)
        uniform = load.sum(-1).mean() / experts
        bar = figure.colorbar(image, ax=axes[1])
        bar.ax.axhline(uniform, color="white", linewidth=2)
        bar.ax.set_yticks([0, uniform, 1], ["0%", f"uniform: {uniform:.1%}", "100%"])
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"--png={str(path)!r} cannot be written ({error.strerror}): choose another file") from error


def _label_experts(axis: Any, groups: int, experts: int) -> None:
    """Numbers of the groups below the heat map, and above them those of the experts where there is room."""
    crowded = groups * experts > HEAT_MAP_LABELS
    shown = range(0, groups, math.ceil(groups / HEAT_MAP_LABELS))
    above = "" if crowded else "\n"
    axis.set_ticks([(group + 0.5) * experts - 0.5 for group in shown], [f"{above}{group}" for group in shown])
    axis.set_tick_params(length=0)
    if not crowded:
        axis.set_ticks(range(groups * experts), [str(m) for m in range(experts)] * groups, minor=True)
    axis.set_label_text(f"group of {experts} experts" if crowded else "expert within its group, and the group")
