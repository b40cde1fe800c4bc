"""`gqe convert`: a run whose attention is another kind's, from a checkpoint of a run."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from gqe_jax.attention import Buffer
from gqe_jax.config import ConfigError, ModelConfig, RunConfig, require
from gqe_jax.convert.layers import Batch, Conversion, Converted, convert_layers
from gqe_jax.data.reading.pipeline import TrainingStream
from gqe_jax.data.reading.prepared import PreparedData, open_data
from gqe_jax.data.tokenizer import ByteTokenizer, Tokenizer
from gqe_jax.evaluate.heldout import HeldOut, evaluate_model
from gqe_jax.models.transformer import Transformer, abstract_model
from gqe_jax.parallel.mesh import check_batch, check_model, shard_batch
from gqe_jax.parallel.rules import state_shardings
from gqe_jax.pytorch.folder import new_folder
from gqe_jax.pytorch.model import abstract_parameters, parameter_bytes
from gqe_jax.runs.checkpoint import least_bytes
from gqe_jax.runs.load import load_model
from gqe_jax.runs.new_run import CONFIG_FILE, TOKENIZER, config_file, save_run, settings_of

TOKENS = 4096  # of a batch of calibration rows on a device
EXAMPLES = 8  # rows of a batch that a reconstruction learns from


@dataclasses.dataclass(frozen=True)
class ConvertedRun:
    """What came of a conversion.

    Attributes:
      step: of the source's checkpoint.
      config: of the new run.
      converted: the model.
      losses: evaluations on the same held-out rows: "source", the conversion's controls by name, "converted".
      notes: what the user should know.
    """

    step: int
    config: RunConfig
    converted: Converted
    losses: dict[str, HeldOut]
    notes: tuple[str, ...]


def convert_run(
    run: str | Path,
    out: str | Path,
    make: Callable[[ModelConfig], Conversion],
    mesh: jax.sharding.Mesh,
    *,
    step: int | None = None,
    data: str | None = None,
    calibration_rows: int = 32,
    heldout_rows: int = 256,
    alpha: float = 0.05,
    refit: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConvertedRun:
    """Converts a run's newest checkpoint, or the one of `step`, and writes the result as a new run.

    Args:
      run: the source's directory.
      out: the directory to make: a checkpoint of step 0 without optimizer state, `config.py` to train on with, the
        tokenizer's files. It appears when all of it is written.
      make: the source's model → the conversion, such as `to_gqa` with its settings.
      mesh: of the devices that compute.
      data: prepared data to calibrate with (training rows) and to compare on (held-out rows); None: the run's own.
      calibration_rows: how many.
      heldout_rows: how many the losses are taken over, in whole batches; 0: all.
      alpha: steps of the new configuration over those of the source's.
      refit: whether output projections are fitted.
      seed: of the order from which the calibration rows are the first.
      progress: called with the layers done and their number.

    Raises:
      ConfigError: a run, settings or data that cannot be used, an `out` that exists. Nothing is written then.
      OSError: the run cannot be written; nothing is left of it.
    """
    require(0 < alpha <= 1, f"--alpha={alpha} must lie in (0, 1]: it is the share of the source's training steps")
    require(heldout_rows >= 0, f"--heldout-rows={heldout_rows} is a number of rows: 0 (all) or more")
    require(0 <= seed < 2**32, f"--seed={seed} must lie in [0, 2**32): choose another seed")
    trained = load_model(run, step, mesh)
    source = trained.config
    if data is not None:
        source = dataclasses.replace(source, data=dataclasses.replace(source.data, path=data, mixture=None))
    conversion = make(source.model)
    config = _config_of(source, conversion, alpha, Path(out), trained.tokenizer)
    check_model(mesh, config.model)
    rows = open_data(source.data, source.model, trained.tokenizer)
    batches, more = _calibration(rows, conversion, mesh, calibration_rows, seed)
    sharing = mesh.shape["data"] * mesh.shape["fsdp"]
    size = sharing * max(1, 2 * TOKENS // rows.seq_len)
    limit = math.ceil(heldout_rows / size) or None

    stages, done = source.model.num_layers * (1 + _count_controls(conversion)), 0

    def advanced(layer: int, _: int) -> None:
        progress(done + layer, stages)

    def loss_of(model: Transformer) -> HeldOut:
        return evaluate_model(model, rows, mesh, batch_size=size, limit=limit)

    written = least_bytes(parameter_bytes(abstract_parameters(config.model)))
    with new_folder(out, "--out", written) as folder, jax.set_mesh(mesh):
        losses = {"source": loss_of(trained.model)}
        if not math.isfinite(losses["source"].loss):
            raise ConfigError(
                f"--run={str(run)!r} has a held-out loss of {losses['source'].loss} at step {trained.step}: its "
                f"parameters are no model to convert; name another --step"
            )
        params = _arrays(trained.model)
        options = {"refit": refit, "more": more, "progress": advanced}

        def try_controls(conversion: Conversion) -> float:
            nonlocal done
            for name, control in conversion.controls.items():
                converted = convert_layers(control, params, source.model, batches, **options)
                losses[name] = loss_of(_model(converted, mesh)[0])
                done += source.model.num_layers
            return [*losses.values()][-1].loss

        best = try_controls(conversion)
        while conversion.alternative is not None:
            loss = try_controls(conversion.alternative)
            if not loss < best:
                stages -= source.model.num_layers * _count_controls(conversion.alternative.alternative)
                break
            best, conversion = loss, conversion.alternative
        converted = convert_layers(conversion, params, source.model, batches, **options)
        model, arrays = _model(converted, mesh)
        losses["converted"] = loss_of(model)
        config = dataclasses.replace(config, model=converted.config)
        save_run(folder, config, trained.tokenizer, arrays)
        text = config_file("A model that gqe convert made.", settings_of(config), SOURCE=str(run), RUN=str(out))
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return ConvertedRun(trained.step, config, converted, losses, conversion.notes)


def _count_controls(conversion: Conversion | None) -> int:
    """Counts the controls of a conversion and of all its alternatives."""
    return 0 if conversion is None else len(conversion.controls) + _count_controls(conversion.alternative)


def _config_of(source: RunConfig, conversion: Conversion, alpha: float, out: Path, tokenizer: Tokenizer) -> RunConfig:
    """Returns the configuration that trains the result for `alpha` of the source's steps."""
    steps = math.ceil(alpha * source.train.steps)
    spec = "bytes" if isinstance(tokenizer, ByteTokenizer) else str(out / TOKENIZER / next(iter(tokenizer.files())))
    return dataclasses.replace(
        source,
        name=out.name,
        model=dataclasses.replace(source.model, attention=conversion.config),
        data=dataclasses.replace(source.data, tokenizer=spec),
        optimizer=conversion.recipe(source.optimizer, source.train.steps, steps),
        train=dataclasses.replace(source.train, steps=steps),
    )


