"""Generates text: a prefill of a batch of prompts, then cached decoding with one dispatch for each token.

The device is always one token ahead: token n + 1 is dispatched before token n is read, so reading and printing cost no
time, and yet every token is seen as soon as it is known.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.attention import Cache
from gqe_jax.config import ConfigError
from gqe_jax.data.tokenizer import Tokenizer
from gqe_jax.models.transformer import Transformer
from gqe_jax.parallel.rules import Placed, placed_variables

Method = Literal["greedy", "plain", "filtered"]
MIN_BUCKET = 32  # shorter prompts and caches are not worth a compilation of their own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how the next token is drawn from the model's distribution.

    The temperature acts first, then `top_k`, then `top_p` on what top_k left (renormalised), as in Hugging Face's
    transformers.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: draw among the k most likely tokens only; None: all.
      top_p: draw from the nucleus only, the fewest most likely tokens whose probabilities sum to at least p, one at
        least (Holtzman et al. 2020); None: all.
      seed: a draw is a function of seed, row and position: it depends on no other row and on no padding.

    Raises:
      ConfigError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature} must be a finite number of at least 0: use 0 for the most likely "
                "token, 1 for the model's own distribution"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1: raise it, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]: choose a value in that range, or leave it out")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must lie in [0, 2**32): choose a value in that range")

    @property
    def method(self) -> Method:
        """The way of drawing, which alone decides what is compiled."""
        if self.temperature < 1e-6:  # float32 cannot tell it from 0
            return "greedy"
        return "plain" if self.top_k is None and self.top_p in (None, 1) else "filtered"

    def arrays(self) -> dict[str, jax.Array]:
        """Returns the values as arrays, arguments of the compiled functions: other values compile nothing anew."""
        return {
            "temperature": jnp.float32(self.temperature),
            "top_k": jnp.int32(2**31 - 1 if self.top_k is None else min(self.top_k, 2**31 - 1)),
            "top_p": jnp.float32(jnp.inf if self.top_p in (None, 1) else self.top_p),
            "seed": jnp.uint32(self.seed),
        }


def sample(logits: jax.Array, positions: jax.Array, arrays: dict[str, jax.Array], method: Method) -> jax.Array:
    """Draws one token per row.

    Args:
      logits: float32 [B, V].
      positions: int32 [B], positions of the tokens that are drawn.
      arrays: `Sampling.arrays()`.
      method: `Sampling.method`.

    Returns:
      int32 [B].
    """
    if method == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    batch, vocab_size = logits.shape
    # The largest logit becomes 0, so that a small temperature cannot overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / arrays["temperature"]
    key = jax.random.key(arrays["seed"])

    def noise(row, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), position), (vocab_size,))

    # argmax(logits + Gumbel noise) is distributed as softmax(logits).
    noisy = logits + jax.vmap(noise)(jnp.arange(batch), positions)
    if method == "plain":
        return jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    order = jnp.argsort(-logits, axis=-1, stable=True)  # of equally likely tokens the lower id comes first
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    keep = jnp.arange(vocab_size) < arrays["top_k"]
    reached = jnp.cumsum(jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf)), axis=-1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))  # probability of all more likely tokens
    keep &= before < arrays["top_p"]
    best = jnp.argmax(jnp.where(keep, jnp.take_along_axis(noisy, order, axis=-1), -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, best[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Generator:
    """Continues prompts with a model.

    It compiles once for each batch size, length bucket (powers of two, at most the capacity) and sampling method. The
    number of tokens, the prompts' lengths within a bucket and the values of `Sampling` compile nothing anew.

    Args:
      model: its parameters are taken as they are now; weights are cast to the model's compute dtype once.
      eos_id: token that stands before every document, and so before every prompt; stops generation by default.
      capacity: tokens of a row in the KV cache, prompt and new tokens together; None: as many as each call needs,
        rounded up to a bucket.

    Raises:
      ConfigError: capacity exceeds the model's context, or eos_id its vocabulary.
    """

    def __init__(self, model: Transformer, *, eos_id: int, capacity: int | None = None):
        self.config = model.config
        self.eos_id = eos_id
        self.capacity = capacity
        if capacity is not None and not 0 < capacity <= self.config.context:
            raise ConfigError(
                f"capacity={capacity} must lie in 1..{self.config.context}, the model's context: choose a value in "
                "that range, or None"
            )
        self._check_tokens("eos_id", np.asarray([eos_id]))
        self._graphdef = nnx.split(model)[0]
        self._params = cast_weights(model, jnp.dtype(self.config.dtype))
        self._prefill = jax.jit(self._prefill_step, static_argnames=("capacity", "method"))
        self._decode = jax.jit(self._decode_step, static_argnames="method", donate_argnames="cache")

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(temperature=0),
        stop_tokens: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """Continues each prompt until a stop token or `max_new_tokens`.

        A row's result depends on no other row. Rows of unequal length are computed together, each at its own positions.

        Args:
          prompts: integer arrays [n]; the generator puts the eos before them, so [] starts a document.
          max_new_tokens: most new tokens of a row.
          sampling: how tokens are drawn; greedily by default.
          stop_tokens: a row ends before any of these; None: eos; (): none stops.

        Returns:
          The new tokens of each row, int32 [at most max_new_tokens]: without the prompt, without the stop token.

        Raises:
          ConfigError: prompt and new tokens exceed the context, or a token is none of the model's.
        """
        rows: list[list[int]] = [[] for _ in prompts]
        tokens = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=stop_tokens)
        for row, token in tokens:
            rows[row].append(token)
        return [np.asarray(row, np.int32) for row in rows]

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(temperature=0),
        stop_tokens: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Does what `generate` does, and yields each (row, token) as soon as it is known, position by position."""
        rows = [np.asarray(prompt) for prompt in prompts]
        limit = self._check(rows, max_new_tokens)
        capacity = self.capacity or _bucket(max(map(len, rows)) + max_new_tokens, limit)
        stops = {self.eos_id} if stop_tokens is None else {int(token) for token in stop_tokens}
        return self._stream(rows, capacity, max_new_tokens, sampling, stops)

    def _stream(
        self, rows: list[np.ndarray], capacity: int, max_new_tokens: int, sampling: Sampling, stops: set[int]
    ) -> Iterator[tuple[int, int]]:
        tokens = np.full((len(rows), _bucket(max(map(len, rows)) + 1, capacity)), self.eos_id, np.int32)
        for row, prompt in enumerate(rows):
            tokens[row, 1 : 1 + len(prompt)] = prompt
        lengths = np.asarray([1 + len(prompt) for prompt in rows], np.int32)
        arrays, method = sampling.arrays(), sampling.method

        token, cache = self._prefill(self._params, tokens, lengths, arrays, capacity=capacity, method=method)
        alive = set(range(len(rows)))
        for left in reversed(range(max_new_tokens)):
            upcoming = None
            if left:
                upcoming, cache = self._decode(self._params, token, cache=cache, arrays=arrays, method=method)
            values = np.asarray(token).tolist()
            alive -= {row for row in alive if values[row] in stops}
            for row in sorted(alive):
                yield row, values[row]
            if not alive:
                return
            token = upcoming

    def _prefill_step(self, params, tokens, lengths, arrays, *, capacity: int, method: Method):
        """Maps tokens [B, S], padded at the end, and their lengths [B] to (the first new token [B], the cache)."""
        model = self._model(params)
        index = jnp.arange(tokens.shape[1])
        x, _, cache = model(
            tokens,
            segment_ids=(index < lengths[:, None]).astype(jnp.int32),
            # Padding repeats the last position: rotary scaling by the longest position must not see the bucket.
            positions=jnp.minimum(index, lengths[:, None] - 1),
            cache=model.init_cache(tokens.shape[0], capacity),
        )
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
        return sample(model.logits(last), lengths, arrays, method), cache

    def _decode_step(self, params, token: jax.Array, cache: Cache, arrays, *, method: Method):
        """Maps a token [B] and the cache to (the next token [B], the grown cache)."""
        model = self._model(params)
        x, _, cache = model(token[:, None], cache=cache)
        return sample(model.logits(x[:, 0]), cache.at(0).lengths, arrays, method), cache

    def _model(self, params: dict[str, Any]) -> Transformer:
        return nnx.merge(self._graphdef, params)

    def _check(self, rows: list[np.ndarray], max_new_tokens: int) -> int:
        """Raises ConfigError for what cannot be generated; returns the most tokens of a row, new ones included."""
        limit, name = self.config.context, "the model's context"
        if self.capacity is not None and self.capacity < limit:
            limit, name = self.capacity, "the generator's capacity"
        if not rows:
            raise ConfigError("prompts is empty: give at least one prompt (an empty one starts a document)")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1: raise it")
        for row, prompt in enumerate(rows):
            which = "prompt" if len(rows) == 1 else f"prompt {row}"
            if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
                raise ConfigError(
                    f"{which} has shape {prompt.shape} and dtype {prompt.dtype}, but must be a flat array of token "
                    "ids: encode the text with the model's tokenizer"
                )
            if len(prompt) >= limit:
                raise ConfigError(
                    f"{which} has {len(prompt)} tokens, but {name} is {limit} tokens, the new ones included: shorten "
                    f"the prompt to at most {limit - 1} tokens"
                )
            if len(prompt) + max_new_tokens > limit:
                raise ConfigError(
                    f"max_new_tokens={max_new_tokens} behind a {which} of {len(prompt)} tokens exceeds {name} of "
                    f"{limit} tokens: lower max_new_tokens to at most {limit - len(prompt)}, or shorten the prompt"
                )
            self._check_tokens(which, prompt)
        return limit

    def _check_tokens(self, name: str, tokens: np.ndarray) -> None:
        strange = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if strange.size:
            raise ConfigError(
                f"{name} holds the token id {strange[0]}, but the model's vocab_size is {self.config.vocab_size}: use "
                "the tokenizer that the model was trained with"
            )


