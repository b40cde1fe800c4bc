"""A model's attention converted layer by layer, from the bottom.

Two residual streams of the calibration rows go up together: the source's, and that of the layers converted so far. A
layer is fitted so that its own stream meets the source's, and so repairs what the ones below it lost.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.attention import Attention, Buffer
from gqe_jax.config import AttentionConfig, ModelConfig, OptimizerConfig
from gqe_jax.convert.refit import Regression
from gqe_jax.models.block import Block
from gqe_jax.pytorch.model import abstract_parameters
from gqe_jax.pytorch.names import STACKED

ATTENTION = "attention."
OUTPUTS = ("o_proj", "o_extra")  # the output projection's parts, in the order of its rows

Params = dict[str, np.ndarray]
"""Path within the attention layer → parameter or buffer of one layer, in float64: "q_proj.kernel" [d, G, M, D]."""
Batch = Mapping[str, jax.Array]
"""tokens, segment_ids and positions, int32 [B, S]; tokens of segment 0 are padding."""


def scaled_recipe(optimizer: OptimizerConfig, before: int, steps: int) -> OptimizerConfig:
    """Returns the optimizer's settings for `steps` steps in place of `before`: warm-up and decay are shortened
    alike."""
    return dataclasses.replace(
        optimizer,
        warmup_steps=optimizer.warmup_steps * steps // before,
        decay_steps=optimizer.decay_steps * steps // before,
    )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How each layer of one kind of attention becomes one of another.

    Attributes:
      config: of the attention that comes out.
      layer: a layer of the source, what calibration knows of it, and its number → the layer that comes out, and what
        there is to say of it in a few words.
      lossless: the layers compute what the source's do: no output projection is fitted.
      moments: `layer` asks for `Calibration.moments`.
      reconstructs: `layer` asks for `Calibration.examples`, which takes rows of its own.
      recipe: the source's optimizer settings, its steps and the new run's → the settings that train the result.
      finish: all layers' arrays, stacked, and `config` → those of the same function in fewer numbers; or None.
      controls: name → what to compare with: conversions of the same source.
      alternative: the conversion with another setting and the same result's configuration, to be tried in its place. It
        is taken if the loss of its last control is lower, and then its own alternative is tried.
      notes: what the user should know.
    """

    config: AttentionConfig
    layer: Callable[[Params, "Calibration", int], tuple[Params, str]]
    lossless: bool = False
    moments: bool = False
    reconstructs: bool = False
    recipe: Callable[[OptimizerConfig, int, int], OptimizerConfig] = scaled_recipe
    finish: Callable[[Params, AttentionConfig], tuple[Params, AttentionConfig]] | None = None
    controls: Mapping[str, "Conversion"] = dataclasses.field(default_factory=dict)
    alternative: "Conversion | None" = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the calibration rows say of one layer.

    Attributes:
      moments: Σ (u, 1)(u, 1)ᵀ over the real tokens of the source's stream, u [d] being the layer's normed input:
        float64 [d + 1, d + 1]; zeros unless asked for.
      regress: an attention's configuration and parameters → sums of its features on the converted layers' stream, and
        of the target, the source's stream behind this layer minus the converted one before it, minus the output bias.
      examples: (normed input, target with the bias, batch) of rows that `regress` does not see, without end; the first
        two float32 [B, S, d].
    """

    moments: np.ndarray
    regress: Callable[[AttentionConfig, Params], Regression]
    examples: Iterator[tuple[jax.Array, jax.Array, Batch]]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model with another attention.

    Attributes:
      params: path ("layers.attention.q_proj.kernel" [L, d, G, M, D]) → parameter or buffer; what is not attention is
        the source's very array.
      config: of the model.
      errors: of each layer, |y − target| / |target| of its attention's output over the calibration rows.
      notes: of each layer, what its conversion has to say.
    """

    params: dict[str, Any]
    config: ModelConfig
    errors: tuple[float, ...]
    notes: tuple[str, ...]


