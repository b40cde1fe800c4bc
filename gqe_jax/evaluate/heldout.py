"""Loss on held-out text: every token counts exactly once."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.data.compressors import compression_baselines
from gqe_jax.data.manifest import heldout_documents
from gqe_jax.data.pipeline import heldout_batches
from gqe_jax.data.prepared import PreparedData
from gqe_jax.models.transformer import Transformer, token_losses
from gqe_jax.parallel.mesh import shard_batch

LOSS_CHUNK = 512  # tokens of each row whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Result of an evaluation.

    Attributes:
      loss: nats per token.
      bits_per_byte: of the text; the end of each document counts as a token to predict, and as no byte. Over a part of
        the text (`limit`) it is an estimate, with the whole split's tokens per byte.
      perplexity: e to the loss.
      tokens: how many were predicted.
      load: float64 [L, G, M], share of tokens that selected each expert; None for dense attention.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    load: np.ndarray | None


def batch_loss(model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Summed loss in nats (`nats`) over the real tokens of a batch, their number (`tokens`), and `load` [L, G, M]."""
    x, stats = model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    losses = token_losses(model, x, batch["targets"], LOSS_CHUNK)
    result = {"nats": jnp.sum(losses * batch["mask"]), "tokens": batch["mask"].sum()}
    return result if stats is None else result | {"load": stats.load}


def evaluate(
    evaluate_batch: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    data: PreparedData,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    limit: int | None = None,
) -> HeldOut:
    """Sums the losses over the held-out split, or over its first `limit` batches.

    Args:
      evaluate_batch: `batch_loss` of a model, compiled.
      batch_size: rows of the global batch.
    """
    results: list[dict[str, Any]] = []
    with heldout_batches(data.directory, batch_size, jax.process_index(), jax.process_count()) as batches:
        for batch in itertools.islice(batches, limit):  # dispatch runs ahead of the device; all is fetched at the end
            results.append(evaluate_batch(shard_batch(mesh, batch)))
    results = jax.device_get(results)
    tokens = [int(result["tokens"]) for result in results]
    loss = math.fsum(float(result["nats"]) for result in results) / sum(tokens)
    load = np.average([result["load"] for result in results], axis=0, weights=tokens) if "load" in results[0] else None
    bits_per_byte = loss / math.log(2) * data.tokens_per_byte("heldout")
    return HeldOut(loss, bits_per_byte, math.exp(min(loss, 700.0)), sum(tokens), load)


def evaluate_model(model: Transformer, data: PreparedData, mesh: jax.sharding.Mesh, *, batch_size: int) -> HeldOut:
    """`evaluate` of a model that stands on its own."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, batch: batch_loss(nnx.merge(graphdef, state), batch))
    return evaluate(functools.partial(compiled, state), data, mesh, batch_size=batch_size)


def compare_with_compressors(result: HeldOut, data: PreparedData) -> str:
    """A table: the model's bits per byte among those of general compressors, on the same held-out text."""
    info = data.manifest.heldout
    rows = {"this model": result.bits_per_byte}
    names = {"order0": "order-0 bytes", "zlib": "zlib -9", "bz2": "bz2 -9", "lzma": "lzma -9e"}
    baselines = compression_baselines(document.text for document in heldout_documents(data.directory))
    rows |= {names[name]: bits for name, bits in baselines.items()}
    lines = [f"held-out text: {info.documents:,} documents, {info.bytes:,} bytes; each compressed on its own"]
    for name, bits in sorted(rows.items(), key=lambda row: row[1]):
        lines.append(f"  {name:<14} {bits:6.3f} bits/byte" + ("  <" if name == "this model" else ""))
    return "\n".join(lines)
