"""Latent keys and values from grouped-query attention: TransMLA (arXiv 2502.07864), docs/latent.md.

Keys of all KV heads are taken together, turned so that few of their dimensions hold most of what turns with the rotary
embedding, and the rest, which loses it, shares a latent with the values, found by a principal component analysis.
All that is needed of the calibration text are the moments of a layer's input.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gqe_jax.attention import GQAConfig, GQEConfig, GQEMLAConfig, MLAConfig
from gqe_jax.config import AttentionConfig, ConfigError, ModelConfig, require
from gqe_jax.convert.align import pair_moments
from gqe_jax.convert.layers import Batch, Calibration, Conversion, Converted, Params, convert_layers


def mla(
    params: Mapping[str, Any],
    config: ModelConfig,
    batches: Sequence[Batch],
    *,
    latent: int | None = None,
    rope_dim: int | None = None,
    freqfold: int | None = None,
    exact: bool = False,
    tied_groups: bool = True,
    refit: bool = True,
) -> Converted:
    """Converts a dense model to latent attention, or GQE to GQE on a latent.

    Args:
      params: path → array, the model's (`Converted.params`).
      config: of the model.
      batches: calibration rows.
      freqfold: frequencies that are taken for one; None: as few as `rope_dim` allows.
      latent, rope_dim, exact, tied_groups: see `to_mla`.
      refit: whether each layer's output projection is fitted to what the source's layer gave.

    Raises:
      ConfigError: as `to_mla`.
    """
    options = {"latent": latent, "rope_dim": rope_dim, "exact": exact, "tied_groups": tied_groups}
    conversion = to_mla(config, **options, freqfold="auto" if freqfold is None else freqfold)
    return convert_layers(conversion, params, config, batches, refit=refit)


def to_mla(
    model: ModelConfig,
    *,
    latent: int | None = None,
    rope_dim: int | None = None,
    freqfold: int | Literal["auto"] = "auto",
    exact: bool = False,
    tied_groups: bool = True,
) -> Conversion:
    """Returns the conversion to latent attention, with its partial rotary embedding alone as the control.

    Of a dense source the result is of kind "mla", of GQE it is "gqe_mla".

    Args:
      model: of the source: G KV heads of dimension D.
      latent: r, at most 2GD − R; None: 512.
      rope_dim: R: D / c with c a divisor of D/2, or p · D with p ≤ G, which keeps p of the G components of each
        frequency; None: 64.
      freqfold: f, neighbouring frequencies that are taken for one: a divisor of D/2 and a multiple of c. "auto" tries
        c, 2c, 4c, … while the loss of the control falls.
      exact: the source's function in the new form, R = r = GD, without calibration.
      tied_groups: the query heads of a group share their up-projections, as converted; otherwise each has its own.

    Raises:
      ConfigError: a source of another kind, with a QK norm or without rotary embedding; sizes out of range.
    """
    source = _source(model, tied_groups)
    groups, dim, both = source.num_kv_heads, _dim(source), 2 * source.num_kv_heads * _dim(source)
    _check_source(source, exact)
    if exact:
        require(
            latent in (None, both // 2) and rope_dim in (None, both // 2) and freqfold in ("auto", 1),
            f"--exact keeps everything: --latent and --rope-dim are both num_kv_heads · head_dim = {both // 2}, "
            f"--freqfold is 1: leave them out",
        )
        rope_dim = latent = both // 2
    rope_dim, latent = 64 if rope_dim is None else rope_dim, 512 if latent is None else latent
    folds = _folds(source, rope_dim)
    require(
        0 < latent <= both - rope_dim,
        f"--latent={latent} must lie in 1..{both - rope_dim}: keys and values have 2 · num_kv_heads · head_dim = "
        f"{both} numbers for each token, of which --rope-dim takes {rope_dim}",
    )
    if freqfold != "auto":
        require(
            freqfold in folds,
            f"--freqfold={freqfold} has to divide head_dim / 2 = {dim // 2} and be a multiple of head_dim / rope-dim "
            f"({dim} / {rope_dim}), and 1 above head_dim: use one of {', '.join(map(str, folds))}",
        )
        folds = (freqfold,)
    share = (latent + rope_dim) / both
    notes = (
        f"the cache has {latent + rope_dim} numbers for each token and layer, {share:.1%} of the run's {both}",
    )
    kind = MLAConfig if isinstance(source, GQAConfig) else GQEMLAConfig
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    kv_heads = groups if tied_groups else source.query_heads[1]
    fields |= {"kind": kind.kind, "num_kv_heads": kv_heads, "rope_dim": rope_dim}
    config = kind(**fields, latent_dim=latent, rope_repeats=max(1, rope_dim // dim))
    whole = dataclasses.replace(config, latent_dim=both - rope_dim)

    def layer(params: Params, calibration: Calibration, index: int, *, fold: int, rank: int) -> tuple[Params, str]:
        moments = None if exact else calibration.moments
        result = latent_layer(params, moments, fold=fold, rope_dim=rope_dim, rank=rank)
        return result if tied_groups else untied(result), ""

    def with_fold(fold: int, more: tuple[int, ...]) -> Conversion:
        control = Conversion(whole, functools.partial(layer, fold=fold, rank=both - rope_dim), moments=True)
        return Conversion(
            config,
            functools.partial(layer, fold=fold, rank=latent),
            moments=True,
            controls={f"partial rotary, freqfold {fold}": control},
            alternative=with_fold(more[0], more[1:]) if more else None,
            notes=(*notes, f"--freqfold is {fold}"),
        )

    if exact:
        return Conversion(config, functools.partial(layer, fold=1, rank=latent), lossless=True, notes=notes)
    doubled = [fold for fold in folds if (fold // folds[0]).bit_count() == 1]
    return with_fold(doubled[0], tuple(doubled[1:]))


def _source(model: ModelConfig, tied_groups: bool) -> GQAConfig | GQEConfig:
    """Returns the source's attention. Raises ConfigError if it is neither dense nor GQE."""
    source = model.attention
    if not isinstance(source, GQAConfig | GQEConfig) or isinstance(source, GQEMLAConfig):
        raise ConfigError(
            f"--to mla converts dense attention (model.attention.kind='gqa') and GQE ('gqe'), and the run's is "
            f"{source.kind!r}: name another run"
        )
    require(
        tied_groups or isinstance(source, GQAConfig),
        "--no-tied-groups gives each query head up-projections of its own, and a GQE router selects heads of a group "
        "that reads the same keys: leave it out",
    )
    return source


