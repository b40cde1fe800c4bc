"""How many heads for a context length: curves fitted to finished runs, the search, and GQE beside its rivals."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqe_jax.attention import GQAConfig, GQEConfig
from gqe_jax.checked_json import OBJECTS, check_record, is_number, is_whole, read_object
from gqe_jax.config import ConfigError, ModelConfig, RunConfig
from gqe_jax.cost import LEAST_SIZES, Candidate, Fit, candidate, decode_flops, fit, kept_numbers, search, shape
from gqe_jax.flops import parameter_count
from gqe_jax.runs.record import RunRecord, read_run

Dense = tuple[int, int]
Routed = tuple[int, int, int]
WIDTHS = 64  # d_model of the config line is a multiple
BEYOND = 10  # times the largest run, or below the smallest: a curve is a guess there


@dataclasses.dataclass(frozen=True)
class Curves:
    """Fits with what they were fitted to.

    Attributes:
      dense: (query heads, KV heads) → curve.
      routed: (query experts, KV heads, top_k) → curve of GQE.
      points: key of either → [(size, loss)] of the runs; empty where the curves come from a file.
      head_dim, vocab_size: of all runs.
    """

    dense: Mapping[Dense, Fit]
    routed: Mapping[Routed, Fit]
    points: Mapping[Dense | Routed, Sequence[tuple[float, float]]]
    head_dim: int
    vocab_size: int


# ---- from runs


def fit_runs(directories: Sequence[str]) -> Curves:
    """Fits a curve for each choice of heads among finished runs.

    Args:
      directories: of runs; dense ones, and GQE's with a learned router and all of its output slots.

    Raises:
      ConfigError: a run is not finished, or of another kind; runs differ in what is no choice of heads; a choice of
        heads has fewer than four sizes. All of a kind are listed.
    """
    runs = [read_run(directory) for directory in directories]
    points: dict[Dense | Routed, list[tuple[float, float]]] = {}
    problems = []
    for run in runs:
        key, last = _key(run.config.model), run.last("eval/")
        if key is None:
            problems.append(f"{run.directory} is neither dense nor GQE with a learned router")
        elif last.get("step") != run.config.train.steps:
            problems.append(f"{run.directory} has no evaluation of its last step, {run.config.train.steps}")
        else:
            points.setdefault(key, []).append((_size(run.config.model), last["eval/loss"]))
    if problems:
        raise ConfigError("runs that cannot be fitted: " + "; ".join(problems) + ": finish them, or leave them out")
    _require_alike(runs)
    few = {key: len({size for size, _ in found}) for key, found in points.items()}
    few = [f"{_name(key)}: {count}" for key, count in few.items() if count < LEAST_SIZES]
    if few:
        raise ConfigError(
            f"fewer than {LEAST_SIZES} sizes of a choice of heads ({'; '.join(few)}): train more sizes of each, or "
            f"leave its runs out"
        )
    model = runs[0].config.model
    curves = {key: _fit(key, found) for key, found in points.items()}
    return Curves(
        {key: curve for key, curve in curves.items() if len(key) == 2},
        {key: curve for key, curve in curves.items() if len(key) == 3},
        points,
        model.attention.head_dim,
        model.vocab_size,
    )


def _fit(key: Sequence[int], found: Sequence[tuple[float, float]]) -> Fit:
    try:
        return fit(*zip(*sorted(found), strict=True))
    except ConfigError as error:
        raise ConfigError(f"{_name(key)}: {error}") from None


def _key(model: ModelConfig) -> Dense | Routed | None:
    attention = model.attention
    if isinstance(attention, GQAConfig):
        return attention.num_query_heads, attention.num_kv_heads
    if isinstance(attention, GQEConfig) and attention.router.kind == "learned" and attention.variant == "gqe":
        return attention.num_query_experts, attention.num_kv_heads, attention.top_k
    return None


def _size(model: ModelConfig) -> float:
    counts = parameter_count(model)
    return float(counts["total"] - counts["embedding"])


def _require_alike(runs: Sequence[RunRecord]) -> None:
    """Losses are of one curve only if text, tokenizer and row length are one; costs only if the head dimension is."""

    def shared(config: RunConfig) -> dict[str, Any]:
        model, data = config.model, config.data
        source = {"data.path": data.path, "data.mixture": data.mixture, "data.tokenizer": data.tokenizer}
        sizes = {"model.vocab_size": model.vocab_size, "model.context": model.context}
        return source | sizes | {"model.attention.head_dim": model.attention.head_dim}

    first = shared(runs[0].config)
    for run in runs[1:]:
        for name, value in shared(run.config).items():
            if value != first[name]:
                raise ConfigError(
                    f"{runs[0].directory} has {name}={first[name]} and {run.directory} {value}: their losses are not "
                    f"of one curve, so give runs that agree"
                )


def _name(key: Sequence[int]) -> str:
    if len(key) == 2:
        return f"dense, {key[0]} query heads on {key[1]} KV heads"
    return f"GQE, {key[2]} of {key[0] // key[1]} experts in each of {key[1]} groups"


# ---- constants in a file

_FIT_RULES = {
    "heads": (
        lambda v: type(v) is list and len(v) in (2, 3) and all(is_whole(1, 4096)[0](n) for n in v),
        "[query heads, KV heads] or [query experts, KV heads, top_k]",
    ),
    "amplitude": is_number(0, above=True),
    "exponent": is_number(0, above=True),
    "floor": is_number(0),
    "residual": is_number(0),
}
_RULES = {"head_dim": is_whole(1, 4096), "vocab_size": is_whole(1), "fits": OBJECTS}
_REMEDY = "give a file that `gqe heads --save` wrote"


def constants(curves: Curves) -> str:
    """Returns the curves as JSON, which `read_constants` reads."""
    fits = [{"heads": list(key), **dataclasses.asdict(curve)} for key, curve in _all(curves)]
    values = {"head_dim": curves.head_dim, "vocab_size": curves.vocab_size, "fits": fits}
    return json.dumps(values, indent=1) + "\n"


def read_constants(path: str) -> Curves:
    """Reads the curves from the file. Raises ConfigError for a file that is none of these."""
    values = check_record(read_object(Path(path), _REMEDY), _RULES, path, _REMEDY)
    fits = {}
    for number, value in enumerate(values["fits"], start=1):
        checked = check_record(value, _FIT_RULES, f"{path}, fit {number}:", _REMEDY)
        heads = tuple(checked.pop("heads"))
        fits[heads] = Fit(**{name: float(each) for name, each in checked.items()})
    dense = {key: curve for key, curve in fits.items() if len(key) == 2}
    routed = {key: curve for key, curve in fits.items() if len(key) == 3}
    return Curves(dense, routed, {}, values["head_dim"], values["vocab_size"])


def _all(curves: Curves) -> Iterator[tuple[Dense | Routed, Fit]]:
    yield from curves.dense.items()
    yield from curves.routed.items()


# ---- the search


def recommend(curves: Curves, target: float, context: int) -> list[Candidate]:
    """Ranks the dense choices of heads for a loss and a context.

    Raises:
      ConfigError: there is no dense curve, or none reaches the loss.
    """
    if not curves.dense:
        raise ConfigError("no dense run was given, and the search is among dense heads: add runs of kind gqa")
    sizes = {"head_dim": curves.head_dim, "vocab_size": curves.vocab_size}
    ranked = search(dict(curves.dense), target, context, **sizes)
    if math.isinf(ranked[0].cost):
        floors = ", ".join(f"{curve.floor:.4f}" for curve in curves.dense.values())
        raise ConfigError(
            f"--target={target} is reached by no size: the curves end at {floors}. Give a higher loss, or runs of "
            f"larger models"
        )
    return ranked


@dataclasses.dataclass(frozen=True)
class Rival:
    """One row of the comparison around GQE; loss is None where no run says it."""

    name: str
    attending: int
    kv_heads: int
    parameters: float
    flops: float
    memory: float
    loss: float | None


def compare_gqe(curves: Curves, heads: Routed, target: float, context: int) -> list[Rival]:
    """Sets GQE beside dense GQA, SQA of equal attention, and the larger model with fewer heads of equal C(T).

    The first four have depth and width of the dense model that reaches the target.

    Raises:
      ConfigError: no dense curve of these heads, or one that does not reach the target.
    """
    experts, groups, top_k = heads
    if experts % groups or top_k > experts // groups:
        raise ConfigError(
            f"--gqe={experts},{groups},{top_k} is no GQE: query experts must be a multiple of KV heads, and top_k "
            f"at most their ratio"
        )
    if (experts, groups) not in curves.dense:
        known = "; ".join(_name(key) for key in curves.dense)
        raise ConfigError(
            f"--gqe={experts},{groups},{top_k} is compared with {_name((experts, groups))}, of which no curve was "
            f"given: add its runs (there are: {known})"
        )
    size = curves.dense[experts, groups].size(target)
    if math.isinf(size):
        raise ConfigError(f"--target={target} is not reached by {_name((experts, groups))}: give a higher loss")
    dim = curves.head_dim
    form = shape(size, 2 * dim * (experts + groups))
    routed = groups * top_k

    def row(name: str, attending: int, kv_heads: int, columns: float, curve: Fit | None, extra: float = 0) -> Rival:
        body = form.layers * (form.d_model * (columns + extra) + 8 * form.d_model**2)
        parameters = body + curves.vocab_size * form.d_model
        sizes = {"layers": form.layers, "head_dim": dim}
        flops = decode_flops(parameters, context, attending=attending, **sizes)
        memory = kept_numbers(parameters, context, kv_heads=kv_heads, **sizes)
        return Rival(name, attending, kv_heads, parameters, flops, memory, curve.loss(body) if curve else None)

    def dense(name: str, query_heads: int, kv_heads: int) -> Rival:
        curve = curves.dense.get((query_heads, kv_heads))
        return row(name, query_heads, kv_heads, 2 * dim * (query_heads + kv_heads), curve)

    columns = dim * (experts + 2 * groups + 1 + routed + 2)  # W_q, W_k and W_v, W_s, W_o
    gqe = row("GQE", routed + 1, groups, columns, curves.routed.get(heads), extra=experts)
    divisor = max(n for n in range(1, groups + 1) if (routed + 1) % n == 0)
    rows = [dense("dense GQA", experts, groups), gqe, dense("SQA, k·G heads", routed, groups)]
    rows.append(dense("SQA, k·G + 1 heads", routed + 1, divisor))
    larger = _larger(curves, gqe, context)
    return rows if larger is None else [*rows, larger]


def _larger(curves: Curves, gqe: Rival, context: int) -> Rival | None:
    """Returns the larger dense model with fewer heads and GQE's C(T) that has the lowest loss; None: no curve is of
    such."""
    found = []
    for (query_heads, kv_heads), curve in curves.dense.items():
        if query_heads >= gqe.attending:
            continue
        low, high = 1.0, 1e15
        sizes = {"head_dim": curves.head_dim, "vocab_size": curves.vocab_size}
        while high / low > 1 + 1e-9:
            middle = math.sqrt(low * high)
            cheaper = candidate(query_heads, kv_heads, middle, context, **sizes).flops < gqe.flops
            low, high = (middle, high) if cheaper else (low, middle)
        each = candidate(query_heads, kv_heads, low, context, **sizes)
        counts = each.parameters, each.flops, each.memory
        found.append(Rival("larger, fewer heads", query_heads, kv_heads, *counts, curve.loss(low)))
    return min(found, key=lambda rival: rival.loss, default=None)


# ---- text and picture


def report_curves(curves: Curves) -> str:
    """Returns one line for each curve."""
    lines = ["L(N) = A · N^(-b) + E, N parameters without embeddings, nats per token"]
    lines.append(f"  {'heads':<46}{'A':>11}{'b':>8}{'E':>9}{'residual':>10}{'runs':>6}")
    for key, curve in _all(curves):
        runs = len(curves.points.get(key, ())) or "-"
        numbers = f"{curve.amplitude:>11.4g}{curve.exponent:>8.4f}{curve.floor:>9.4f}{curve.residual:>10.4f}"
        lines.append(f"  {_name(key):<46}{numbers}{runs:>6}")
    return "\n".join(lines)


def report_search(curves: Curves, ranked: Sequence[Candidate], target: float, context: int) -> str:
    """Returns the candidates, the cheapest first, those that the runs say little of, and the command that trains the
    first."""
    lines = [f"loss {target:g} at {context:,} tokens of context, cheapest first (Z = 0.9 √M + 0.1 ∛C)"]
    lines.append(f"  {'H':>4}{'G':>4}{'parameters':>15}{'layers':>8}{'d_model':>9}{'M':>11}{'C':>11}{'Z':>11}")
    for each in ranked:
        if math.isinf(each.cost):
            lines.append(f"  {each.query_heads:>4}{each.kv_heads:>4}  no size reaches the loss")
            continue
        lines.append(
            f"  {each.query_heads:>4}{each.kv_heads:>4}{each.parameters:>15,.0f}{each.shape.layers:>8.1f}"
            f"{each.shape.d_model:>9.0f}{each.memory:>11.3g}{each.flops:>11.3g}{each.cost:>11.4g}"
        )
    for each in ranked:
        sizes = [size for size, _ in curves.points.get((each.query_heads, each.kv_heads), ())]
        if sizes and not math.isinf(each.size) and not min(sizes) / BEYOND <= each.size <= max(sizes) * BEYOND:
            lines.append(
                f"  note: ({each.query_heads}, {each.kv_heads}) is far outside its runs, of {min(sizes):,.0f} to "
                f"{max(sizes):,.0f} parameters without embeddings, and needs {each.size:,.0f}"
            )
    return "\n".join([*lines, command(ranked[0], context, curves.head_dim, curves.vocab_size)])


def command(best: Candidate, context: int, head_dim: int, vocab_size: int) -> str:
    """Returns a `gqe train` line with the sizes rounded to what a configuration can have."""
    d_model = max(WIDTHS, WIDTHS * round(best.shape.d_model / WIDTHS))
    fields = {
        "model.d_model": d_model,
        "model.num_layers": max(1, round(best.shape.layers)),
        "model.d_ff": WIDTHS * math.ceil(8 * d_model / 3 / WIDTHS),
        "model.context": context,
        "model.vocab_size": vocab_size,
        "model.attention.num_query_heads": best.query_heads,
        "model.attention.num_kv_heads": best.kv_heads,
        "model.attention.head_dim": head_dim,
    }
    words = ["gqe", "train", "--config", "gqa_250m", "--run", "runs/heads"]
    return "  " + shlex.join([*words, *(f"--config.{name}={value}" for name, value in fields.items())])


def report_rivals(rivals: Sequence[Rival], context: int) -> str:
    """Returns the comparison around GQE; ratios are to the dense model."""
    dense = rivals[0]
    lines = [f"GQE beside its rivals at {context:,} tokens of context"]
    lines.append(f"  {'':<22}{'H':>4}{'G':>4}{'parameters':>15}{'M':>11}{'':>7}{'C':>11}{'':>7}{'loss':>10}")
    for each in rivals:
        loss = "not known" if each.loss is None else f"{each.loss:.4f}"
        lines.append(
            f"  {each.name:<22}{each.attending:>4}{each.kv_heads:>4}{each.parameters:>15,.0f}{each.memory:>11.3g}"
            f"{each.memory / dense.memory - 1:>+7.1%}{each.flops:>11.3g}{each.flops / dense.flops - 1:>+7.1%}{loss:>10}"
        )
    return "\n".join([*lines, "H: heads that attend. A loss is not known where no runs of these heads were given."])


def write_png(curves: Curves, searches: Mapping[int, Sequence[Candidate]], path: str) -> None:
    """Draws the curves with their runs, and the cost Z of each choice of heads at each context.

    Raises:
      ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--plot={path} needs matplotlib, which is not installed ({error}): pip install 'gqe_jax[viz]', or leave "
            f"--plot out"
        ) from error
    import numpy as np

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sizes = [size for found in curves.points.values() for size, _ in found] or [1e6, 1e9]
    grid = np.geomspace(min(sizes), max(sizes), 100)
    for key, curve in _all(curves):
        (line,) = left.plot(grid, [curve.loss(size) for size in grid], label=_name(key), linewidth=1.2)
        if key in curves.points:
            left.plot(*zip(*curves.points[key], strict=True), "o", color=line.get_color(), markersize=4)
    left.set(xscale="log", xlabel="parameters without embeddings", ylabel="held-out loss, nats per token")
    for context, ranked in searches.items():
        shown = [each for each in ranked if not math.isinf(each.cost)]
        order = sorted(shown, key=lambda each: (each.query_heads, each.kv_heads))
        names = [f"{each.query_heads}, {each.kv_heads}" for each in order]
        right.plot(names, [each.cost for each in order], "o-", label=f"{context:,} tokens")
    right.set(yscale="log", xlabel="query heads, KV heads", ylabel="Z")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, format="png", dpi=200)
    except OSError as error:
        raise ConfigError(f"--plot={path!r} cannot be written ({error.strerror}): choose another file") from error
