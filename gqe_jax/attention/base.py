"""Defines what all attention layers share: construction, the call and its checks, dense keys and values."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.attention.caches import Cache, KVCache
from gqe_jax.attention.checks import check_call, require_type
from gqe_jax.attention.key_values import KeyValues
from gqe_jax.attention.report import LayerReport
from gqe_jax.attention.rotary import rotary_tables
from gqe_jax.config import AttentionConfig, nearest
from gqe_jax.kernels import rms_norm, rotate
from gqe_jax.linear import Linear, make_norm
from gqe_jax.parallel.on_mesh import Shard, axis_size
from gqe_jax.parallel.zigzag import zigzag
from gqe_jax.remat import PRODUCT

default_kernel_init = nnx.initializers.normal(0.02)

Config = TypeVar("Config", bound=AttentionConfig)
Report = TypeVar("Report", bound=LayerReport)
AnyCache = TypeVar("AnyCache", bound=Cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Holds the tokens of a layer's call, or one device's part of them.

    Attributes:
      x: [B, S, d], the layer's input.
      segment_ids: int32 [B, S], or None.
      positions: int32 [B or 1, S].
      rope: cos and sin, float32 [B or 1, S, D/2] each, or None.
      cache: the cache that the tokens continue, or None.
    """

    x: jax.Array
    segment_ids: jax.Array | None
    positions: jax.Array
    rope: tuple[jax.Array, jax.Array] | None
    cache: Cache | None

    @property
    def axes(self) -> Any:
        """The logical axes of the arrays (`parallel.rules`), in a `Tokens`."""
        positions = ("batch" if self.positions.shape[0] == self.x.shape[0] else None, "sequence")
        return dataclasses.replace(
            self,
            x=("batch", "sequence", None),
            segment_ids=("batch", "sequence"),
            positions=positions,
            rope=None if self.rope is None else ((*positions, None),) * 2,
            cache=None if self.cache is None else self.cache.axes,
        )


