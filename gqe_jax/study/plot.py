"""Draws a study: losses against tokens with bands, differences from the reference, load of the experts by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gqe_jax.config import ConfigError
from gqe_jax.study.definition import Study
from gqe_jax.study.records import Record
from gqe_jax.study.statistics import LEVEL, mean_interval
from gqe_jax.study.table import Row, rows

DPI = 200


def write_plots(study: Study, cells: Mapping[str, Mapping[int, Record]], out: epath.Path) -> list[epath.Path]:
    """Writes losses.png, differences.png and, where an arm routes, load.png into the study's folder; returns the paths.

    Raises:
      ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    table = rows(study, cells)
    drawn = [_draw(out / "losses.png", (7.0, 4.2), lambda axes: _losses(axes, cells))]
    drawn.append(_draw(out / "differences.png", (6.0, 1.2 + 0.4 * len(table)), lambda axes: _differences(axes, table)))
    loads = {arm: load for arm, by_seed in cells.items() if (load := _load(list(by_seed.values()))) is not None}
    if loads:
        size = 2.6 * len(loads) + 1.0, 3.2
        drawn.append(_draw(out / "load.png", size, lambda *axes: _loads(axes, loads), panels=len(loads)))
    return drawn


def _draw(path: epath.Path, size: tuple[float, float], draw: Any, panels: int = 1) -> epath.Path:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"gqe study plot needs matplotlib, which is not installed ({error}): pip install 'gqe_jax[viz]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(*figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    with _unwritten_named(path):
        figure.savefig(path, format="png", dpi=DPI)
    return path


@contextlib.contextmanager
def _unwritten_named(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): make the folder writable") from error


def curve(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, mean over seeds and half width of the 95% band of the training loss."""
    points = [np.asarray(record.result["training"], np.float64) for record in records]
    tokens = points[0][:, 0]
    losses = np.stack([np.interp(tokens, *each.T) for each in points], axis=1)
    bands = [mean_interval(row) for row in losses]
    return tokens, np.array([band.mean for band in bands]), np.array([band.half_width for band in bands])


def _losses(axes: Any, cells: Mapping[str, Mapping[int, Record]]) -> None:
    for arm, by_seed in cells.items():
        tokens, mean, half = curve(list(by_seed.values()))
        (line,) = axes.plot(tokens, mean, linewidth=1.2, label=arm)
        axes.fill_between(tokens, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="tokens", ylabel="training loss, nats per token")
    axes.set_title(f"mean over seeds, with {LEVEL:.0%} bands", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _differences(axes: Any, table: Sequence[Row]) -> None:
    compared = [row for row in table if row.difference is not None][::-1]
    (reference,) = (row.arm for row in table if row.difference is None)
    for height, row in enumerate(compared):
        interval = row.difference.interval
        filled = "full" if row.difference.resolved else "none"
        axes.errorbar(interval.mean, height, xerr=interval.half_width, fmt="o", color="C0", fillstyle=filled, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [row.arm for row in compared])
    axes.set(xlabel=f"held-out loss minus that of {reference}, nats per token", ylim=(-0.6, len(compared) - 0.4))
    axes.set_title(f"paired by seed, {LEVEL:.0%} intervals; filled: resolved", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


def _load(records: Sequence[Record]) -> np.ndarray | None:
    """[L, G, M], mean over seeds; None for arms without a router."""
    loads = [record.result["load"] for record in records]
    return None if loads[0] is None else np.mean([np.asarray(load, np.float64) for load in loads], axis=0)


def _loads(axes: Sequence[Any], loads: Mapping[str, np.ndarray]) -> None:
    for panel, (arm, load) in zip(axes, loads.items(), strict=True):
        layers, groups, experts = load.shape
        image = panel.imshow(load.reshape(layers, -1), aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        for group in range(1, groups):
            panel.axvline(group * experts - 0.5, color="white", linewidth=1)
        panel.set_xticks([(group + 0.5) * experts - 0.5 for group in range(groups)], map(str, range(groups)))
        panel.set_yticks(range(layers))
        panel.set_xlabel(f"group of {experts} experts")
        panel.set_title(arm, fontsize=10)
    axes[0].set_ylabel("layer")
    axes[0].figure.colorbar(image, ax=list(axes), label="share of tokens")