def _calibration(
    data: PreparedData, conversion: Conversion, mesh: jax.sharding.Mesh, count: int, seed: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches of the first `count` training rows in the order of `seed`; as many rows for a reconstruction."""
    sharing = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        count > 0 and count % sharing == 0,
        f"--calibration-rows={count} is no positive multiple of the {sharing} device(s) that share a batch: set it to "
        f"one",
    )
    stream = TrainingStream(data, seed)
    there, need = sum(len(rows) for rows in stream.rows), count
    if conversion.reconstructs:
        need += max(count // EXAMPLES, 1) * EXAMPLES
    require(
        need <= there,
        f"--calibration-rows={count} needs {need} training rows, and {data.name} has {there}: lower it, or give more "
        f"text with --data",
    )
    most = sharing * max(1, TOKENS // data.seq_len)
    size = next(size for size in range(min(most, count), 0, -1) if count % size == 0 and size % sharing == 0)
    check_batch(mesh, size, data.seq_len)
    if conversion.reconstructs:
        check_batch(mesh, EXAMPLES, data.seq_len)

    def read(first: int, size: int) -> Batch:
        rows = stream.read(range(first, first + size))
        return shard_batch(mesh, {name: rows[name] for name in ("tokens", "segment_ids", "positions")})

    batches = [read(first, size) for first in range(0, count, size)]
    return batches, [read(first, EXAMPLES) for first in range(count, need, EXAMPLES)]


def _arrays(model: Transformer) -> dict[str, jax.Array]:
    """Parameters and buffers by path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Buffer)))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def _model(converted: Converted, mesh: jax.sharding.Mesh) -> tuple[Transformer, dict[str, jax.Array]]:
    """Returns the model, and its parameters and buffers by path, placed on the mesh."""
    abstract = abstract_model(converted.config)
    nested: dict[str, Any] = nnx.traversals.unflatten_mapping(
        {tuple(path.split(".")): x for path, x in converted.params.items()}
    )
    placed = jax.tree.map(jax.device_put, nested, state_shardings(mesh, nested, abstract))
    flat = {".".join(path): x for path, x in nnx.traversals.flatten_mapping(placed).items()}
    graphdef, params, buffers = nnx.split(abstract, nnx.Param, Buffer)

    def take(tree: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator=".")], nnx.to_pure_dict(tree)
        )

    return nnx.merge(graphdef, take(params), take(buffers)), flat


def loss_table(losses: dict[str, HeldOut]) -> str:
    """Returns the losses in lines, the source's first."""
    tokens = next(iter(losses.values())).tokens
    lines = [f"held-out loss, nats per token ({tokens:,} tokens):"]
    width = max(map(len, losses))
    first = next(iter(losses.values())).loss
    lines += [f"  {name:<{width}}  {result.loss:.4f}  {result.loss - first:+.4f}" for name, result in losses.items()]
    return "\n".join(lines)
