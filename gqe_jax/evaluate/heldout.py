"""Loss on held-out text: every token counts exactly once; by domain, and by how much context a token has."""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.data.manifest import SplitInfo, heldout_documents
from gqe_jax.data.reading.compressors import compression_baselines
from gqe_jax.data.reading.pipeline import heldout_batches
from gqe_jax.data.reading.prepared import PreparedData, PreparedSet
from gqe_jax.models.transformer import Transformer
from gqe_jax.parallel.mesh import local_rows, shard_batch
from gqe_jax.parallel.rules import replicated

LOSS_CHUNK = 512  # tokens of each row whose logits exist at one time

_AHEAD = 2  # batches that are dispatched before the device has computed them
_COMPRESSED_BYTES = 2**27  # beyond this much text, compressors take longer than a model


@dataclasses.dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats of the tokens that have `first` to `last` inputs of their document before them in the row."""

    first: int
    last: int
    loss: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Result of an evaluation.

    Of a mixture, each set counts with all its held-out tokens, so every figure is that of one long text.

    Attributes:
      loss: nats per token.
      bits_per_byte: of the text; the end of each document counts as a token to predict, and as no byte. Over a part of
        the text (`limit`) it is an estimate, with the whole split's tokens per byte.
      perplexity: e to the loss; infinite where float64 has no such number, as is `word_perplexity`.
      word_perplexity: e to the loss per word (words are separated by white space); estimated as `bits_per_byte` is.
      tokens: how many were predicted.
      load: float64 [L, G, M], share of tokens that selected each expert; None for dense attention.
      by_position: loss by context, in ranges that double.
      by_set: result of each set of a mixture by its name; empty for one set.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    word_perplexity: float
    tokens: int
    load: np.ndarray | None
    by_position: tuple[PositionLoss, ...]
    by_set: dict[str, "HeldOut"]


def batch_loss(model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the real tokens of a batch.

    Returns `nats`, the loss; `tokens`, their number; both also by position in the segment, `position_nats` and
    `position_tokens` [S]; and `load` [L, G, M], the mean share of tokens per expert.
    """
    x, report = model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    losses = model.losses(x, batch["targets"], LOSS_CHUNK) * batch["mask"]
    zeros, positions = jnp.zeros(losses.shape[1]), batch["positions"]
    result = {
        "nats": jnp.sum(losses),
        "tokens": batch["mask"].sum(),
        "position_nats": zeros.at[positions].add(losses),
        "position_tokens": zeros.astype(jnp.int32).at[positions].add(batch["mask"]),
    }
    return result | {name: report.metrics[name] for name in ("load",) if name in report.metrics}