class Attention(nnx.Module, Generic[Config, Report]):
    """The base class of all kinds of attention makes W_k, W_v and the norms, and checks and prepares each call.

    A kind names its `Config`, makes its other parameters in `_make`, and computes a call in `_compute`.

    Args:
      d_model: width d of the input and the output.
      *heads: the fields of the kind's config that `POSITIONAL` names, in its order; they may be given by name too.
      dtype: dtype of the computation; None: the wider of the input's and the parameters'.
      param_dtype: dtype of the parameters.
      kernel_init, out_kernel_init: initializers of the projections; out_kernel_init that of W_o, None: kernel_init.
      rngs: draws the initial values of the parameters, from the stream "params".
      **fields: the other fields of the kind's config.

    Raises:
      ConfigError: a rule of the config is broken, such as top_k > M, head counts that do not divide, or an odd head_dim
        with rotary embedding.
      TypeError: a field does not exist or is missing.
      ValueError: an argument has another type.
    """

    Config: ClassVar[type[AttentionConfig]]
    config: Config

    def __init__(
        self,
        d_model: int,
        *heads: int | None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = default_kernel_init,
        out_kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
        **fields: Any,
    ):
        require_type("rngs", rngs, nnx.Rngs, "pass nnx.Rngs(seed)")
        self.d_model = d_model
        self.config = config = _config_from(type(self).Config, heads, fields).resolve(d_model)
        linear = functools.partial(
            Linear, use_bias=config.bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self._make_key_values(linear, functools.partial(make_norm, param_dtype=param_dtype, rngs=rngs))
        self._make(linear, functools.partial(linear, kernel_init=out_kernel_init or kernel_init), rngs)

    def _make_key_values(self, linear: Callable[..., Linear], norm: Callable[..., nnx.RMSNorm]) -> None:
        """Makes W_k, W_v and the QK norm: what `_key_values` computes with."""
        config = self.config
        kv_shape, kv_axes = (config.num_kv_heads, config.head_dim), ("embed", "group", None)
        self.k_proj = linear(self.d_model, kv_shape, axes=kv_axes)
        self.v_proj = linear(self.d_model, kv_shape, axes=kv_axes)
        if config.qk_norm:
            self.q_norm = norm(config.head_dim, epsilon=config.qk_norm_eps)
            self.k_norm = norm(config.head_dim, epsilon=config.qk_norm_eps)

    def _make(self, linear: Callable[..., Linear], out_linear: Callable[..., Linear], rngs: nnx.Rngs) -> None:
        """Makes the kind's parameters beside those of `_make_key_values`, W_o as `o_proj` by `out_linear`.

        `linear` and `out_linear` are `Linear` with the layer's dtypes, biases and initializers filled in.
        """
        raise NotImplementedError

    def _compute(
        self, tokens: Tokens, rngs: nnx.Rngs | None, layer_index: jax.Array | int
    ) -> tuple[jax.Array, Report, Cache | None]:
        """Computes y [B, S, d] without `o_proj`'s bias, the report, and the grown cache (None without one).

        A kind calls `on_mesh` here, which runs its equations, by convention `_forward`, on each device of the mesh.
        """
        raise NotImplementedError

    @property
    def cached_shape(self) -> tuple[int, int]:
        """What `Cache.check` compares the cache of a call with: (G, D)."""
        return self.config.num_kv_heads, cast(int, self.config.head_dim)

    def init_cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> Cache:
        """Makes an empty cache for `batch` sequences of at most `capacity` tokens, in the layer's dtype by default.

        Raises:
          ValueError: batch or capacity is below 1.
        """
        dtype = dtype or self.o_proj.dtype or self.o_proj.kernel[...].dtype
        return KVCache.empty(batch, capacity, *self.cached_shape, dtype, parts=axis_size("expert"))

    @overload
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: None = None,
        rngs: nnx.Rngs | None = None,
        layer_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Report]: ...
    @overload
    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: AnyCache,
        rngs: nnx.Rngs | None = None,
        layer_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Report, AnyCache]: ...
    def __call__(self, x, *, segment_ids=None, positions=None, cache=None, rngs=None, layer_index=0):
        """Computes causal self-attention.

        Under `jax.set_mesh` of a mesh from `gqe_jax.make_mesh` each device computes its part: groups are split over
        `expert`, rows of the batch over `data` and `fsdp`, tokens over `context`. With n > 1 devices on `context` the
        layer takes x, segment_ids and positions in the order of `gqe_jax.zigzag(x, n)`, and returns y and the
        statistics in the same order.

        First derivatives in reverse mode work on every platform. For forward mode (`jax.jvp`) and second derivatives
        construct the layer with implementation="reference".

        Args:
          x: [B, S, d].
          segment_ids: int32 [B, S]; tokens see their own segment only, 0 = padding. With a cache: 1 = token and 0 =
            padding behind the tokens, which takes no place in the cache.
          positions: int32 [B or 1, S], for the rotary embedding; None: 0, 1, … (behind what the cache holds).
          cache: from `init_cache`; the S tokens continue it. Under `jit` its lengths are not known: tokens beyond its
            capacity overwrite the last ones, which `checkify.checkify` reports, except under a mesh.
          rngs: randomness of training, stream "router": the router's jitter, and the draws of the `random` router.
          layer_index: index of this layer in a stack; without rngs the `random` router draws differently in each.

        Returns:
          (y [B, S, d], `LayerReport`: GQE's is its `RouterStats`), and the grown cache if one was given.

        Raises:
          ValueError: shapes or dtypes do not fit, rngs lack the stream, the mesh does not divide the sizes, or there
            are more tokens than the cache has room for.
        """
        check_call(self, x, segment_ids, positions, cache, rngs)
        if positions is None:
            start = 0 if cache is None else cache.lengths
            positions = jnp.reshape(start, (-1, 1)) + jnp.arange(x.shape[1], dtype=jnp.int32)
            positions = zigzag(positions, axis_size("context"))
        config, rope = self.config, None
        if config.rope_theta is not None:
            rope = rotary_tables(positions, config.rotary_dim[1], config.rope_theta, config.rope_scaling)
        y, report, cache = self._compute(Tokens(x, segment_ids, positions, rope, cache), rngs, layer_index)
        y = self.o_proj.add_bias(checkpoint_name(y, PRODUCT))
        return (y, report) if cache is None else (y, report, cache)

    def _queries(self, project: Linear, x: jax.Array) -> jax.Array:
        """Projects x to queries [..., width of a key], as `KeyValues.attend` takes them."""
        return project(x)

    def _key_values(self, shard: Shard, tokens: Tokens) -> tuple[KeyValues, Cache | None]:
        """Projects, norms and rotates K and V of one device's groups, and appends them to the cache if there is one.

        Returns:
          (the keys and values that queries see: of these tokens, or of the whole grown cache, the grown cache or None).
        """
        config, cache = self.config, tokens.cache
        k, v = self.k_proj(tokens.x), self.v_proj(tokens.x)
        dtype, q_norm, start = v.dtype, None, 0
        if config.qk_norm:
            k = rms_norm(k, self.k_norm.scale[...], config.qk_norm_eps)
            q_norm = (self.q_norm.scale[...], config.qk_norm_eps)
        if tokens.rope is not None:
            k = rotate(k, *tokens.rope)
        if cache is not None:
            start, heads = cache.lengths, k.shape[2:]
            cache = cache.append(k, v, tokens.segment_ids)
            k, v = (held.reshape(*held.shape[:-2], *heads) for held in (cache.k, cache.v))
        key_values = KeyValues(
            shard=shard,
            config=config,
            k=k.astype(dtype),
            v=v.astype(dtype),
            rope=tokens.rope,
            q_norm=q_norm,
            segment_ids=tokens.segment_ids if cache is None else None,
            q_offset=start,
            kv_length=None if cache is None else cache.lengths,
            layer=None if cache is None else cache.layer,
        )
        return key_values, cache


def _config_from(kind: type[AttentionConfig], heads: tuple[Any, ...], fields: dict[str, Any]) -> AttentionConfig:
    """Makes the config from the arguments of a layer's constructor."""
    if len(heads) > len(kind.POSITIONAL):
        raise TypeError(
            f"{len(heads)} positional arguments after d_model, but only {', '.join(kind.POSITIONAL)} go by position: "
            f"give the others by name"
        )
    known = {field.name: field for field in dataclasses.fields(kind) if field.name != "kind"}
    fields = dict(zip(kind.POSITIONAL, heads, strict=False)) | fields
    for name, value in fields.items():
        if name not in known:
            raise TypeError(f"unknown argument {name!r}: {nearest(name, known)}")
        default = known[name].default
        if dataclasses.is_dataclass(default):
            require_type(name, value, type(default), f"write gqe_jax.{type(default).__name__}(kind=...)")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in fields]
    if missing:
        raise TypeError(f"missing arguments: {', '.join(missing)}")
    return kind(**fields)
