"""Cost-optimal head counts (arXiv 2503.09579): what a context costs, how loss falls with size, the cheapest heads.

With N parameters, L layers, H heads that attend, G KV heads, head dimension D and context T in tokens, decoding costs

    C(T) = 2 N + 4 T L D H      FLOPs per generated token
    M(T) = N + 2 T L D G        numbers kept: parameters and cache
    Z    = 0.9 √M + 0.1 ∛C      the cost that is minimised

and training from scratch gives L(N) = A N^(-b) + E for each choice of heads, N without embeddings. C and M are affine
in T, so a mixture of lengths enters by its mean. NumPy alone, in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from gqe_jax.config import ConfigError

MEMORY_WEIGHT, MEMORY_POWER, FLOPS_POWER = 0.9, 1 / 2, 1 / 3
LEAST_SIZES = 4  # of a fit with three constants
EXPONENTS = np.geomspace(0.01, 2.0, 400)

# Parameters → layers and width of published models; between them d / L is linear in log N.
SHAPES = (
    (1.2e9, 36, 1536),
    (1.8e9, 36, 2048),
    (4e9, 48, 2560),
    (6e9, 54, 3072),
    (13e9, 64, 4096),
    (33e9, 72, 6144),
    (64e9, 80, 8192),
)


def decode_flops(parameters: float, context: float, *, layers: float, head_dim: int, attending: int) -> float:
    """Counts the FLOPs of generating a token behind `context` others: C(T)."""
    return 2 * parameters + 4 * context * layers * head_dim * attending


def kept_numbers(parameters: float, context: float, *, layers: float, head_dim: int, kv_heads: int) -> float:
    """Counts the numbers that stay in memory while a token behind `context` others is generated: M(T)."""
    return parameters + 2 * context * layers * head_dim * kv_heads


def weighed(memory: float, flops: float) -> float:
    """Computes Z of `kept_numbers` and `decode_flops`."""
    return MEMORY_WEIGHT * memory**MEMORY_POWER + (1 - MEMORY_WEIGHT) * flops**FLOPS_POWER


@dataclasses.dataclass(frozen=True)
class Fit:
    """A curve of loss against size, amplitude · N^(-exponent) + floor.

    Attributes:
      residual: root of the mean square of what the curve leaves of the losses it was fitted to.
    """

    amplitude: float
    exponent: float
    floor: float
    residual: float

    def loss(self, size: float) -> float:
        return self.amplitude * size**-self.exponent + self.floor

    def size(self, loss: float) -> float:
        """Returns the N that reaches the loss; infinite at the floor and below."""
        if loss <= self.floor:
            return math.inf
        power = math.log(self.amplitude / (loss - self.floor)) / self.exponent if self.amplitude else -math.inf
        return math.exp(power) if power < 700 else math.inf


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Fit:
    """Fits the curve by least squares: amplitude and floor, at least 0 both, are solved for at each exponent.

    Args:
      sizes: parameters without embeddings.
      losses: final held-out losses in nats.

    Raises:
      ConfigError: fewer than four different sizes.
    """
    if len(set(sizes)) < LEAST_SIZES:
        raise ConfigError(
            f"{len(set(sizes))} size(s) cannot show how loss falls with size: train at least {LEAST_SIZES} sizes of "
            f"each choice of heads"
        )
    n, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    scale = float(np.exp(np.log(n).mean()))  # powers of N / scale are near 1, where those of N lose digits

    def error(log_exponent: float) -> float:
        return _linear(n / scale, y, math.exp(log_exponent))[2]

    grid = np.log(EXPONENTS)
    best = int(np.argmin([error(value) for value in grid]))
    exponent = math.exp(_golden_section(error, grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]))
    amplitude, floor, squares = _linear(n / scale, y, exponent)
    return Fit(amplitude * scale**exponent, exponent, floor, math.sqrt(squares / len(y)))


def _linear(n: np.ndarray, y: np.ndarray, exponent: float) -> tuple[float, float, float]:
    """Amplitude and floor of at least 0, and the sum of squares that they leave."""
    x = n**-exponent
    centred = x - x.mean()
    amplitude = float(centred @ y / (centred @ centred))
    floor = float(y.mean() - amplitude * x.mean())
    if floor < 0:
        amplitude, floor = float(x @ y / (x @ x)), 0.0
    if amplitude < 0:
        amplitude, floor = 0.0, float(y.mean())
    return amplitude, floor, float(((y - amplitude * x - floor) ** 2).sum())


def _golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-10:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """Depth and width of a decoder with d_ff = 8 d / 3 (three matrices); real numbers, which a config file rounds."""

    layers: float
    d_model: float


def shape(size: float, columns: float) -> Shape:
    """Finds the decoder of `size` parameters without embeddings that has the aspect d / L of published models.

    Args:
      columns: columns of all projections of a layer, so that it has d · columns + 8 d² parameters: 2 D (H + G) in GQA.
    """
    aspect = float(np.interp(math.log(size), [math.log(n) for n, _, _ in SHAPES], [d / l for _, l, d in SHAPES]))
    low, high = 1e-3, 1e4
    while high - low > 1e-9 * high:
        layers = (low + high) / 2
        width = aspect * layers
        low, high = (layers, high) if layers * (width * columns + 8 * width**2) < size else (low, layers)
    return Shape(high, aspect * high)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One choice of heads, at the size that reaches the loss asked for.

    Attributes:
      query_heads, kv_heads: H and G.
      size: parameters without embeddings; infinite where no size reaches the loss, and `cost` with it.
      parameters, memory, flops, cost: of the model with embeddings; M, C and Z.
    """

    query_heads: int
    kv_heads: int
    size: float
    shape: Shape
    parameters: float
    memory: float
    flops: float
    cost: float


def candidate(
    query_heads: int, kv_heads: int, size: float, context: float, *, head_dim: int, vocab_size: int
) -> Candidate:
    """Computes what a dense model of `size` parameters with these heads costs at `context` tokens."""
    if math.isinf(size):
        infinite = Shape(math.inf, math.inf)
        return Candidate(query_heads, kv_heads, size, infinite, math.inf, math.inf, math.inf, math.inf)
    form = shape(size, 2 * head_dim * (query_heads + kv_heads))
    parameters = size + vocab_size * form.d_model
    sizes = {"layers": form.layers, "head_dim": head_dim}
    flops = decode_flops(parameters, context, attending=query_heads, **sizes)
    memory = kept_numbers(parameters, context, kv_heads=kv_heads, **sizes)
    return Candidate(query_heads, kv_heads, size, form, parameters, memory, flops, weighed(memory, flops))


def search(
    fits: dict[tuple[int, int], Fit], loss: float, context: float, *, head_dim: int, vocab_size: int
) -> list[Candidate]:
    """Ranks the choices of heads that reach the loss, the cheapest first; ties go to fewer query heads, then KV heads.

    Args:
      fits: (H, G) → curve.
      loss: held-out nats to reach.
      context: tokens, or the mean of several lengths.
      vocab_size: rows of the (tied) embedding.
    """
    sizes = {"head_dim": head_dim, "vocab_size": vocab_size}
    found = [candidate(*heads, curve.size(loss), context, **sizes) for heads, curve in fits.items()]
    return sorted(found, key=lambda each: (each.cost, each.query_heads, each.kv_heads))