def evaluate(
    evaluate_batch: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    data: PreparedData,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    limit: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Sums the losses over the held-out split, or over the first `limit` batches (of a mixture: equally many of each).

    Args:
      evaluate_batch: `batch_loss` of a model, compiled.
      batch_size: rows of the global batch.
      between: called before each batch; what it raises ends the evaluation.
    """
    each = None if limit is None else -(-limit // len(data.sets))
    sums = [_sums(evaluate_batch, part, mesh, batch_size, each, between) for part in data.sets]
    infos = [part.manifest.heldout for part in data.sets]
    results = [_result([total], [info]) for total, info in zip(sums, infos, strict=True)]
    if len(results) == 1:
        return results[0]
    by_set = {part.name: result for part, result in zip(data.sets, results, strict=True)}
    return dataclasses.replace(_result(sums, infos), by_set=by_set)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Holds sums over the evaluated part of one set, arrays in float64."""

    nats: float
    tokens: int
    position_nats: np.ndarray
    position_tokens: np.ndarray
    load: np.ndarray | None


def _sums(
    evaluate_batch: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    data: PreparedSet,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    limit: int | None,
    between: Callable[[], None],
) -> _Sums:
    results: list[dict[str, Any]] = []
    with heldout_batches(data, batch_size, local_rows(mesh, batch_size)) as batches:
        for batch in itertools.islice(batches, limit):
            if len(results) >= _AHEAD:
                results[-_AHEAD] = jax.device_get(results[-_AHEAD])
            between()
            results.append(evaluate_batch(shard_batch(mesh, batch)))
    results = jax.device_get(results)
    tokens = [int(result["tokens"]) for result in results]
    load = np.average([result["load"] for result in results], axis=0, weights=tokens) if "load" in results[0] else None
    return _Sums(
        math.fsum(float(result["nats"]) for result in results),
        sum(tokens),
        np.sum([result["position_nats"] for result in results], axis=0, dtype=np.float64),
        np.sum([result["position_tokens"] for result in results], axis=0, dtype=np.float64),
        load,
    )


def _result(parts: Sequence[_Sums], infos: Sequence[SplitInfo]) -> HeldOut:
    """Returns the figures of sets together, each weighted by all the tokens that it holds out."""
    weights = [info.tokens / part.tokens for part, info in zip(parts, infos, strict=True)]  # 1 where all was read
    tokens = sum(info.tokens for info in infos)
    nats = math.fsum(weight * part.nats for weight, part in zip(weights, parts, strict=True))
    load = None
    if parts[0].load is not None:
        load = np.average([part.load for part in parts], axis=0, weights=[info.tokens for info in infos])
    return HeldOut(
        loss=nats / tokens,
        bits_per_byte=nats / math.log(2) / sum(info.bytes for info in infos),
        perplexity=_exponential(nats / tokens),
        word_perplexity=_exponential(nats / max(sum(info.words for info in infos), 1)),
        tokens=sum(part.tokens for part in parts),
        load=load,
        by_position=_by_position(parts, weights),
        by_set={},
    )


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def _by_position(parts: Sequence[_Sums], weights: Sequence[float]) -> tuple[PositionLoss, ...]:
    nats = sum(weight * part.position_nats for weight, part in zip(weights, parts, strict=True))
    tokens = sum(weight * part.position_tokens for weight, part in zip(weights, parts, strict=True))
    ranges, first = [], 0
    while first < len(nats):
        stop = min(2 * first or 1, len(nats))  # 0, 1, 2-3, 4-7, ...
        if tokens[first:stop].sum():
            loss = nats[first:stop].sum() / tokens[first:stop].sum()
            count = sum(part.position_tokens[first:stop].sum() for part in parts)
            ranges.append(PositionLoss(first, stop - 1, float(loss), int(count)))
        first = stop
    return tuple(ranges)


def evaluate_model(
    model: Transformer, data: PreparedData, mesh: jax.sharding.Mesh, *, batch_size: int, limit: int | None = None
) -> HeldOut:
    """`evaluate` of a model that stands on its own."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(
        lambda state, batch: batch_loss(nnx.merge(graphdef, state), batch), out_shardings=replicated(mesh)
    )
    return evaluate(functools.partial(compiled, state), data, mesh, batch_size=batch_size, limit=limit)


def report(result: HeldOut) -> str:
    """Returns the figures of an evaluation in lines, with tables by set and by position."""
    lines = [f"held-out {_figures(result)}"]
    lines += [f"  {name}: {_figures(part)}" for name, part in result.by_set.items()]
    lines.append("loss by position in the document's segment (tokens of context before the input):")
    for part in result.by_position:
        span = f"{part.first}-{part.last}" if part.last > part.first else str(part.first)
        lines.append(f"  {span:>13}  {part.loss:8.4f} nats/token  {part.tokens:>13,} tokens")
    return "\n".join(lines)


def _figures(result: HeldOut) -> str:
    return (
        f"loss {result.loss:.4f} nats/token, perplexity {format_perplexity(result.perplexity)} per token and "
        f"{format_perplexity(result.word_perplexity)} per word, {result.bits_per_byte:.4f} bits/byte "
        f"({result.tokens:,} tokens)"
    )


def format_perplexity(value: float) -> str:
    """Plain digits up to a million; beyond, where digits would not be read, a power of ten: 1.49e+12."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def compare_with_compressors(result: HeldOut, data: PreparedData) -> str:
    """Returns a table: the model's bits per byte among those of general compressors, on the same held-out text."""
    infos = [part.manifest.heldout for part in data.sets]
    num_bytes = sum(info.bytes for info in infos)
    if num_bytes > _COMPRESSED_BYTES:
        return f"held-out text: {num_bytes:,} bytes, too many to compress for comparison"
    rows = {"this model": result.bits_per_byte}
    names = {"order0": "order-0 bytes", "zlib": "zlib -9", "bz2": "bz2 -9", "lzma": "lzma -9e"}
    texts = (document.text for part in data.sets for document in heldout_documents(part.directory))
    rows |= {names[name]: bits for name, bits in compression_baselines(texts).items()}
    documents = sum(info.documents for info in infos)
    lines = [f"held-out text: {documents:,} documents, {num_bytes:,} bytes; each compressed on its own"]
    for name, bits in sorted(rows.items(), key=lambda row: row[1]):
        lines.append(f"  {name:<14} {bits:6.3f} bits/byte" + ("  <" if name == "this model" else ""))
    return "\n".join(lines)
