"""A trained model as EleutherAI's lm-eval sees one: log-likelihoods of continuations, and generation.

Needs the extra `eval` (lm-eval), and no torch. The tasks around it are in `tasks.py`; lm-eval's own functions take it
too: `lm_eval.simple_evaluate(model=JaxLM(load_model("runs/demo")), tasks=["piqa"])`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from gqe_jax.config import ConfigError
from gqe_jax.generate import Generator, Sampling
from gqe_jax.parallel.mesh import make_mesh
from gqe_jax.pytorch.hf_tokenizer import start_token
from gqe_jax.runs.load import TrainedModel

LOGITS_CHUNK = 32  # positions of each row whose logits exist at one time
DEFAULT_NEW_TOKENS = 256  # of a task that does not say; lm-eval's own
SAMPLING_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Row(NamedTuple):
    """A row has tokens that the model reads, and targets that it predicts at the last len(targets) of them."""

    inputs: list[int]
    targets: list[int]


class JaxLM(TemplateLM):
    """lm-eval's interface to a model.

    Every text begins as a document did in training, with an eos (`start_token`); the exported tokenizer puts the same
    token there, so lm-eval's Hugging Face backend sees the same ids. A context that is too long loses its beginning, as
    there. A continuation longer than the model's context, which that backend refuses, is scored in windows.

    Requests are sorted by length and computed in batches of `batch_size` rows, padded to few lengths: each length is
    compiled once.
    """

    def __init__(self, trained: TrainedModel, batch_size: int = 16):
        """Wraps a trained model; batch_size is a number of rows, a multiple of the number of devices.

        Raises:
          ConfigError: the tokenizer has ids that the model has no embedding for.
        """
        super().__init__()
        self._trained_tokenizer = trained.tokenizer
        self._start = start_token(trained.tokenizer)
        self._batch_size = batch_size
        self._model = trained.model
        self.max_length = trained.config.model.context
        vocab_size = trained.config.model.vocab_size
        if trained.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the run's tokenizer has {trained.tokenizer.vocab_size} tokens, but model.vocab_size={vocab_size}: a "
                f"text could hold ids that the model has no embedding for; use the tokenizer that it was trained with"
            )
        mesh = make_mesh()
        self._rows_on = NamedSharding(mesh, PartitionSpec("data"))
        graphdef, self._state = nnx.split(trained.model)
        self._score = jax.jit(functools.partial(_score, graphdef), out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def eot_token_id(self) -> int:
        return self._trained_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, the token that begins a document before them unless `add_special_tokens` is False."""
        begin = [] if add_special_tokens is False else [self._start]
        return begin + self._trained_tokenizer.encode(string).tolist()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each a document of its own, in windows that fill the model's context."""
        texts = [instance.args for instance in requests]
        tokens = [((text, ""), [self._start], self.tok_encode(text, add_special_tokens=False)) for (text,) in texts]
        return [loglikelihood for loglikelihood, _ in self._loglikelihood_tokens(tokens, disable_tqdm=disable_tqdm)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation, given its context.

        An empty continuation is certain: (0.0, True).
        """
        rows, owners = [], []
        for index, (_, context, continuation) in enumerate(requests):
            for row in self._rows(context, continuation):
                rows.append(row)
                owners.append(index)
        parts: list[list[float]] = [[] for _ in requests]
        greedy = [True] * len(requests)
        with tqdm(total=len(rows), desc="Scoring", disable=disable_tqdm) as progress:
            for at, logprobs, hits in self._score_rows(rows):
                parts[owners[at]].append(math.fsum(logprobs))
                greedy[owners[at]] &= bool(hits.all())
                progress.update()
        return [(math.fsum(part), is_greedy) for part, is_greedy in zip(parts, greedy, strict=True)]

    def _rows(self, context: list[int], continuation: list[int]) -> Iterator[Row]:
        if not continuation:
            return
        if len(continuation) <= self.max_length:
            yield Row((context + continuation)[-(self.max_length + 1) : -1], continuation)
            return
        windows = get_rolling_token_windows(
            continuation, prefix_token=context[-1], max_seq_len=self.max_length, context_len=1
        )
        yield from itertools.starmap(Row, windows)

    def _score_rows(self, rows: Sequence[Row]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(index of the row, log-probability of each target, whether each is the most likely token), as computed."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].inputs))  # the most memory first
        running = None
        for begin in range(0, len(order), self._batch_size):
            chosen = order[begin : begin + self._batch_size]
            batch = self._batch([rows[index] for index in chosen])
            dispatched = chosen, self._score(self._state, batch)
            if running is not None:
                yield from self._results(rows, *running)
            running = dispatched
        if running is not None:
            yield from self._results(rows, *running)

    def _results(
        self, rows: Sequence[Row], chosen: list[int], scores: tuple[jax.Array, jax.Array]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        logprobs, hits = map(np.asarray, scores)
        for row, index in enumerate(chosen):
            count = len(rows[index].targets)
            yield index, logprobs[row, :count], hits[row, :count]

    def _batch(self, rows: Sequence[Row]) -> dict[str, jax.Array]:
        """Returns the rows, padded behind and below, on the devices: see `_score`."""
        length = padded_length(max(len(row.inputs) for row in rows), self.max_length)
        shape = (self._batch_size, length)
        batch = {"tokens": np.full(shape, self._start, np.int32), "targets": np.zeros(shape, np.int32)}
        batch |= {"lengths": np.ones(self._batch_size, np.int32), "counts": np.zeros(self._batch_size, np.int32)}
        for index, row in enumerate(rows):
            batch["tokens"][index, : len(row.inputs)] = row.inputs
            batch["targets"][index, : len(row.targets)] = row.targets
            batch["lengths"][index] = len(row.inputs)
            batch["counts"][index] = len(row.targets)
        # Every process has all requests, and gives its devices their rows.
        return {
            name: jax.make_array_from_callback(array.shape, self._rows_on, array.__getitem__)
            for name, array in batch.items()
        }

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings, eos, or its number of tokens.

        A context that is too long for the model, the new tokens counted, loses its beginning.

        Raises:
          ConfigError: a task's generation options that are not known here, or more new tokens than the context holds.
        """
        generator = Generator(self._model, eos_id=self._start)
        results = [""] * len(requests)
        encoded = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(encoded[i])))
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for _, group in itertools.groupby(order, key=lambda i: repr(requests[i].args[1])):
                members = list(group)
                options = requests[members[0]].args[1]
                for begin in range(0, len(members), self._batch_size):
                    chosen = members[begin : begin + self._batch_size]
                    texts = self._generate(generator, [encoded[i] for i in chosen], options)
                    for index, text in zip(chosen, texts, strict=True):
                        results[index] = text
                    progress.update(len(chosen))
        return results

    def _generate(self, generator: Generator, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        unknown = sorted(options.keys() - SAMPLING_OPTIONS)
        if unknown:
            raise ConfigError(
                f"the task asks for the generation option(s) {', '.join(unknown)}, which gqe_jax does not have (it has "
                f"{', '.join(sorted(SAMPLING_OPTIONS))}): export the model and score that task with PyTorch"
            )
        stops = [stop for stop in handle_stop_sequences(options["until"], eos=None) if stop]
        new_tokens = options["max_gen_toks"]
        room = self.max_length - new_tokens - 1  # one is the token that begins a document
        if room < 1:
            raise ConfigError(
                f"the task generates up to max_gen_toks={new_tokens} tokens, which leaves no room for a prompt in the "
                f"model's context of {self.max_length}: this model cannot be scored on it"
            )
        sampling = Sampling(temperature=0)
        if options["do_sample"]:
            sampling = Sampling(
                temperature=options.get("temperature", 1.0), top_k=options.get("top_k"), top_p=options.get("top_p")
            )
        prompts = [np.asarray(context[-room:], np.int32) for context in contexts]
        decoders = [self._trained_tokenizer.stream() for _ in prompts]
        texts = [""] * len(prompts)
        unfinished = set(range(len(prompts)))
        stream = generator.stream(prompts, max_new_tokens=new_tokens, sampling=sampling, stop_tokens=())
        for row, token in stream:
            if row in unfinished:
                if token == self.eot_token_id:
                    unfinished.discard(row)
                else:
                    texts[row] += decoders[row].push(token)
                    if any(stop in texts[row] for stop in stops):
                        unfinished.discard(row)
            if not unfinished:
                break
        texts = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [postprocess_generated_text(text, stop=stops, think_end_token=None) for text in texts]


def padded_length(length: int, limit: int) -> int:
    """Returns the next of 32, 48, 64, 96, 128, ... (powers of two, and one between each two of them), at most
    `limit`."""
    power = max(32, 1 << (length - 1).bit_length())
    between = power * 3 // 4
    return min(between if length <= between and power > 32 else power, limit)


def _score(graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of continuations; logits exist for `LOGITS_CHUNK` positions of each row at a time.

    Args:
      batch: `tokens` int32 [B, S]; `lengths` int32 [B], of the rows without padding, at least 1; `targets` int32
        [B, S], the tokens to be predicted at the last positions, beginning on the left; `counts` int32 [B], how many.

    Returns:
      Log-probability of each target, float32 [B, at least S], and whether it is the most likely token. What lies at
      `counts` and behind has no meaning.
    """
    model = nnx.merge(graphdef, state)
    length = batch["tokens"].shape[1]
    index = jnp.arange(length)
    ends = batch["lengths"][:, None]
    x, _ = model(
        batch["tokens"],
        segment_ids=(index < ends).astype(jnp.int32),
        # Padding repeats the last position: rotary scaling by the longest position must not see it.
        positions=jnp.minimum(index, ends - 1),
    )
    chunks = -(-length // LOGITS_CHUNK)
    targets = jnp.pad(batch["targets"], ((0, 0), (0, chunks * LOGITS_CHUNK - length)))
    first = ends - batch["counts"][:, None]

    def chunk(i, scores):
        columns = i * LOGITS_CHUNK + jnp.arange(LOGITS_CHUNK)
        at = jnp.minimum(first + columns, length - 1)
        logits = model.logits(jnp.take_along_axis(x, at[:, :, None], axis=1))
        wanted = jax.lax.dynamic_slice_in_dim(targets, i * LOGITS_CHUNK, LOGITS_CHUNK, axis=1)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, :, None], axis=-1)[:, :, 0]
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * LOGITS_CHUNK, axis=1)
        return put(scores[0], logprobs), put(scores[1], jnp.argmax(logits, axis=-1) == wanted)

    scores = jnp.zeros(targets.shape), jnp.zeros(targets.shape, bool)
    return jax.lax.fori_loop(0, -(-batch["counts"].max() // LOGITS_CHUNK), chunk, scores)