def convert_layers(
    conversion: Conversion,
    params: Mapping[str, Any],
    config: ModelConfig,
    batches: Sequence[Batch],
    *,
    refit: bool = True,
    more: Sequence[Batch] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Converts every layer and, unless the conversion is lossless, fits its output projection to the target.

    Equal inputs give equal bits. In memory: the model, the new attention, the residual streams of the calibration rows
    twice in float32, and one layer with its sums in float64. Under `jax.set_mesh` the layers run device by device.

    Args:
      conversion: what to do.
      params: of the source, by path, as in `Converted`.
      config: of the source.
      batches: calibration rows.
      refit: whether to fit the output projections.
      more: further rows, for a conversion that reconstructs.
      progress: called with the layers done and their number.

    Returns:
      The result; for a conversion to the source's own configuration it has the source's own arrays.
    """
    target, num_layers = dataclasses.replace(config, attention=conversion.config), config.num_layers
    if conversion.config == config.attention:
        return Converted(dict(params), config, (0.0,) * num_layers, ("unchanged",) * num_layers)
    prefix = f"{STACKED}."
    abstract = {
        path.removeprefix(prefix + ATTENTION): leaf
        for path, leaf in abstract_parameters(target).items()
        if path.startswith(prefix + ATTENTION)
    }
    stacked = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    source, result = _blocks(config), _blocks(target)
    dense = [_embedded(params, batch) for batch in [*batches, *more]]
    streams = _Streams([*batches, *more], len(batches), dense, list(dense))
    errors, notes = [], []
    with jax.default_matmul_precision("highest"):
        for index in range(num_layers):
            own = {path.removeprefix(prefix): x[index] for path, x in params.items() if path.startswith(prefix)}
            moments = streams.pass_attention(source, own, conversion.moments)
            regress = functools.partial(streams.regress, own, config)
            attention = {
                path.removeprefix(ATTENTION): np.asarray(x, np.float64)
                for path, x in own.items()
                if path.startswith(ATTENTION)
            }
            calibration = Calibration(moments, regress, streams.examples(source, own))
            layer, note = conversion.layer(attention, calibration, index)
            sums = regress(conversion.config, layer)
            if refit and not conversion.lossless:
                layer |= split_output(sums.ridge(output_matrix(layer)), layer)
            for path, leaf in abstract.items():
                stacked[path][index] = layer[path].astype(leaf.dtype)
            layer = {path: x[index] for path, x in stacked.items()}
            errors.append(sums.relative_error(output_matrix(layer).astype(np.float64)))
            notes.append(note)
            streams.pass_layer(source, own, result, _with_attention(own, layer))
            progress(index + 1, num_layers)
    kept = {path: x for path, x in params.items() if not path.startswith(prefix + ATTENTION)}
    if conversion.finish is not None:
        stacked, attention = conversion.finish(stacked, conversion.config)
        target = dataclasses.replace(config, attention=attention)
    new = {prefix + ATTENTION + path: x for path, x in stacked.items()}
    return Converted(kept | new, target, tuple(errors), tuple(notes))


def output_matrix(params: Params) -> np.ndarray:
    """Returns the output projection as one matrix [f, d], which multiplies a layer's features."""
    kernels = [params[f"{name}.kernel"] for name in OUTPUTS if f"{name}.kernel" in params]
    return np.concatenate([kernel.reshape(-1, kernel.shape[-1]) for kernel in kernels])


def split_output(weights: np.ndarray, like: Params) -> Params:
    """Returns the reverse of `output_matrix`, in the shapes of `like`."""
    paths = [f"{name}.kernel" for name in OUTPUTS if f"{name}.kernel" in like]
    ends = np.cumsum([like[path].size // weights.shape[1] for path in paths])
    parts = np.split(weights, ends[:-1])
    return {path: part.reshape(like[path].shape) for path, part in zip(paths, parts, strict=True)}


def _with_attention(block: Mapping[str, Any], attention: Params) -> dict[str, Any]:
    """Returns a block's parameters with another attention's."""
    rest = {path: x for path, x in block.items() if not path.startswith(ATTENTION)}
    return rest | {ATTENTION + path: x for path, x in attention.items()}


def _embedded(params: Mapping[str, Any], batch: Batch) -> jax.Array:
    """float32 [B, S, d]."""
    return jnp.asarray(params["vocabulary.embedding"])[batch["tokens"]].astype(jnp.float32)


class _Blocks:
    """The blocks of a model as functions of one block's parameters by path, computed in float32."""

    def __init__(self, config: ModelConfig):
        config = dataclasses.replace(config, dtype="float32")
        block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
        self._graphdef, _, buffers = nnx.split(block, nnx.Param, Buffer)
        self._buffers = {".".join(path) for path in nnx.traversals.flatten_mapping(nnx.to_pure_dict(buffers))}
        self.norm = jax.jit(lambda params, x: self.block(params).attention_norm(x))
        self.attend = jax.jit(self._attend)
        self.features = jax.jit(self._features)
        self.mlp = jax.jit(self._mlp)

    def block(self, params: Mapping[str, Any]) -> Block:
        """Returns the block with these parameters."""
        return nnx.merge(self._graphdef, *_split(params, self._buffers))

    def _attend(self, params: Mapping[str, Any], x: jax.Array, batch: Batch) -> jax.Array:
        """[B, S, d] → the stream behind the attention, [B, S, d]."""
        block = self.block(params)
        return x + _attention_of(block.attention, block.attention_norm(x), batch)

    def _features(self, params: Mapping[str, Any], x: jax.Array, batch: Batch) -> jax.Array:
        """[B, S, d] → what the attention's output projection multiplies, [B, S, f]."""
        block = self.block(params)
        return features(block.attention, block.attention_norm(x), batch)

    def _mlp(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """Returns the stream behind the attention → the one behind the block, [B, S, d]."""
        block = self.block(params)
        return x + block.mlp(block.mlp_norm(x))


def features(layer: Any, x: jax.Array, batch: Batch) -> jax.Array:
    """Returns what a layer's output projection multiplies, [B, S, f]: its output y = F W_o where W_o is the
    identity."""
    outputs = [getattr(layer, name) for name in OUTPUTS if hasattr(layer, name)]
    sizes = [output.kernel.size // output.kernel.shape[-1] for output in outputs]
    ends = list(itertools.accumulate(sizes))
    for output, size, end in zip(outputs, sizes, ends, strict=True):
        rows = jnp.eye(size, ends[-1], k=end - size, dtype=jnp.float32)
        output.kernel = nnx.Param(rows.reshape(*output.kernel.shape[:-1], ends[-1]))
    layer.o_proj.bias = None
    return _attention_of(layer, x, batch)


def _attention_of(layer: Attention, x: jax.Array, batch: Batch) -> jax.Array:
    """Returns the layer's output, [B, S, d]."""
    return layer(x, segment_ids=batch["segment_ids"], positions=batch["positions"])[0]


def _split(params: Mapping[str, Any], buffers: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested dictionaries of parameters and of buffers."""
    flat = {tuple(path.split(".")): x for path, x in params.items()}
    parts = ({path: x for path, x in flat.items() if (".".join(path) in buffers) == wanted} for wanted in (False, True))
    parameters, held = (nnx.traversals.unflatten_mapping(part) for part in parts)
    return parameters, held


@dataclasses.dataclass
class _Streams:
    """Residual streams of the calibration rows, [B, S, d] in float32, at one layer.

    Attributes:
      batches: the rows.
      fitted: how many batches, from the first on, sums are taken over.
      dense: the source's stream: before the attention, then behind it, then behind the block.
      converted: that of the converted layers, before this one.
    """

    batches: list[Batch]
    fitted: int
    dense: list[jax.Array]
    converted: list[jax.Array]

    def pass_attention(self, source: _Blocks, params: Mapping[str, Any], moments: bool) -> np.ndarray:
        """Takes the source's stream through the layer's attention; returns `Calibration.moments`."""
        width = self.dense[0].shape[-1] + 1
        total = np.zeros((width, width))
        for number, (x, batch) in enumerate(zip(self.dense, self.batches, strict=True)):
            if moments and number < self.fitted:
                u = _real(source.norm(params, x), batch)
                u = np.concatenate([u, np.ones((len(u), 1))], axis=1)
                total += u.T @ u
            self.dense[number] = source.attend(params, x, batch)
        return total

    def regress(
        self, block: Mapping[str, Any], model: ModelConfig, attention: AttentionConfig, params: Params
    ) -> Regression:
        """`Calibration.regress`, for the block whose norm comes before the attention."""
        blocks = _blocks(dataclasses.replace(model, attention=attention))
        single = {path: x.astype(np.float32) for path, x in params.items()}
        bias = params.get("o_proj.bias", 0.0)
        gram, cross, energy = 0.0, 0.0, 0.0
        for x, behind, batch in list(zip(self.converted, self.dense, self.batches, strict=True))[: self.fitted]:
            f = _real(blocks.features(_with_attention(block, single), x, batch), batch)
            y = _real(behind, batch) - _real(x, batch) - bias
            gram, cross, energy = gram + f.T @ f, cross + f.T @ y, energy + float(np.sum(y * y))
        return Regression(np.asarray(gram), np.asarray(cross), energy)

    def examples(
        self, source: _Blocks, params: Mapping[str, Any]
    ) -> Iterator[tuple[jax.Array, jax.Array, Batch]]:
        """`Calibration.examples`."""
        rows = list(zip(self.converted, self.dense, self.batches, strict=True))[self.fitted :]
        for x, behind, batch in itertools.cycle(rows):
            yield source.norm(params, x), behind - x, batch

    def pass_layer(
        self, source: _Blocks, params: Mapping[str, Any], result: _Blocks, converted: Mapping[str, Any]
    ) -> None:
        """Takes both streams behind the block."""
        for number, batch in enumerate(self.batches):
            self.dense[number] = source.mlp(params, self.dense[number])
            self.converted[number] = result.mlp(converted, result.attend(converted, self.converted[number], batch))


_blocks = functools.lru_cache(maxsize=4)(_Blocks)  # compiled once for all layers


def _real(x: jax.Array, batch: Batch) -> np.ndarray:
    """Returns the real tokens of [B, S, n], float64 [tokens, n]."""
    return np.asarray(x, np.float64)[np.asarray(batch["segment_ids"]) != 0]