def _dim(source: AttentionConfig) -> int:
    assert source.head_dim is not None  # resolved by the model
    return source.head_dim


def _check_source(source: AttentionConfig, exact: bool) -> None:
    """Raises ConfigError if the source's keys cannot be turned, or its frequencies not be thinned out."""
    if source.qk_norm:
        raise ConfigError(
            "--to mla turns keys, which does not commute with the scale of the run's QK norm (qk_norm=True): convert a "
            "run without it, such as a Llama's, Mistral's or Qwen2's"
        )
    if source.rope_theta is None:
        raise ConfigError(
            "--to mla sets apart what keeps the rotary embedding, and the run has none (rope_theta=None): use --to gqa "
            "for a smaller cache"
        )
    kind = source.rope_scaling.kind
    if kind in ("dynamic", "yarn") and not exact:
        raise ConfigError(
            f"--to mla takes fewer frequencies, and those of the run's rope_scaling.kind={kind!r} depend on their "
            f"number: convert a run with one of 'none', 'linear', 'llama3', or add --exact"
        )


def _folds(source: AttentionConfig, rope_dim: int) -> tuple[int, ...]:
    """Returns the values of f that R allows, ascending; raises ConfigError if there are none."""
    dim, groups = _dim(source), source.num_kv_heads
    divisors = [size for size in range(1, dim // 2 + 1) if dim // 2 % size == 0]
    fits = sorted({dim // c for c in divisors} | {dim * p for p in range(1, groups + 1)})
    require(
        rope_dim in fits,
        f"--rope-dim={rope_dim} is neither head_dim / c, where c divides head_dim / 2 = {dim // 2}, nor a multiple of "
        f"head_dim = {dim} up to num_kv_heads = {groups} times it: use one of {', '.join(map(str, fits))}",
    )
    if rope_dim > dim:
        return (1,)
    return tuple(fold for fold in divisors if fold % (dim // rope_dim) == 0)


def latent_layer(params: Params, moments: np.ndarray | None, *, fold: int, rope_dim: int, rank: int) -> Params:
    """Returns a layer, dense or GQE, on a latent, with tied groups.

    Args:
      params: of the layer, float64.
      moments: Σ (u, 1)(u, 1)ᵀ of its input, [d + 1, d + 1]; None: nothing is turned, for R = r = GD.
      fold, rope_dim, rank: f, R and r.
    """
    keys, values = (affine(params, name) for name in ("k_proj", "v_proj"))  # [d + 1, G, D]
    _, groups, dim = keys.shape
    if moments is None:
        turns = np.broadcast_to(np.eye(groups)[:, None], (dim // 2, groups, 1, groups))
    else:
        turns = rotary_turns(pair_moments(moments, params["k_proj.kernel"], params.get("k_proj.bias")), fold)
    kept = rope_dim // (2 * len(turns))  # p pairs of each band
    rotated, still = heads_to_components(turns[..., :kept]), heads_to_components(turns[..., kept:])  # [G, D, R or N]
    k_rope = np.einsum("xgD,gDR->xR", keys, rotated)
    k_still = np.einsum("xgD,gDN->xN", keys, still)
    values = values.reshape(len(values), -1)
    if moments is None:
        balance, basis = 1.0, np.eye(values.shape[1])
    else:
        balance = balance_of(moments, k_still, values)
        joint = np.concatenate([k_still / balance, values], axis=1)
        basis = principal(joint.T @ moments @ joint, rank)  # [N + GD, r]
    down = np.concatenate([k_still / balance, values], axis=1) @ basis
    still_basis, value_basis = np.split(basis, [k_still.shape[1]])
    scale = np.sqrt((dim + rope_dim) / dim)

    def queries(q: np.ndarray) -> np.ndarray:
        """[..., G, M, D] → [..., G, M, D + R]."""
        return scale * np.concatenate([q, np.einsum("...gmD,gDR->...gmR", q, rotated)], axis=-1)

    def shared_query(q: np.ndarray) -> np.ndarray:
        """[..., D] → [..., D + R], for the mean of the heads' keys."""
        return scale * np.concatenate([q, q @ rotated.mean(axis=0)], axis=-1)

    kept_as_they_are = {path: x for path, x in params.items() if not path.startswith(("q_", "k_proj", "v_proj"))}
    result = kept_as_they_are | {
        "q_proj.kernel": queries(params["q_proj.kernel"]),
        "kv_down.kernel": down[:-1],
        "k_rope.kernel": k_rope[:-1],
        "k_up.kernel": balance * np.einsum("Nr,gDN->rgD", still_basis, still),
        "v_up.kernel": value_basis.T.reshape(rank, groups, dim),
    }
    if "k_proj.bias" in params:
        result |= {
            "q_proj.bias": queries(params["q_proj.bias"]), "kv_down.bias": down[-1], "k_rope.bias": k_rope[-1],
        }  # fmt: skip
    for path in ("q_shared.kernel", "q_shared.bias"):
        if path in params:
            result[path] = shared_query(params[path])
    return result


def untied(layer: Params) -> Params:
    """Returns the same layer, in which every query head is a group of its own."""
    groups, members = layer["o_proj.kernel"].shape[:2]
    result = dict(layer)
    for path in ("k_up.kernel", "v_up.kernel"):
        result[path] = np.repeat(layer[path], members, axis=1)
    for path, axis in (("q_proj.kernel", 1), ("q_proj.bias", 0), ("o_proj.kernel", 0)):
        if path in layer:
            shape = layer[path].shape
            result[path] = layer[path].reshape(*shape[:axis], groups * members, 1, *shape[axis + 2 :])
    return result


def affine(params: Params, name: str) -> np.ndarray:
    """Returns a projection's kernel with its bias, or zeros, as the last row: [d + 1, G, D]."""
    kernel = params[f"{name}.kernel"]
    return np.concatenate([kernel, params.get(f"{name}.bias", np.zeros(kernel.shape[1:]))[None]])


def rotary_turns(pairs: np.ndarray, fold: int) -> np.ndarray:
    """Principal components of the keys of all heads, for each band of `fold` neighbouring frequencies.

    Both halves x, y of a frequency are turned alike, so that the turn commutes with the rotary embedding: exactly
    where fold = 1, or else as far as the frequencies of a band are equal. Components of Σ (x xᵀ + y yᵀ) come in the
    order of their size, the largest entry of each positive.

    Args:
      pairs: K_hᵀ K_h' of all pairs of heads, float64 [G, G, D, D].
      fold: f, a divisor of D/2.

    Returns:
      U, float64 [D/2/f bands, G, f, G · f components].
    """
    groups, _, dim, _ = pairs.shape
    half = dim // 2
    both = pairs[..., :half, :half] + pairs[..., half:, half:]
    turns = []
    for first in range(0, half, fold):
        band = both[..., first : first + fold, first : first + fold].transpose(0, 2, 1, 3)
        turns.append(principal(band.reshape(groups * fold, -1), groups * fold).reshape(groups, fold, -1))
    return np.stack(turns)


def heads_to_components(turns: np.ndarray) -> np.ndarray:
    """Returns the components of `rotary_turns` as vectors over the dimensions of all heads.

    Args:
      turns: U, [bands, G, f, n components].

    Returns:
      [G, D, 2 · bands · n]: all components of the first halves, band by band, then those of the second halves.
    """
    bands, groups, fold, count = turns.shape
    half = np.zeros((groups, bands, fold, bands, count))
    for band in range(bands):
        half[:, band, :, band] = turns[band]
    half = half.reshape(groups, bands * fold, bands * count)
    none = np.zeros_like(half)
    return np.concatenate([np.concatenate([half, none], axis=2), np.concatenate([none, half], axis=2)], axis=1)


def balance_of(moments: np.ndarray, keys: np.ndarray, values: np.ndarray) -> float:
    """ρ: how much larger the columns of the keys are than those of the values, on average; 1 where either are 0."""
    sizes = [np.sqrt(np.einsum("xn,xy,yn->n", part, moments, part)) for part in (keys, values)]
    means = [float(size.mean()) if size.size else 0.0 for size in sizes]
    return means[0] / means[1] if all(means) else 1.0


def principal(moment: np.ndarray, rank: int) -> np.ndarray:
    """Returns the `rank` first eigenvectors of a symmetric matrix [n, n], by descending eigenvalue, as columns [n,
    rank].

    The largest entry of each is positive.
    """
    _, vectors = np.linalg.eigh(moment)
    vectors = vectors[:, ::-1][:, :rank]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(rank)]
    return vectors * np.where(largest < 0, -1.0, 1.0)