def _bucket(length: int, limit: int) -> int:
    """Rounds `length` up to a power of two, at least MIN_BUCKET and at most `limit`."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), limit)


def cast_weights(model: Transformer, dtype: np.dtype) -> dict[str, Any]:
    """Returns the model's parameters and buffers, with matrices cast to the dtype in which the layers use them.

    Exact ones (the router's kernel, which computes in float32) keep their dtype. Decoding reads all weights for each
    token, and half as wide they take half the time. For an abstract model (`nnx.eval_shape`) the result is abstract.
    """

    def cast(path: tuple[str, ...], placed: Placed) -> Any:
        value = placed.variable.get_value()
        if path[-1] not in ("kernel", "embedding", "lm_head") or placed.exact:
            return value
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(value.shape, dtype) if abstract else value.astype(dtype)

    variables = {tuple(name.split("/")): placed for name, placed in placed_variables(model).items()}
    return nnx.traversals.unflatten_mapping({path: cast(path, placed) for path, placed in variables.items()})


def print_continuations(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, max_new_tokens: int, sampling: Sampling
) -> None:
    """Continues texts on standard output; one line of timings goes to standard error.

    A single text is echoed and its continuation printed as it is produced; several are printed one after another.

    Raises:
      ConfigError: a text is too long, or a token is none of the model's.
    """
    generator = Generator(model, eos_id=tokenizer.eos_id)
    prompts = [tokenizer.encode(text) for text in texts]
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop_tokens": tokenizer.stop_ids}
    stream = functools.partial(generator.stream, prompts, **options)

    started = time.perf_counter()
    next(stream(), None)  # compiles prefill and decode, so that the timings below are those of the model
    compiled = time.perf_counter()
    decoders = [tokenizer.stream() for _ in texts]
    pieces = [[text] for text in texts]
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
    first, count = None, 0
    for row, token in stream():
        first = first or time.perf_counter()
        count += 1
        piece = decoders[row].push(token)
        pieces[row].append(piece)
        if len(texts) == 1:
            print(piece, end="", flush=True)
    ended = time.perf_counter()
    for row, decoder in enumerate(decoders):
        pieces[row].append(decoder.flush())
    if len(texts) == 1:
        print(pieces[0][-1])
    else:
        for row, row_pieces in enumerate(pieces):
            print(f"--- prompt {row + 1} of {len(texts)}", "".join(row_pieces), sep="\n")

    prefill_s = (first or ended) - compiled
    tokens = sum(map(len, prompts)) + len(prompts)
    total_s = ended - compiled
    print(
        f"{count} tokens in {total_s:.2f} s ({count / total_s:.0f} tokens/s), of which prefill of {tokens} tokens "
        f"{1e3 * prefill_s:.1f} ms; compiled in {compiled - started:.1f} s",
        file=sys.stderr,
    )
