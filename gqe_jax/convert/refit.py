"""Ridge regression of an output projection on what its heads give, from sums that add up over batches."""

import dataclasses

import numpy as np

RIDGE = 1e-3  # relative to the mean of the Gram matrix's diagonal


@dataclasses.dataclass(frozen=True)
class Regression:
    """Sums over tokens of the features F [n, f] that an output projection multiplies, and of its target Y [n, d].

    Attributes:
      gram: FᵀF, float64 [f, f].
      cross: FᵀY, float64 [f, d].
      energy: Σ Y².
    """

    gram: np.ndarray
    cross: np.ndarray
    energy: float

    def ridge(self, prior: np.ndarray, strength: float = RIDGE) -> np.ndarray:
        """W = W0 + (FᵀF + λ I)⁻¹ Fᵀ(Y − F W0), with λ = strength · mean diagonal of FᵀF.

        Args:
          prior: W0, float64 [f, d]. It is the result where F is 0, and where `strength` is infinite.
          strength: pull to the prior.
        """
        pull = strength * np.trace(self.gram) / len(self.gram)
        if pull == 0 or np.isinf(pull):
            return prior
        gram = self.gram + pull * np.eye(len(self.gram))
        return prior + np.linalg.solve(gram, self.cross - self.gram @ prior)

    def relative_error(self, weights: np.ndarray) -> float:
        """|F W − Y| / |Y|, both over all tokens, of W float64 [f, d]; 0 where Y is 0."""
        residual = self.energy + np.sum(weights * (self.gram @ weights - 2 * self.cross))
        return float(np.sqrt(max(residual, 0.0) / self.energy)) if self.energy else 0.0
